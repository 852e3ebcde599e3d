"""What an arm of a comparison costs: to set up, per query, and per update of what it knows; and when it pays back.

All of it in one unit, seconds or money: never add the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

from craton.errors import UsageError
from craton.evaluation.paired import paired_difference


@dataclass(frozen=True)
class Cost:
    """setup: once, before the first query (training, indexing, search for prompts). marginal: of each query. update:
    of each time that the facts change (a document re-indexed is cheap, a model trained anew is not)."""

    setup: float
    marginal: float
    update: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("setup", self.setup), ("marginal", self.marginal), ("update", self.update)):
            if not isfinite(value) or value < 0:
                raise UsageError(f"a cost of {value}: costs are finite and not negative", where=name)


def total(cost: Cost, queries: float, updates: float = 0) -> float:
    """What so many queries and updates cost, set-up included."""
    return cost.setup + queries * cost.marginal + updates * cost.update


def cost_of_pass(marginal: float, quality: float) -> float:
    """What a right answer costs: a query's cost over the share of them that pass (Erol et al. 2025, arXiv 2504.13359,
    where wrong ones are asked again until one passes). Infinite where none passes. quality: 0 to 1."""
    if not 0 <= quality <= 1:
        raise UsageError(f"a quality of {quality}: it is a share, between 0 and 1")
    return marginal / quality if quality else inf


def break_even(a: Cost, b: Cost, *, updates_per_query: float = 0.0) -> float | None:
    """The number of queries from which the arm with the dearer set-up is the cheaper one in all.

    None: never, as its queries are no cheaper. 0: at once, as neither set-up is dearer. updates_per_query: how many
    updates come with a query, on average. Raises UsageError for fewer than none.
    """
    if updates_per_query < 0:
        raise UsageError(f"{updates_per_query} updates per query")
    dear, cheap = (a, b) if a.setup >= b.setup else (b, a)
    saved = cheap.marginal - dear.marginal + updates_per_query * (cheap.update - dear.update)
    return _queries(dear.setup - cheap.setup, saved)


def break_even_interval(
    a: Cost,
    b: Cost,
    a_marginals: Sequence[float],
    b_marginals: Sequence[float],
    clusters: Sequence[str] | None = None,
    *,
    updates_per_query: float = 0.0,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float | None, float, float]:
    """The `break_even` of two arms and its interval, from what each query cost: (value or None, low, high or infinite).

    marginals[n]: of the same queries, in order; the costs' own `marginal` is not looked at. clusters: each query's
    source document. Each set-up and update is taken as it was. As the break-even falls steadily with what a query
    saves, its interval is that of the saving (`paired_difference`), turned over: a saving that may be none gives an
    infinite high, one that is surely none an infinite low too. Percentiles of resampled quotients would not do: they
    jump where a resampled saving passes through 0. Raises UsageError for fewer updates than none.
    """
    if updates_per_query < 0:
        raise UsageError(f"{updates_per_query} updates per query")
    first = a.setup >= b.setup
    (dear, spent), (cheap, saved) = (
        ((a, a_marginals), (b, b_marginals)) if first else ((b, b_marginals), (a, a_marginals))
    )
    updates = updates_per_query * (cheap.update - dear.update)
    gap = paired_difference(spent, saved, clusters, level=level, seed=seed, score=False)
    extra = dear.setup - cheap.setup
    value, low, high = (_queries(extra, saving + updates) for saving in (gap.value, gap.high, gap.low))
    return value, inf if low is None else low, inf if high is None else high


def _queries(extra: float, saved: float) -> float | None:
    if extra == 0:
        return 0.0
    return extra / saved if saved > 0 else None
