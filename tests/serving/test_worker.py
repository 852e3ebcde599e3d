"""The worker with an engine of a few lines: turns, cancelling, faults, and that nobody waits for ever."""

from __future__ import annotations

import asyncio

import pytest

from craton.inference.engine import Request, Token
from craton.serving.errors import ApiError
from craton.serving.worker import EngineWorker


class Text:
    """An answer of as many tokens as its prompt says."""

    def __init__(self, request: Request) -> None:
        self.length, self.tokens = request.prompt[0], []
        self.finish_reason = self.error = None
        self.cached_tokens = 0

    def cancel(self) -> None:
        self.finish_reason = self.finish_reason or "cancelled"


class Engine:
    """Adds a token to each answer in a step, and raises where a prompt says so."""

    def __init__(self) -> None:
        self.running: list[Text] = []
        self.most = self.steps = 0

    def submit(self, request: Request) -> Text:
        if request.prompt[0] < 0:
            raise ValueError("never")
        self.running.append(Text(request))
        return self.running[-1]

    def step(self) -> None:
        self.running = [text for text in self.running if text.finish_reason is None]
        self.most, self.steps = max(self.most, len(self.running)), self.steps + 1
        for text in self.running:
            if text.length == 13:
                raise RuntimeError("a fault")
            text.tokens.append(Token(0, "x"))
            if len(text.tokens) == text.length:
                text.finish_reason = "length"


def run(work, **options) -> Engine:
    engine = Engine()

    async def body() -> None:
        worker = EngineWorker(**options)
        try:
            await asyncio.wait_for(work(worker, engine), 20)
            await asyncio.sleep(0.05)
            assert worker.running == 0
        finally:
            await worker.close()

    asyncio.run(body())
    return engine


async def text(answer) -> str:
    return "".join([token.text async for piece in answer for token in piece.tokens])


def test_more_answers_than_places_all_come_and_requests_take_turns():
    ended: list[str] = []

    async def read(answer, name: str) -> None:
        await text(answer)
        ended.append(name)

    async def work(worker, engine) -> None:
        batch = [worker.submit(lambda: engine, Request([20]), "batch") for _ in range(12)]
        single = worker.submit(lambda: engine, Request([2]), "single")
        await asyncio.gather(*(read(a, "batch") for a in batch), read(single, "single"))

    engine = run(work, at_once=3)
    assert engine.most == 3
    assert ended.index("single") <= 6


def test_a_higher_priority_goes_before_all_that_waits():
    ended: list[str] = []

    async def read(answer, name: str) -> None:
        await text(answer)
        ended.append(name)

    async def work(worker, engine) -> None:
        low = [worker.submit(lambda: engine, Request([20]), f"low {i}") for i in range(5)]
        high = worker.submit(lambda: engine, Request([20], priority=3), "high")
        await asyncio.gather(*(read(answer, "low") for answer in low), read(high, "high"))

    run(work, at_once=1)
    assert ended.index("high") <= 1


def test_what_waits_is_taken_up_when_all_that_ran_was_cancelled():
    async def work(worker, engine) -> None:
        answers = [worker.submit(lambda: engine, Request([10**6]), str(i)) for i in range(6)]
        last = worker.submit(lambda: engine, Request([3]), "last")
        await asyncio.sleep(0.02)
        for answer in answers:
            answer.cancel()
        assert await text(last) == "xxx"

    run(work, at_once=2)


def test_a_fault_ends_the_answers_of_its_engine_and_others_go_on():
    async def work(worker, engine) -> None:
        other = Engine()
        bad = worker.submit(lambda: engine, Request([13]), "a")
        good = worker.submit(lambda: other, Request([50]), "b")
        refused = worker.submit(lambda: engine, Request([-1]), "c")
        for answer in (bad, refused):
            with pytest.raises(ApiError) as caught:
                await text(answer)
            assert caught.value.status == 500
        assert await text(good) == "x" * 50
        assert await text(worker.submit(lambda: engine, Request([4]), "d")) == "xxxx"

    run(work)


def test_a_reader_that_lags_gets_an_error_and_the_engine_stops():
    async def work(worker, engine) -> None:
        answer = worker.submit(lambda: engine, Request([10**9]), "a")
        cut: list[bool] = []
        answer.on_lag = lambda: cut.append(True)
        while not cut:
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="not read as fast"):
            await text(answer)
        await asyncio.sleep(0.05)
        steps = engine.steps
        await asyncio.sleep(0.05)
        assert engine.steps == steps

    run(work, send_buffer=100)


def test_long_work_is_done_between_steps():
    order: list[str] = []

    async def work(worker, engine) -> None:
        def parts():
            for number in range(5):
                order.append(f"part, step {engine.steps}")
                yield number

        answer = worker.submit(lambda: engine, Request([10**9]), "a")
        assert await worker.work(parts()) == [0, 1, 2, 3, 4]
        answer.cancel()

        def broken():
            yield 1
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await worker.work(broken())
        assert await worker.call(lambda: 7) == 7

    run(work)
    assert len(set(order)) == 5
