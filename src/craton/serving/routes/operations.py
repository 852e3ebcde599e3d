"""What operators and clients ask about the server itself."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from craton.serving.errors import ApiError
from craton.serving.state import ServerState


class Operations:
    """`/health`, `/ready`, `/metrics`, `/v1/models` and `/openapi.json`."""

    def __init__(self, state: ServerState, document: dict[str, Any]) -> None:
        self._state, self._document = state, document

    async def health(self, request: Request) -> Response:
        """Whether the process does its work."""
        alive = self._state.worker.alive
        return JSONResponse({"status": "ok" if alive else "the engine has died"}, 200 if alive else 503)

    async def ready(self, request: Request) -> Response:
        """Whether requests are welcome: models loaded, and not about to stop."""
        models = {name: loaded for name, _, loaded in self._state.shelf.listing}
        return JSONResponse({"ready": self._state.ready, "models": models}, 200 if self._state.ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        state = self._state
        state.metrics.running.set(state.worker.running)
        state.metrics.active.set(state.gate.running)
        state.metrics.waiting.set(state.gate.waiting)
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The models that may be asked for."""
        entries = [_entry(name, created, loaded) for name, created, loaded in self._state.shelf.listing]
        return JSONResponse({"object": "list", "data": entries})

    async def model(self, request: Request) -> Response:
        """One model."""
        wanted = request.path_params["model"]
        self._state.shelf.check_known(wanted)
        return JSONResponse(next(_entry(*one) for one in self._state.shelf.listing if one[0] == wanted))

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        return JSONResponse(self._document)


def _entry(name: str, created: int, loaded: bool) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "craton", "loaded": loaded}


def not_found(request: Request, error: Exception) -> Response:
    """What is answered to a path or method that there is not."""
    status = getattr(error, "status_code", 404)
    what = f"there is no {request.scope['path'][:100]!r}" if status == 404 else f"{request.method} is not allowed here"
    return JSONResponse(
        ApiError(status, what).body(request.scope["path"]), status, headers=getattr(error, "headers", None)
    )


def refused(request: Request, error: Exception) -> Response:
    """An ApiError of an operation."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(request.scope["path"]), error.status, headers=error.headers)
