"""Maximal marginal relevance: hits that are about the question and not about each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def maximal_marginal_relevance(
    relevance_N: NDArray[np.float32], vectors_ND: NDArray[np.float32], k: int, trade_off: float
) -> list[int]:
    """The places of the k candidates to keep, best first (Carbonell and Goldstein, 1998).

    Each next one has the greatest trade_off * relevance - (1 - trade_off) * its likeness to what was already taken.
    trade_off 1 is the order of relevance, 0 is variety alone. relevance_N is divided by its greatest first (and raised
    to 0 if there are negative ones), so that BM25 can be weighed against cosines too; vectors_ND are unit vectors. The
    earlier of two equals is taken.
    """
    if not len(relevance_N):
        return []
    low, high = min(0.0, float(relevance_N.min())), float(relevance_N.max())
    relevance_N = (relevance_N - low) / (high - low) if high > low else np.ones_like(relevance_N)
    chosen: list[int] = []
    nearest_N = np.zeros(len(relevance_N), dtype=np.float32)
    for _ in range(min(k, len(relevance_N))):
        value_N = trade_off * relevance_N - (1 - trade_off) * nearest_N
        value_N[chosen] = -np.inf
        best = int(value_N.argmax())
        likeness_N = vectors_ND @ vectors_ND[best]
        nearest_N = likeness_N if not chosen else np.maximum(nearest_N, likeness_N)
        chosen.append(best)
    return chosen
