"""The best of some candidates by a development split: successive halving under a budget (Jamieson and Talwalkar 2016).

All candidates answer a few items; the better half goes on to twice as many; the last ones answer all. What an item was
answered earlier is kept, so the whole costs little more than two full evaluations and a few looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Final, Generic, TypeVar

import numpy as np

from craton.errors import DataError
from craton.evaluation.items import Answerer, Item
from craton.evaluation.runner import Row, make_row
from craton.evaluation.tasks import Metric

T = TypeVar("T")

FIRST_LOOK: Final = 8
"""Fewer items than these tell nothing about a candidate."""


@dataclass(frozen=True)
class Budget:
    """What a search may spend: tokens read and written, and seconds. None: no limit."""

    tokens: int | None = None
    seconds: float | None = None


@dataclass
class Trial(Generic[T]):
    """A candidate and how it did. score: the mean over the items that it answered."""

    candidate: T
    rows: list[Row]
    answerer: Answerer

    @property
    def score(self) -> float:
        """The mean score; minus infinity for a candidate that answered nothing."""
        return float(np.mean([row.score for row in self.rows])) if self.rows else float("-inf")

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return sum(row.prompt_tokens + row.completion_tokens for row in self.rows)

    @property
    def seconds(self) -> float:
        """Mean seconds of an answer."""
        return float(np.mean([row.seconds for row in self.rows])) if self.rows else 0.0


@dataclass(frozen=True)
class Search(Generic[T]):
    """What a search found. trials: every candidate, the best first. stopped: "done", "tokens" or "seconds"."""

    best: Trial[T]
    trials: list[Trial[T]]
    tokens: int
    seconds: float
    stopped: str


def successive_halving(
    candidates: Sequence[T],
    make: Callable[[T], Answerer],
    items: Sequence[Item],
    metric: Metric,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> Search[T]:
    """Find the candidate that answers `items` best. The first candidate is the default: it wins ties and is answered
    in full whatever becomes of it, so that the others can be compared with it.

    Raises DataError if there are no items to choose by.
    """
    if not items:
        raise DataError("there are no development items to choose by", remedy="give the task more training items")
    budget = budget or Budget()
    started, spent, stopped = time.perf_counter(), 0, "done"
    order = [items[i] for i in np.random.default_rng(seed).permutation(len(items)).tolist()]
    trials = [Trial(candidate, [], make(candidate)) for candidate in candidates]
    alive = list(trials)
    rounds = max(1, ceil(log2(len(trials)))) if len(trials) > 1 else 0
    sizes = [max(min(FIRST_LOOK, len(order)), len(order) >> (rounds - r)) for r in range(rounds)] + [len(order)]
    for number, size in enumerate(sizes):
        if number:
            keep = max(1, len(alive) // 2) if number < len(sizes) - 1 else min(2, len(alive))
            # Sorting is stable: of equally good candidates, the earlier and so the plainer one stays.
            alive = sorted(alive, key=lambda trial: -trial.score)[:keep]
            if trials[0] not in alive and number == len(sizes) - 1:
                alive.append(trials[0])
        for trial in alive:
            on_progress(f"candidate {trials.index(trial) + 1} of {len(trials)}, {size} items")
            for item in order[len(trial.rows) : size]:
                limit = _exceeded(budget, spent, time.perf_counter() - started)
                if limit is not None and all(one.rows for one in trials[:1]):
                    stopped = limit
                    break
                row = make_row(item, trial.answerer(item), metric)
                trial.rows.append(row)
                spent += row.prompt_tokens + row.completion_tokens
            if stopped != "done":
                break
        if stopped != "done":
            break
    # Only candidates that saw as much as the most seen can win: a lucky first look is no measurement.
    most = max(len(trial.rows) for trial in trials)
    complete = [trial for trial in trials if len(trial.rows) == most]
    best = max(complete, key=lambda trial: trial.score)
    ranked = sorted(trials, key=lambda trial: (trial is not best, -len(trial.rows), -trial.score))
    return Search(best, ranked, spent, time.perf_counter() - started, stopped)


def _exceeded(budget: Budget, tokens: int, seconds: float) -> str | None:
    if budget.tokens is not None and tokens >= budget.tokens:
        return "tokens"
    if budget.seconds is not None and seconds >= budget.seconds:
        return "seconds"
    return None
