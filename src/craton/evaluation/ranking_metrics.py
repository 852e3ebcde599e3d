"""How well one query's ranking finds what is relevant. The figures of trec_eval, one query at a time; average them with
`craton.evaluation.intervals.estimate`.

A ranking lists ids, the best first. What is relevant: a set of ids, or a mapping of ids to gains, of which those above
0 are relevant. Raises DataError where nothing is relevant (no ranking could score) or an id is ranked twice.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np

from craton.errors import DataError, UsageError

Id = Hashable
Relevant = Collection[Id] | Mapping[Id, float]


def recall_at(ranked_ids: Sequence[Id], relevant: Relevant, k: int) -> float:
    """The share of the relevant ids that are among the first k."""
    gains = _checked(ranked_ids, relevant, k)
    return sum(id in gains for id in ranked_ids[:k]) / len(gains)


def reciprocal_rank(ranked_ids: Sequence[Id], relevant: Relevant) -> float:
    """1 / the rank of the first relevant id; 0 if none is ranked."""
    gains = _checked(ranked_ids, relevant)
    return next((1 / rank for rank, id in enumerate(ranked_ids, 1) if id in gains), 0.0)


def ndcg_at(ranked_ids: Sequence[Id], relevant: Relevant, k: int) -> float:
    """The gains of the first k, each divided by log2(1 + rank), over what the best ranking would have; Järvelin and
    Kekäläinen 2002. Gains are linear, as in trec_eval."""
    gains = _checked(ranked_ids, relevant, k)
    best = sorted(gains.values(), reverse=True)
    return _discounted([gains.get(id, 0.0) for id in ranked_ids[:k]]) / _discounted(best[:k])


def average_precision(ranked_ids: Sequence[Id], relevant: Relevant) -> float:
    """The mean, over all relevant ids, of the precision at the rank of each; 0 for those that are not ranked."""
    gains = _checked(ranked_ids, relevant)
    found, total = 0, 0.0
    for rank, id in enumerate(ranked_ids, 1):
        if id in gains:
            found += 1
            total += found / rank
    return total / len(gains)


def _discounted(gains: Sequence[float]) -> float:
    return float(np.sum(np.asarray(gains, np.float64) / np.log2(np.arange(2, len(gains) + 2))))


def _checked(ranked_ids: Sequence[Id], relevant: Relevant, k: int = 1) -> dict[Id, float]:
    # The gains above 0.
    if k < 1:
        raise UsageError(f"k is {k}: at least one id has to be looked at")
    if isinstance(relevant, Mapping):
        gains = {id: float(gain) for id, gain in relevant.items() if gain > 0}
    else:
        gains = dict.fromkeys(relevant, 1.0)
    if not gains:
        raise DataError("a query has nothing relevant", remedy="leave it out, or judge by its abstention")
    if len(set(ranked_ids)) != len(ranked_ids):
        raise DataError("an id is ranked twice", remedy="keep the first place of each id")
    return gains
