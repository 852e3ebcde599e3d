"""Whether one arm is better than another on the same items: the mean difference, its interval, a test, and what could
be shown at all, to be stated before the run.

Pairing removes what the items have in common, most of the noise: two arms of 80 and 83 % on 300 questions cannot be
told apart by their own intervals, and often can by the questions on which they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite, sqrt
from typing import Final

import numpy as np

from craton.errors import UsageError
from craton.evaluation.intervals import (
    Array,
    Clusters,
    Numbers,
    check_level,
    checked_numbers,
    cluster_numbers,
    cluster_sums,
    normal_quantile,
    standard_error,
    student_quantile,
    studentised,
)

RESAMPLES: Final = 10_000
ENUMERATED: Final = 16
"""Of so many clusters that differ, all ways to flip their signs are tried."""

HALF_ITEM: Final = 0.5
"""The exact test of counts needs so many items more than the smooth formula says; with it the power at the stated
effect is 0.78 to 0.86 where 0.8 is asked for, from 20 items on, and without it 0.75 to 0.79."""

_COUNTED: Final = 200_000_000  # steps of counting sums exactly, at most
_SIGNS_AT_ONCE: Final = 1 << 21


@dataclass(frozen=True)
class Difference:
    """b minus a, in mean over paired items, with its interval and two-sided p-value.

    level: of the interval; of all intervals together once `simultaneous` has set p_adjusted.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    clusters: int
    p_adjusted: float | None = None
    level: float = 0.95

    def as_dict(self) -> dict[str, float | int | None]:
        """The JSON form; null for an end that is infinite."""
        return {k: v if v is None or isfinite(v) else None for k, v in asdict(self).items()}


def paired_difference(
    a: Numbers,
    b: Numbers,
    clusters: Clusters | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
    score: bool | None = None,
) -> Difference:
    """How much higher b's values are than a's, item by item.

    Interval: for scores between 0 and 1 (score says so; by default, whether all values are), Wald's with one more item
    won and one more lost (Bonett and Price 2012), and with the effective number of items under clusters; so arms that
    never differed are not thereby proven equal. For other values, the studentised bootstrap of clusters. p: the share
    of all ways to swap the arms within clusters that give as large a difference, exact where the sums are whole (then,
    without clusters, McNemar's exact test) or few clusters differ, else by `resamples` random ones, the actual one
    counted among them. 1 where nothing differs. It tests that the arms are interchangeable.
    Raises DataError for no values and for one that is not finite, UsageError for unequal lengths.
    """
    a_N, b_N = checked_numbers(a), checked_numbers(b)
    if len(a_N) != len(b_N):
        raise UsageError(f"{len(a_N)} values of one arm for {len(b_N)} of the other")
    number_N, C = cluster_numbers(clusters, len(a_N))
    check_level(level)
    n, gaps_N = len(a_N), b_N - a_N
    if score is None:
        score = bool((np.minimum(a_N, b_N) >= 0).all() and (np.maximum(a_N, b_N) <= 1).all())
    mean = float(gaps_N.mean())
    sums_C, sizes_C = cluster_sums(gaps_N, number_N, C)
    if score:
        low, high = _score_interval(gaps_N, sums_C, sizes_C, level)
    elif C == 1:
        low, high = -inf, inf
    else:
        low, high, _ = studentised(sums_C, sizes_C, level=level, seed=seed, resamples=resamples)
    return Difference(mean, low, high, _sign_flip(sums_C, seed, resamples), n, C, level=level)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number, in their order (Holm 1979): reject where these are below the level, and
    the chance of any false rejection stays below it."""
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if not 0 <= p_values[place] <= 1:
            raise UsageError(f"a p-value of {p_values[place]}")
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = most
    return adjusted


def simultaneous(differences: Sequence[Difference]) -> list[Difference]:
    """The differences as one family of comparisons: p_adjusted by Holm, and intervals that all hold at once.

    Each half of an interval is stretched as Student's quantile grows when the error that the level leaves is shared out
    equally (Bonferroni). Holm rejects a little more than these intervals exclude 0.
    """
    adjusted = holm([difference.p for difference in differences])
    return [_widened(d, len(differences), p) for d, p in zip(differences, adjusted, strict=True)]


def minimum_detectable_effect(
    n: int,
    *,
    clusters: int | None = None,
    intra_cluster: float = 0.0,
    sd: float | None = None,
    baseline: float | None = None,
    discordance: float | None = None,
    power: float = 0.8,
    level: float = 0.95,
) -> float:
    """The smallest true mean difference that n paired items show with probability `power`; infinite if none would.

    sd: the standard deviation of the items' differences, from a pilot. Else the answers are right or wrong: discordance
    is the share of items on which the arms differ, and where it is not known, that of arms which err independently of
    each other, the first being right at the rate `baseline` (0.5 unless said). Real arms err together, so this is
    cautious. clusters: how many equal groups the items form; intra_cluster: the correlation of differences within one,
    which makes n items worth n / (1 + (n / clusters - 1) intra_cluster).
    The formula is Connor's 1987 for McNemar's test, with a correction for the whole steps of counts.
    """
    groups = n if clusters is None else clusters
    if not 1 <= groups <= n:
        raise UsageError(f"{n} items in {groups} clusters")
    check_level(level)
    for name, share in (("intra_cluster", intra_cluster), ("baseline", baseline), ("discordance", discordance)):
        if share is not None and not 0 <= share <= 1:
            raise UsageError(f"{name} is {share}: it lies between 0 and 1")
    if not 0 < power < 1 or (sd is not None and not 0 <= sd < inf):
        raise UsageError("power lies between 0 and 1, and sd is not negative")
    if groups == 1:
        return inf
    design = sqrt((1 + (n / groups - 1) * intra_cluster) / n)
    if sd is not None:
        return (student_quantile((1 + level) / 2, groups - 1) + student_quantile(power, groups - 1)) * sd * design
    if clusters is None:
        reach, gain = normal_quantile((1 + level) / 2), normal_quantile(power)
    else:
        reach, gain = student_quantile((1 + level) / 2, groups - 1), student_quantile(power, groups - 1)
    rate = 0.5 if baseline is None else baseline

    def shown(effect: float) -> bool:
        differ = discordance
        if differ is None:
            other = rate + effect if rate <= 0.5 else rate - effect
            differ = rate * (1 - other) + other * (1 - rate)
        # Of the variance under no difference, and under the effect itself.
        needed = reach * sqrt(differ) + gain * sqrt(max(differ - effect**2, 0.0))
        return effect >= needed * design + HALF_ITEM / n

    low, high = 0.0, discordance if discordance is not None else max(rate, 1 - rate)
    if not shown(high):
        return inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def equivalent(difference: Difference, margin: float) -> bool:
    """Whether the whole interval lies within the margin on both sides: then the arms are as good as each other for
    anyone to whom less than the margin does not matter. At level 0.95 this errs at most once in 40 times."""
    if margin <= 0:
        raise UsageError(f"a margin of {margin}: no two arms are equivalent by it")
    return -margin < difference.low and difference.high < margin


def _score_interval(gaps_N: Array, sums_C: Array, sizes_C: Array, level: float) -> tuple[float, float]:
    n, C = len(gaps_N), len(sums_C)
    if n == C:
        items, reach = float(n), normal_quantile((1 + level) / 2)
    elif C == 1:
        return -1.0, 1.0
    else:
        # As many independent items as would vary as the clusters' mean does; at worst each cluster is one.
        spread = standard_error(sums_C, sizes_C)
        items = min(float(n), float(gaps_N.var(ddof=1)) / spread**2) if spread else float(C)
        reach = student_quantile((1 + level) / 2, C - 1)
    mean = float(gaps_N.mean())
    middle = mean * items / (items + 2)
    square = (float(gaps_N @ gaps_N) / n * items + 2) / (items + 2)
    half = reach * sqrt((square - middle**2) / (items + 2))
    return max(-1.0, min(mean, middle - half)), min(1.0, max(mean, middle + half))


def _sign_flip(sums_C: Array, seed: int, resamples: int) -> float:
    sums = np.abs(sums_C[np.abs(sums_C) > 1e-12 * np.abs(sums_C).max()])
    K = len(sums)
    if not K:
        return 1.0
    reached = abs(float(sums_C.sum())) - 1e-9 * float(sums.sum())  # as large, but for rounding
    whole = np.rint(sums)
    if whole.min() >= 1 and np.abs(sums - whole).max() < 1e-9 and K * whole.sum() <= _COUNTED:
        return _counted(whole.astype(np.int64), reached)
    if K <= ENUMERATED:
        flipped = np.zeros(1)
        for part in sums:
            flipped = np.concatenate([flipped - part, flipped + part])
        return float(np.mean(np.abs(flipped) >= reached))
    rng, hits = np.random.default_rng(seed), 0
    rows = max(1, _SIGNS_AT_ONCE // K)
    for first in range(0, resamples, rows):
        signs = rng.integers(0, 2, (min(rows, resamples - first), K), np.int8)
        # Of signs 0 and 1 in place of -1 and 1, twice the sum less the sum of all is the flipped sum.
        hits += int(np.sum(np.abs(2 * (signs @ sums) - sums.sum()) >= reached))
    return (hits + 1) / (resamples + 1)


def _counted(sums: np.ndarray[tuple[int, ...], np.dtype[np.int64]], reached: float) -> float:
    # The distribution of the sum of those with a plus sign, one cluster after the other.
    total = int(sums.sum())
    share = np.zeros(total + 1)
    share[0] = 1.0
    so_far = 0
    for part in sums.tolist():
        so_far += part
        share[part : so_far + 1] += share[: so_far - part + 1].copy()
        share[: so_far + 1] /= 2
    flipped = 2 * np.arange(total + 1) - total
    return min(1.0, float(share[np.abs(flipped) >= reached].sum()))


def _widened(difference: Difference, comparisons: int, p_adjusted: float) -> Difference:
    df = difference.clusters - 1
    stretch = 1.0
    if df > 0:
        tail = (1 - difference.level) / 2
        stretch = student_quantile(1 - tail / comparisons, df) / student_quantile(1 - tail, df)
    return replace(
        difference,
        low=difference.value - stretch * (difference.value - difference.low),
        high=difference.value + stretch * (difference.high - difference.value),
        p_adjusted=p_adjusted,
    )
