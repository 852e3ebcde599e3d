"""The one thread that touches models: it takes requests from an inbox, steps engines, and hands tokens to asyncio.

Everything that torch does happens here, so no lock is needed around an engine. All that is asked of one is `submit`,
`step` and `cancel`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from craton.inference.engine import FinishReason, Request, Token
from craton.serving.errors import ApiError, from_any

log = logging.getLogger(__name__)

T = TypeVar("T")


class RunningText(Protocol):
    """What the worker reads of an engine's generation."""

    tokens: list[Token]
    finish_reason: FinishReason | None
    error: Any
    cached_tokens: int

    def cancel(self) -> None:
        """Stop before the next step."""


class SteppedEngine(Protocol):
    """What the worker needs of an engine."""

    def submit(self, request: Request) -> Any:
        """Queue a request."""

    def step(self) -> None:
        """Advance every running request."""


@dataclass(frozen=True)
class Piece:
    """News of an answer: tokens that were added, and text that belongs behind the last one sent before."""

    tokens: Sequence[Token] = ()
    tail: str = ""
    finish_reason: FinishReason | None = None
    error: ApiError | None = None
    cached_tokens: int = 0

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


class Answer:
    """One answer as the asyncio side sees it. Iterate it for its pieces; leave it with `cancel`. counts_prompt: whether
    its prompt is not that of an answer before it. on_lag: called where it is read too slowly, and so ends."""

    def __init__(self, worker: EngineWorker, limit: int) -> None:
        self._worker, self._limit = worker, limit
        self._pieces: deque[Piece] = deque()
        self._news = asyncio.Event()
        self._waiting_tokens = 0
        self.ended = False
        self.counts_prompt = True
        self.on_lag: Callable[[], None] = lambda: None

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            while not self._pieces:
                self._news.clear()
                await self._news.wait()
            piece = self._pieces.popleft()
            self._waiting_tokens -= len(piece.tokens)
            if piece.error is not None:
                raise piece.error
            yield piece
            if piece.last:
                return

    def cancel(self) -> None:
        """Stop it within a step of the engine; harmless once it has ended."""
        if not self.ended:
            self._worker.cancel(self)

    def fail(self, error: ApiError) -> None:
        """Stop it and end it with an error, which goes before what was not yet read."""
        if not self.ended:
            self.cancel()
            self._pieces.clear()
            self._waiting_tokens = 0
            self._take(Piece(error=error))

    def receive(self, piece: Piece) -> None:
        """News from the worker, in the thread of the event loop. A reader that lags too far behind is cut off."""
        if self.ended:
            return
        if self._waiting_tokens + len(piece.tokens) > self._limit:
            self.fail(ApiError(503, "the answer was not read as fast as it was written", code="slow_reader"))
            self.on_lag()
            return
        self._take(piece)

    def _take(self, piece: Piece) -> None:
        self._waiting_tokens += len(piece.tokens)
        self.ended = piece.last
        self._pieces.append(piece)
        self._news.set()


@dataclass
class _Live:
    """A generation in an engine, and how much of it has been delivered."""

    answer: Answer
    engine: SteppedEngine
    generation: RunningText
    sent: int = 0
    last_text: int = 0  # characters of the last token that was delivered


@dataclass
class _Submission:
    answer: Answer
    engine: Callable[[], SteppedEngine]
    prompt: Request


@dataclass
class _Work:
    """A long piece of work in small parts, between two of which engines step."""

    parts: Iterator[Any]
    future: Future[list[Any]]
    done: list[Any] = field(default_factory=list)


class EngineWorker:
    """Runs engines in a thread of their own. Made in the event loop that its answers are read in."""

    def __init__(self, *, send_buffer: int = 2048, at_once: int = 8) -> None:
        """at_once: how many answers are in engines. Those of the highest priority get the places, and different
        requests of one priority take turns for them."""
        self._loop = asyncio.get_running_loop()
        self._send_buffer, self._at_once = send_buffer, at_once
        self._waiting: OrderedDict[str, deque[_Submission]] = OrderedDict()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: list[_Live] = []
        self._works: deque[_Work] = deque()
        self._answers: set[Answer] = set()
        self._thread = threading.Thread(target=self._run, name="craton-engine")
        self._closed = False
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that are being written or wait for their turn in an engine."""
        return len(self._answers)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, engine: Callable[[], SteppedEngine], prompt: Request, of: str) -> Answer:
        """Queue a prompt of the HTTP request `of` for the engine that `engine` gives in the worker's thread. Errors
        come out of the answer."""
        answer = Answer(self, self._send_buffer)
        self._answers.add(answer)
        submission = _Submission(answer, engine, prompt)
        self._inbox.put(lambda: self._waiting.setdefault(of, deque()).append(submission))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Stop an answer within one step."""
        self._inbox.put(lambda: self._cancel(answer))

    async def call(self, function: Callable[[], T]) -> T:
        """Run something short in the worker's thread, between two steps."""

        def once() -> Iterator[T]:
            yield function()

        return (await self.work(once()))[0]

    async def work(self, parts: Iterator[T]) -> list[T]:
        """Run something long in the worker's thread, one part between two steps; gives the parts' results."""
        future: Future[list[T]] = Future()
        self._inbox.put(lambda: self._works.append(_Work(parts, future)))
        return await asyncio.wrap_future(future)

    def fail_all(self, error: ApiError) -> None:
        """End every answer with an error."""
        for answer in list(self._answers):
            answer.fail(error)

    def abandon(self) -> None:
        """Let the thread end after the step that it is in."""
        self._inbox.put(None)

    async def close(self) -> None:
        """Stop the thread after the step that it is in, and wait for that."""
        self.abandon()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while not self._closed:
            try:
                self._take_inbox(wait=not (self._live or self._works or self._waiting))
                self._admit()
                if self._works:
                    self._do_part()
                self._step()
                self._deliver()
            except Exception as error:  # a fault of this file's: nobody may wait for ever, and the thread lives on
                refusal = self._refusal(error)
                lost, self._live = self._live, []
                for live in lost:
                    live.generation.cancel()
                self._send([(live.answer, Piece(error=refusal)) for live in lost])

    def _take_inbox(self, *, wait: bool) -> None:
        while True:
            try:
                order = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if order is None:
                self._closed = True
                return
            order()

    def _admit(self) -> None:
        while self._waiting and len(self._live) < self._at_once:
            # Of the highest priority, the request that has waited longest.
            of = max(self._waiting, key=lambda of: self._waiting[of][0].prompt.priority)
            line = self._waiting.pop(of)
            self._submit(line.popleft())
            if line:
                self._waiting[of] = line  # behind the other requests

    def _submit(self, submission: _Submission) -> None:
        try:
            engine = submission.engine()
            generation = engine.submit(submission.prompt)
        except Exception as error:
            self._send([(submission.answer, Piece(error=self._refusal(error)))])
            return
        self._live.append(_Live(submission.answer, engine, generation))

    def _cancel(self, answer: Answer) -> None:
        for live in self._live:
            if live.answer is answer:
                live.generation.cancel()
                return
        for of, line in self._waiting.items():
            for submission in line:
                if submission.answer is answer:
                    line.remove(submission)
                    if not line:
                        del self._waiting[of]
                    self._send([(answer, Piece(finish_reason="cancelled"))])
                    return

    def _do_part(self) -> None:
        work = self._works.popleft()
        if work.future.cancelled():
            return  # nobody waits for it any more
        try:
            work.done.append(next(work.parts))
        except StopIteration:
            if work.future.set_running_or_notify_cancel():
                work.future.set_result(work.done)
        except Exception as error:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(error)
        else:
            self._works.append(work)

    def _step(self) -> None:
        for engine in {id(live.engine): live.engine for live in self._live}.values():
            try:
                engine.step()
            except Exception as error:
                # The step's answers are lost, and only these: each is cancelled, and the engine goes on without them.
                refusal = self._refusal(error)
                lost = [live for live in self._live if live.engine is engine]
                for live in lost:
                    live.generation.cancel()
                self._live = [live for live in self._live if live.engine is not engine]
                self._send([(live.answer, Piece(error=refusal)) for live in lost])

    def _deliver(self) -> None:
        news = [(live.answer, piece) for live in self._live if (piece := _news(live)) is not None]
        ended = {id(answer) for answer, piece in news if piece.last}
        self._live = [live for live in self._live if id(live.answer) not in ended]
        self._send(news)

    def _send(self, news: list[tuple[Answer, Piece]]) -> None:
        if news:
            self._loop.call_soon_threadsafe(self._hand_out, news)

    def _hand_out(self, news: list[tuple[Answer, Piece]]) -> None:
        for answer, piece in news:
            answer.receive(piece)
            if piece.last:
                self._answers.discard(answer)

    def _refusal(self, error: Exception) -> ApiError:
        refusal = from_any(error)
        if refusal.status >= 500:
            log.error("the engine failed", exc_info=error)
        return refusal


def _news(live: _Live) -> Piece | None:
    generation = live.generation
    new = list(generation.tokens[live.sent :])
    # Where an answer ends, what was held back is added to its last token, which may have been sent without it.
    tail = generation.tokens[live.sent - 1].text[live.last_text :] if live.sent else ""
    if not new and not tail and generation.finish_reason is None:
        return None
    live.sent += len(new)
    live.last_text = len(generation.tokens[-1].text) if generation.tokens else 0
    if generation.error is not None:
        return Piece(error=from_any(generation.error))
    return Piece(new, tail, generation.finish_reason, cached_tokens=generation.cached_tokens)
