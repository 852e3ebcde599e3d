"""What every request passes before it reaches a route: who may ask, by which name, and whether there is time left."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from craton.serving.call import Call
from craton.serving.errors import ApiError, from_any
from craton.serving.http import refuse
from craton.serving.keys import ANYONE, Caller
from craton.serving.settings import is_loopback
from craton.serving.state import ServerState

# Requests whose bodies are being read, beside those that run or wait: more would fill the memory.
MOST_READING = 256
# All that is open without a key, by its exact path as the server parsed it.
OPEN_PATHS = frozenset({"/health", "/ready"})


class Guard:
    """Denies by default: with keys, every path but OPEN_PATHS needs one, those that do not exist, too."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state, self._inside = app, state, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        # What a client calls its request leads nowhere: ids are the server's.
        call = Call(self._state, f"req_{secrets.token_hex(12)}", ANYONE)
        try:
            call.caller = self._caller_of(scope)
        except Exception as error:
            refusal = from_any(error)
            await refuse(send, call, refusal, scope["path"])
            call.record(refusal.status)
            return
        scope["craton.call"] = call
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1

    def _caller_of(self, scope: Scope) -> Caller:
        if scope["path"] in OPEN_PATHS:
            return ANYONE
        headers = Headers(scope=scope)
        caller = ANYONE
        if self._state.keys is None:
            _check_host(headers.get("host", ""))
        else:
            found = self._state.keys.caller_of(_presented(headers))
            if found is None:
                raise ApiError(401, "a valid API key is needed", code="invalid_api_key")
            caller = found
        if self._state.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        limits = self._state.settings
        if self._inside >= limits.concurrency + limits.queue + MOST_READING:
            raise ApiError(503, "too many requests at once", code="too_many_requests", retry_after=1)
        return caller


def _presented(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _check_host(host: str) -> None:
    # Without keys only this machine may ask; a name that a web page made point here (DNS rebinding) is not its name.
    name = host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdigit() else host
    if not is_loopback(name):
        raise ApiError(403, "a server without keys answers only to the names of its own machine", param="host")
