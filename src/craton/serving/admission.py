"""Who is answered next: a bounded number at once, a bounded queue behind them, and turns for each key."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from craton.serving.errors import ApiError

# Of the running mean of how long a request takes, this much comes from the newest one.
FRESHNESS = 0.2
LONGEST_RETRY = 60

Rank = tuple[int, str]  # (minus the priority, key)


class Gate:
    """Lets `concurrency` requests in; `queue` more wait. Those of the highest priority go first; keys of one priority
    take turns, so that one that sends much delays only itself."""

    def __init__(self, concurrency: int, queue: int) -> None:
        self._free, self._concurrency, self._queue = concurrency, concurrency, queue
        self._waiting: OrderedDict[Rank, deque[asyncio.Future[None]]] = OrderedDict()
        self._mean_seconds = 1.0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(len(line) for line in self._waiting.values())

    @property
    def running(self) -> int:
        """Requests inside."""
        return self._concurrency - self._free

    def close(self, error: ApiError) -> None:
        """Turn away all who wait."""
        for line in self._waiting.values():
            for turn in line:
                if not turn.done():
                    turn.set_exception(error)
        self._waiting.clear()

    @asynccontextmanager
    async def turn(self, key: str, priority: int = 0) -> AsyncIterator[None]:
        """Wait for a turn and hold it. Raises ApiError 429, with a time to wait, where the queue is full."""
        await self._enter((-priority, key))
        started = time.perf_counter()
        try:
            yield
        finally:
            self._mean_seconds += FRESHNESS * (time.perf_counter() - started - self._mean_seconds)
            self._leave()

    async def _enter(self, rank: Rank) -> None:
        if self._free:
            self._free -= 1
            return
        waiting = self.waiting
        if waiting >= self._queue:
            wait = math.ceil((waiting + 1) * self._mean_seconds / self._concurrency)
            raise ApiError(
                429,
                f"{self.running} requests are being answered and {waiting} wait: there is no room for more",
                code="queue_full",
                retry_after=min(max(1, wait), LONGEST_RETRY),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(rank, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave()  # the turn had come just when its owner left
            raise

    def _leave(self) -> None:
        while self._waiting:
            rank = min(self._waiting, key=lambda rank: rank[0])  # of equals the first, which has waited longest
            line = self._waiting.pop(rank)
            turn = line.popleft()
            if line:
                self._waiting[rank] = line  # behind the other keys
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
