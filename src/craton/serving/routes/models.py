"""`/v1/models/load` and `/v1/models/unload`, for keys that may."""

from __future__ import annotations

from craton.serving.call import Call
from craton.serving.errors import ApiError
from craton.serving.http import Reply
from craton.serving.schemas.models import LoadRequest, UnloadRequest


async def load_model(call: Call, body: LoadRequest) -> Reply:
    """Load a model of the store; it answers from then on."""
    _check_admin(call)
    await call.state.shelf.add(body.model)
    return {"id": body.model, "object": "model", "loaded": True}


async def unload_model(call: Call, body: UnloadRequest) -> Reply:
    """Unload a model; what it is writing is finished first."""
    _check_admin(call)
    await call.state.shelf.remove(body.model)
    return {"id": body.model, "object": "model", "loaded": False}


def _check_admin(call: Call) -> None:
    if not call.caller.admin:
        raise ApiError(
            403,
            "loading and unloading models needs an admin key (craton serve key add NAME --admin)",
            code="admin_only",
        )
