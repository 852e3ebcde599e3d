"""An endpoint: read and check the body, wait for a turn, answer as JSON or as a stream, and refuse in one place."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from craton.serving import logs
from craton.serving.call import Call
from craton.serving.errors import ApiError, ClientGone, from_any
from craton.serving.multipart import read_form
from craton.serving.schemas.common import Body, read_body, read_values

B = TypeVar("B", bound=Body)

# A body arrives within this time, and a client that takes nothing for as long has gone.
READ_SECONDS = SEND_SECONDS = 30.0
# What the log says of a request whose client left; no client sees it.
CLIENT_LEFT = 499


@dataclass
class Stream:
    """Server-sent events. failure: the event that says what went wrong once the stream has begun."""

    events: AsyncGenerator[bytes, None]
    failure: Callable[[ApiError], bytes]


@dataclass
class Text:
    """A whole response that is no JSON."""

    text: str
    kind: str = "text/plain; charset=utf-8"


Reply = dict[str, Any] | Stream | Text


class Endpoint(Generic[B]):
    """An ASGI application for one route. queued: whether it waits for a turn, as all that asks the engine does."""

    content: ClassVar[str] = "application/json"

    def __init__(self, schema: type[B], handler: Callable[[Call, B], Awaitable[Reply]], *, queued: bool = True) -> None:
        self.schema, self.handler, self.queued = schema, handler, queued

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope["craton.call"]
        call.endpoint = scope["path"]
        sender = _Sender(send, call)
        status = 500
        try:
            body = await self._body(call, scope, receive)
            await _while_connected(receive, self._answer(call, body, sender))
            status = 200
        except ClientGone:
            status = CLIENT_LEFT
        except asyncio.CancelledError:
            status = 503
            raise
        except Exception as error:
            refusal = from_any(error)
            status = refusal.status
            if status == 500:
                logs.fault("a request failed", error, id=call.id)
            await sender.refuse(refusal, scope["path"])
        finally:
            call.give_back()
            call.record(status)

    async def _body(self, call: Call, scope: Scope, receive: Receive) -> B:
        raw = await _read(scope, receive, self.content, call.state.settings.max_body_bytes)
        if call.state.settings.log_prompts:
            call.log_texts["body"] = raw.decode(errors="replace")
        return read_body(self.schema, raw)

    async def _answer(self, call: Call, body: B, sender: _Sender) -> None:
        limit = call.state.settings.request_timeout
        call.deadline = time.monotonic() + limit
        try:
            async with asyncio.timeout(limit):
                if self.queued:
                    async with call.state.gate.turn(call.caller.name, call.caller.priority):
                        call.enter()
                        await self._send(await self.handler(call, body), sender)
                else:
                    await self._send(await self.handler(call, body), sender)
        except TimeoutError:
            raise ApiError(504, f"the request took longer than {limit:g} seconds", code="timeout") from None

    async def _send(self, reply: Reply, sender: _Sender) -> None:
        if isinstance(reply, Stream):
            await sender.stream(reply)
        elif isinstance(reply, Text):
            await sender.whole(200, reply.text.encode(), reply.kind)
        else:
            await sender.json(200, reply)


class FormEndpoint(Endpoint[B]):
    """One whose body is a form with a file in it, as a web page sends it."""

    content: ClassVar[str] = "multipart/form-data"

    async def _body(self, call: Call, scope: Scope, receive: Receive) -> B:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            # A page of any site may send forms to any address; its answers it cannot read, but it can keep us busy.
            raise ApiError(403, "forms from pages of other sites are not taken", param="origin")
        raw = await _read(scope, receive, self.content, call.state.settings.max_upload_bytes)
        values = await read_form(headers, raw)
        if call.state.settings.log_prompts:
            call.log_texts["body"] = {name: value for name, value in values.items() if not isinstance(value, bytes)}
        return read_values(self.schema, values)


class _Sender:
    """Sends one response, and knows how far it is."""

    def __init__(self, send: Send, call: Call) -> None:
        self._send, self._call = send, call
        self._stream: Stream | None = None
        self._started = False

    async def json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """A whole response."""
        data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        await self.whole(status, data, "application/json", headers)

    async def whole(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        """A whole response of any kind."""
        await self._start(status, kind, {"content-length": str(len(data)), **(headers or {})})
        await self._put({"type": "http.response.body", "body": data})

    async def stream(self, stream: Stream) -> None:
        """Events as they come. The headers wait for the first one, so that a refusal can still be a status."""
        async with aclosing(stream.events) as events:
            async for event in events:
                if not self._started:
                    self._stream = stream
                    await self._start(200, "text/event-stream; charset=utf-8", {"cache-control": "no-store"})
                await self._put({"type": "http.response.body", "body": event, "more_body": True})
        await self._put({"type": "http.response.body", "body": b""})

    async def refuse(self, error: ApiError, path: str) -> None:
        """The error, as a response or as the last event of the stream."""
        with contextlib.suppress(ClientGone):
            if not self._started:
                await self.json(error.status, error.body(path), error.headers)
            elif self._stream is not None:
                await self._put({"type": "http.response.body", "body": self._stream.failure(error)})

    async def _start(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self._started = True
        pairs = {"content-type": kind, "x-request-id": self._call.id, **headers}
        encoded = [(name.encode(), value.encode()) for name, value in pairs.items()]
        await self._put({"type": "http.response.start", "status": status, "headers": encoded})

    async def _put(self, message: Message) -> None:
        self._call.sending = sending = asyncio.ensure_future(_sent(self._send, message))
        try:
            await asyncio.wait([sending], timeout=SEND_SECONDS)
            if not sending.done() or sending.cancelled():
                raise ClientGone
            sending.result()
        finally:
            sending.cancel()
            self._call.sending = None


async def _sent(send: Send, message: Message) -> None:
    await send(message)


async def refuse(send: Send, call: Call, error: ApiError, path: str) -> None:
    """Answer a request that reaches no endpoint."""
    await _Sender(send, call).refuse(error, path)


async def _read(scope: Scope, receive: Receive, kind: str, limit: int) -> bytes:
    headers = Headers(scope=scope)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        # A web page may send other types than JSON to any address without asking; that one it may not.
        raise ApiError(415, f"the body must be sent as content-type: {kind}", param="content-type")
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {READ_SECONDS:g} seconds", code="timeout") from None


async def _while_connected(receive: Receive, work: Any) -> None:
    """Do the work unless the client leaves; then it is cancelled. Raises ClientGone."""
    working, listening = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([working, listening], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await working
            raise ClientGone
        working.result()
    finally:
        working.cancel()
        listening.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
