"""One request on its way: who asks, what it has cost so far, and how it is recorded when it ends."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from craton.serving import logs
from craton.serving.keys import Caller
from craton.serving.models import Place, Served
from craton.serving.state import ServerState
from craton.serving.worker import Piece


@dataclass
class Call:
    """A request. id: made by the server. caller: whose key it came with. endpoint: its route's path. deadline: in
    `time.monotonic()`'s seconds. sending: what is just being sent."""

    state: ServerState
    id: str
    caller: Caller
    endpoint: str = "unknown"
    model: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    deadline: float | None = None
    started: float = field(default_factory=time.perf_counter)
    entered: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    sending: asyncio.Future[None] | None = None
    log_texts: dict[str, object] = field(default_factory=dict)
    _borrowed: list[Place] = field(default_factory=list)

    async def borrow(self, model: str) -> Served:
        """The model of this name, which stays loaded until the request has ended. Raises what `Shelf.borrow` does."""
        place = await self.state.shelf.borrow(model)
        self._borrowed.append(place)
        assert place.served is not None
        return place.served

    def give_back(self) -> None:
        """The request has ended: its models may be unloaded."""
        while self._borrowed:
            self.state.shelf.give_back(self._borrowed.pop())

    def enter(self) -> None:
        """Its turn has come."""
        self.entered = time.perf_counter()

    def cut(self) -> None:
        """Give up on a client that takes nothing: whoever waits for it to read waits no longer."""
        if self.sending is not None:
            self.sending.cancel()

    def count(self, piece: Piece) -> None:
        """Note the tokens of a piece and when they came."""
        if not piece.tokens:
            return
        now, metrics = time.perf_counter(), self.state.metrics
        if not self.first_token:
            self.first_token = now
            metrics.first_token.labels(self.endpoint, self.model).observe(now - self.started)
        else:
            between = (now - self.last_token) / len(piece.tokens)
            for _ in piece.tokens:
                metrics.between_tokens.labels(self.endpoint, self.model).observe(between)
        self.last_token = now
        self.completion_tokens += len(piece.tokens)

    def record(self, status: int) -> None:
        """Write the request into log and metrics. status: 499 where the client left."""
        now, metrics = time.perf_counter(), self.state.metrics
        metrics.requests.labels(self.endpoint, self.model, str(status)).inc()
        metrics.seconds.labels(self.endpoint, self.model).observe(now - self.started)
        if status == 499:
            metrics.disconnects.inc()
        if self.model:
            metrics.prompt_tokens.labels(self.model).inc(self.prompt_tokens)
            metrics.cached_tokens.labels(self.model).inc(self.cached_tokens)
            metrics.completion_tokens.labels(self.model).inc(self.completion_tokens)
        times = {
            "queued_seconds": self.entered - self.started if self.entered else None,
            "first_token_seconds": self.first_token - self.started if self.first_token else None,
            "seconds": now - self.started,
        }
        logs.event(
            "request",
            id=self.id,
            key=self.caller.name,
            endpoint=self.endpoint,
            model=self.model,
            status=status,
            stream=self.stream,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            **{name: round(value, 4) for name, value in times.items() if value is not None},
            **(self.log_texts if self.state.settings.log_prompts else {}),
        )
