"""Who goes first: the line of those who wait, and whose pieces a step reads."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

# What a step reads of prompts beside the answers that it writes, so that these wait no longer than for so many tokens:
# two whole pieces beside 64 answers.
STEP_TOKENS = 640

# What a pass costs besides its tokens, in tokens: a short prompt is not a free one.
PASS_TOKENS = 32

# How much of what was read before a step copies into slots, in tokens, before it lets nobody else in: about as long as
# a piece takes.
STEP_COPIES = 4096


class Ranked(Protocol):
    """What waits or runs."""

    @property
    def rank(self) -> tuple[int, int]:
        """Minus its priority, and the number in which it came: the least goes first."""


class Reader(Ranked, Protocol):
    """What reads a prompt."""

    @property
    def last_read(self) -> int:
        """The number of the step that read its last piece."""

    @property
    def piece(self) -> int:
        """How many tokens its next piece has."""


R = TypeVar("R", bound=Ranked)
P = TypeVar("P", bound=Reader)


class Line(Generic[R]):
    """Those who wait, by rank: what gave up its place stands before all that came later."""

    def __init__(self) -> None:
        self._waiting: list[R] = []

    def __iter__(self) -> Iterator[R]:
        return iter(self._waiting.copy())

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, one: R) -> None:
        """Put it where its rank is."""
        bisect.insort(self._waiting, one, key=lambda waiting: waiting.rank)

    def remove(self, one: R) -> None:
        """Take it out."""
        self._waiting.remove(one)


def next_pieces(reading: Sequence[P], written: int) -> list[P]:
    """Whose next piece is read in a step that takes `written` tokens of answers: of the highest priority, those who
    have waited for the longest time, while there are tokens left; one in any case. A piece is never cut to what is
    left, because a prompt's arithmetic must not depend on its company."""
    left = STEP_TOKENS - written
    chosen: list[P] = []
    for one in sorted(reading, key=lambda r: (r.rank[0], r.last_read, r.rank)):
        left -= PASS_TOKENS + one.piece
        if chosen and left < 0:
            break
        chosen.append(one)
    return chosen
