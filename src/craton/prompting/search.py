"""The best of some candidates by a development split: successive halving under a budget (Jamieson and Talwalkar 2016).

All candidates answer a few items; the better half goes on to twice as many; the last ones answer all. What an item was
answered earlier is kept, so the whole costs little more than two full evaluations and a few looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Final, Generic, Protocol, TypeVar

import numpy as np

from craton.errors import DataError
from craton.evaluation.items import Answerer, Item
from craton.evaluation.runner import Row, make_row
from craton.evaluation.tasks import Metric

T = TypeVar("T")

FIRST_LOOK: Final = 8
"""Fewer items than these tell nothing about a candidate."""


class Budget:
    """What one search may spend, and what it has spent: tokens read and written, and seconds since this was made."""

    def __init__(self, tokens: int | None = None, seconds: float | None = None) -> None:
        """tokens, seconds: the limits (none: no limit)."""
        self._most_tokens, self._most_seconds = tokens, seconds
        self._began = time.perf_counter()
        self.tokens = 0

    def spend(self, tokens: int) -> None:
        """Count tokens that were read or written."""
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        """The time since this was made."""
        return time.perf_counter() - self._began

    @property
    def exceeded(self) -> str | None:
        """Which limit is reached: "tokens", "seconds" or none."""
        if self._most_tokens is not None and self.tokens >= self._most_tokens:
            return "tokens"
        if self._most_seconds is not None and self.seconds >= self._most_seconds:
            return "seconds"
        return None


class CountingAnswerer(Answerer, Protocol):
    """An answerer that knows the tokens that were read and written for all its answers so far."""

    @property
    def spent(self) -> int: ...


@dataclass
class Trial(Generic[T]):
    """A candidate and how it did on the items that it answered, the first ones of one order that all share."""

    candidate: T
    rows: list[Row]
    answerer: CountingAnswerer

    @property
    def score(self) -> float:
        """The mean score."""
        return self.score_of(len(self.rows))

    def score_of(self, count: int) -> float:
        """The mean score of the first `count` items."""
        return float(np.mean([row.score for row in self.rows[:count]]))


@dataclass(frozen=True)
class Search(Generic[T]):
    """What a search found. trials: the candidates that were asked anything, the best first. tokens, seconds: what was
    spent. stopped: "done", "tokens" or "seconds"."""

    best: Trial[T]
    trials: list[Trial[T]]
    tokens: int
    seconds: float
    stopped: str


def successive_halving(
    candidates: Sequence[T],
    make: Callable[[T], CountingAnswerer],
    items: Sequence[Item],
    metric: Metric,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> Search[T]:
    """Find the candidate that answers `items` best. The first candidate is the default: it wins ties, is never dropped,
    and answers before the others in each round, so that whatever ends the search, they are compared with it on the same
    items. A budget ends the search at the first answer that reaches it.

    Raises DataError if there are no items to choose by.
    """
    if not items:
        raise DataError("there are no development items to choose by", remedy="give the task more training items")
    budget = budget or Budget()
    order = [items[i] for i in np.random.default_rng(seed).permutation(len(items)).tolist()]
    trials = [Trial(candidate, [], make(candidate)) for candidate in candidates]
    default, others = trials[0], trials[1:]
    rounds = max(1, ceil(log2(len(trials)))) if others else 0
    sizes = [max(min(FIRST_LOOK, len(order)), len(order) >> (rounds - r)) for r in range(rounds)] + [len(order)]

    def ask(trial: Trial[T], size: int) -> str | None:
        """Let a candidate answer the first `size` items; gives the limit that ended it."""
        on_progress(f"candidate {trials.index(trial) + 1} of {len(trials)}, {size} items")
        for item in order[len(trial.rows) : size]:
            # One answer of the default is there in any case, or nothing would be the best.
            if default.rows and (limit := budget.exceeded) is not None:
                return limit
            before = trial.answerer.spent
            trial.rows.append(make_row(item, trial.answerer(item), metric))
            budget.spend(trial.answerer.spent - before)
        return None

    alive, stopped = list(trials), None
    for number, size in enumerate(sizes):
        if number:
            keep = max(1, len(alive) // 2) if number < len(sizes) - 1 else min(2, len(alive))
            # Sorting is stable: of equally good candidates, the earlier and so the plainer one stays.
            alive = sorted(alive, key=lambda trial: -trial.score_of(sizes[number - 1]))[:keep]
            alive = [default, *(trial for trial in alive if trial is not default)]
        stopped = next((limit for trial in alive if (limit := ask(trial, size)) is not None), None)
        if stopped is not None:
            break
    # Of the others, only those that saw as much as the most seen can win, and by the items that the default answered
    # too: a lucky first look is no measurement.
    most = max((len(trial.rows) for trial in others), default=0)
    measured = [trial for trial in others if len(trial.rows) == most] if most >= sizes[0] else []
    best = max([default, *measured], key=lambda trial: trial.score_of(most or len(order)))
    asked = [trial for trial in trials if trial.rows]
    ranked = sorted(asked, key=lambda trial: (trial is not best, -len(trial.rows), -trial.score))
    return Search(best, ranked, budget.tokens, budget.seconds, stopped or "done")
