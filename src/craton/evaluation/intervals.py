"""How far a measured figure may be from the true one: an interval for every kind of figure that Craton reports.

Items of one cluster (questions on one document, samples of one prompt) resemble each other, so that 100 items of 10
documents say less than 100 documents would; every interval here takes whole clusters as its units (Miller 2024, arXiv
2411.00640). And the plain normal interval fails below some hundred items (Bowyer et al. 2025, arXiv 2503.01747): it
promises no doubt at all where all answers are right. So each kind of figure has its own:

- right or wrong, without clusters: Wilson's interval, or the exact one of Clopper and Pearson for up to 30 items and
  where none or all are right. Of n items without a failure the true rate of failure is at most about 3 / n, as the
  "rule of three" has it (`zero_failures_bound`); the upper end of the two-sided interval is about 3.7 / n.
- scores between 0 and 1, or clusters of right and wrong: Wilson's interval with the effective number of items, that of
  coin tosses which would vary as the mean does (Korn and Graubard 1998), and Student's quantiles.
- any other mean, or a quotient of sums: the studentised bootstrap of clusters (Hall 1988); Student's for fewer than 8.
- quantiles: order statistics, which assume nothing of the distribution; with clusters, the bootstrap.
- any other statistic: the bias-corrected and accelerated bootstrap of clusters (Efron 1987), widened for small numbers
  as Hesterberg 2015 advises.

One cluster says nothing of how clusters differ: its interval is the whole range, 0 to 1 for scores, else infinite.
Everything is a pure function of its arguments, the seed among them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import exp, inf, isfinite, lgamma, log, log1p, sqrt
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from craton.errors import DataError, UsageError

Array = npt.NDArray[np.float64]
Numbers = Sequence[float] | npt.NDArray[np.generic]
Clusters = Sequence[Hashable] | npt.NDArray[np.generic]

EXACT_UP_TO: Final = 30
STUDENT_BELOW: Final = 8
"""Of fewer clusters the resamples are few, and some do not vary: their studentised means mean nothing."""

_NORMAL: Final = NormalDist()
_COUNTS_AT_ONCE: Final = 1 << 21
_JACKKNIFE_GROUPS: Final = 200


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that holds the true one with the probability asked for (95 % unless said).

    n: items. clusters: independent groups of them, n where there are none. method: how the interval was made.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    method: str

    def as_dict(self) -> dict[str, float | int | str | None]:
        """The JSON form; null for an end that is infinite, as JSON has no infinity."""
        return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in asdict(self).items()}


def estimate(
    values: Numbers,
    clusters: Clusters | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
    score: bool | None = None,
) -> Estimate:
    """The mean of the values, one for each item, and its interval.

    clusters: which group each item belongs to. score: whether the values cannot leave 0 to 1; by default, whether none
    does. Say False for seconds, which may all be below 1 by chance. Raises DataError for no values and for one that is
    not finite, UsageError for unequal lengths or an impossible level.
    """
    values_N = checked_numbers(values)
    number_N, C = cluster_numbers(clusters, len(values_N))
    check_level(level)
    n, mean = len(values_N), float(values_N.mean())
    outside_N = (values_N < 0) | (values_N > 1)
    if score is None:
        score = not outside_N.any()
    elif score and outside_N.any():
        place = int(outside_N.argmax())
        raise DataError(f"score {values_N[place]} is not between 0 and 1", where=f"item {place}")
    binary = score and bool(((values_N == 0) | (values_N == 1)).all())
    if binary and n == C:
        low, high, method = _proportion(round(float(values_N.sum())), n, level)
    elif C == 1:
        low, high, method = (0.0, 1.0, "one cluster") if score else (-inf, inf, "one cluster")
    elif score:
        low, high, method = _score_interval(mean, standard_error(*cluster_sums(values_N, number_N, C)), C, level)
    else:
        sums_C, sizes_C = cluster_sums(values_N, number_N, C)
        low, high, method = studentised(sums_C, sizes_C, level=level, seed=seed, resamples=resamples)
    return Estimate(mean, low, high, n, C, method)


def estimate_ratio(
    numerators: Numbers,
    denominators: Numbers,
    clusters: Clusters | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """The sum of the numerators over that of the denominators, as bits per byte is one of bits and of bytes.

    Raises DataError for negative denominators or where all are 0, and as `estimate` does.
    """
    over_N, under_N = checked_numbers(numerators), checked_numbers(denominators)
    if len(over_N) != len(under_N):
        raise UsageError(f"{len(over_N)} numerators for {len(under_N)} denominators")
    if (under_N < 0).any() or not under_N.any():
        raise DataError("denominators that are negative, or all 0")
    number_N, C = cluster_numbers(clusters, len(over_N))
    check_level(level)
    (sums_C, _), (sizes_C, _) = (cluster_sums(side_N, number_N, C) for side_N in (over_N, under_N))
    if C == 1:
        low, high, method = -inf, inf, "one cluster"
    else:
        low, high, method = studentised(sums_C, sizes_C, level=level, seed=seed, resamples=resamples)
    return Estimate(float(over_N.sum() / under_N.sum()), low, high, len(over_N), C, method)


def estimate_quantile(
    values: Numbers,
    q: float,
    clusters: Clusters | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """The q-quantile of the values (0.5: the median, 0.95: the latency that 1 of 20 requests exceeds).

    Without clusters the interval is one of order statistics, valid for any distribution; an end that the items are too
    few to bound is infinite (below 72 items, the upper one of q = 0.95 at level 0.95). Raises as `estimate` does.
    """
    values_N = checked_numbers(values)
    number_N, C = cluster_numbers(clusters, len(values_N))
    check_level(level)
    if not 0 < q < 1:
        raise UsageError(f"a quantile of {q}: it lies between 0 and 1")
    n, value = len(values_N), float(np.quantile(values_N, q))
    if n == C:
        low, high = _order_statistics(np.sort(values_N), q, level)
        return Estimate(value, low, high, n, C, "order statistics")

    def quantile(rows: Array) -> float:
        return float(np.quantile(rows, q))

    # A jackknife does not see the spread of quantiles, so these are not accelerated.
    resampled = [quantile(values_N[chosen]) for chosen in _resampled_items(number_N, C, seed, resamples)]
    low, high, method = _bootstrap_interval(value, np.array(resampled), C, 0.0, level, (-inf, inf))
    return Estimate(value, low, high, n, C, method if method != "bca" else "bootstrap")


def estimate_statistic(
    items: Sequence[Any] | npt.NDArray[Any],
    statistic: Callable[[Any], float],
    clusters: Clusters | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
    bounds: tuple[float, float] = (-inf, inf),
) -> Estimate:
    """A statistic of all items together that is no mean: macro F1, BLEU, calibration error.

    items: an array of rows, or any sequence. statistic: the figure of some of them, given as an array if they are one
    and else as a list; it is called some 2,200 times, so let it work on counts and not on texts (`bleu_counts`,
    `class_metrics.encoded`). bounds: what the statistic cannot leave. Where no resample differs the bootstrap says
    nothing, and the interval is the bounds. Raises DataError where the statistic is not finite on all items or on more
    than one in twenty resamples, and as `estimate` does.
    """
    n = len(items)
    if not n:
        raise DataError("there is nothing to estimate from")
    number_N, C = cluster_numbers(clusters, n)
    check_level(level)
    value = float(statistic(items))
    if not isfinite(value):
        raise DataError(f"the statistic of all items is {value}")
    if C == 1:
        return Estimate(value, *bounds, n, C, "one cluster")

    def of(chosen: npt.NDArray[np.intp]) -> float:
        return float(statistic(items[chosen] if isinstance(items, np.ndarray) else [items[i] for i in chosen.tolist()]))

    resampled = np.array([of(chosen) for chosen in _resampled_items(number_N, C, seed, resamples)])
    defined = np.isfinite(resampled)
    if defined.mean() < 0.95:
        raise DataError(
            f"the statistic is undefined on {len(defined) - int(defined.sum())} of {len(defined)} resamples",
            remedy="use a statistic that is defined on any part of the items, or more items",
        )
    acceleration = _acceleration(np.array([of(kept) for kept in _without_each_group(number_N, C, seed)]))
    low, high, method = _bootstrap_interval(value, resampled[defined], C, acceleration, level, bounds)
    return Estimate(value, low, high, n, C, method)


def zero_failures_bound(n: int, level: float = 0.95) -> float:
    """The rate of failure that n items without one leave possible, one-sided: about 3 / n (Hanley 1983)."""
    check_level(level)
    if n < 1:
        raise DataError("there is nothing to estimate from")
    return float(-np.expm1(log1p(-level) / n))


def studentised(sums_C: Array, sizes_C: Array, *, level: float, seed: int, resamples: int) -> tuple[float, float, str]:
    """The interval of sum(sums) / sum(sizes) over at least two clusters, and its method."""
    C = len(sums_C)
    mean, spread = float(sums_C.sum() / sizes_C.sum()), standard_error(sums_C, sizes_C)
    if spread == 0:
        return mean, mean, "no variation"
    if C >= STUDENT_BELOW:
        # What a cluster adds to each sum that a resample's mean and its standard error take.
        gaps_C = sums_C - mean * sizes_C
        parts_C5 = np.stack([gaps_C, sizes_C, gaps_C**2, gaps_C * sizes_C, sizes_C**2], axis=1)
        totals = [counts_RC @ parts_C5 for counts_RC in _counts(C, seed, resamples)]
        gap_R, size_R, gap2_R, both_R, size2_R = np.concatenate(totals).T
        with np.errstate(divide="ignore", invalid="ignore"):
            shift_R = gap_R / size_R
            variance_R = gap2_R - 2 * shift_R * both_R + shift_R**2 * size2_R
            spread_R = np.sqrt(np.maximum(variance_R, 0) * C / (C - 1)) / size_R
            still_R = ~(spread_R > 1e-3 * spread)  # a resample without the few clusters that vary says nothing
            t_R = np.where(still_R, np.sign(shift_R) * inf, shift_R / spread_R)
        t_R = np.sort(np.where(np.isnan(t_R), 0.0, t_R))
        least, most = (t_R[min(int(share * len(t_R)), len(t_R) - 1)] for share in ((1 - level) / 2, (1 + level) / 2))
        if isfinite(least) and isfinite(most):
            return float(mean - most * spread), float(mean - least * spread), "bootstrap-t"
    reach = student_quantile((1 + level) / 2, C - 1) * spread
    return mean - reach, mean + reach, "student"


def standard_error(sums_C: Array, sizes_C: Array) -> float:
    """Of sum(sums) / sum(sizes) over at least two independent clusters; 0 where what varies is rounding only."""
    C, total = len(sums_C), sizes_C.sum()
    gaps_C = sums_C - sums_C.sum() / total * sizes_C
    spread = sqrt(float(gaps_C @ gaps_C) * C / (C - 1)) / total
    return 0.0 if spread <= 1e-14 * float(np.abs(sums_C).sum() / total) else float(spread)


def checked_numbers(values: Numbers) -> Array:
    """The values as an array. Raises DataError if there are none or one is not finite, and names it by its index."""
    values_N = np.asarray(values, np.float64)
    if values_N.ndim != 1:
        raise UsageError(f"values of shape {values_N.shape}, where one for each item is wanted")
    if not len(values_N):
        raise DataError("there is nothing to estimate from")
    wrong_N = ~np.isfinite(values_N)
    if wrong_N.any():
        place = int(wrong_N.argmax())
        raise DataError(
            f"value {values_N[place]} is not a finite number",
            where=f"item {place}",
            remedy="score a missing answer as 0, or leave the item out of all arms",
        )
    return values_N


def cluster_numbers(clusters: Clusters | None, n: int) -> tuple[npt.NDArray[np.intp], int]:
    """[n] the number of each item's cluster, and how many clusters there are; without any, each item is one."""
    if clusters is None:
        return np.arange(n), n
    if len(clusters) != n:
        raise UsageError(f"{len(clusters)} clusters named for {n} items")
    numbers: dict[Hashable, int] = {}
    coded = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    return np.array(coded, np.intp), len(numbers)


def check_level(level: float) -> None:
    """Raises UsageError for a level that is no probability."""
    if not 0 < level < 1:
        raise UsageError(f"a level of {level}: it lies between 0 and 1, as 0.95 does")


@lru_cache(maxsize=256)  # all pairs of a comparison ask for the same few
def student_quantile(p: float, df: float) -> float:
    """The value below which Student's t with df degrees of freedom stays with probability p."""
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -student_quantile(1 - p, df)
    # t^2 / (df + t^2) is beta(1/2, df/2); its complement is the one that stays exact where t is large.
    rest = _beta_quantile(2 * (1 - p), df / 2, 0.5)
    return sqrt(df * (1 - rest) / rest) if rest > 0 else inf


def normal_quantile(p: float) -> float:
    """The value below which a standard normal variable stays with probability p."""
    return _NORMAL.inv_cdf(p)


def _proportion(right: int, n: int, level: float) -> tuple[float, float, str]:
    if n <= EXACT_UP_TO or right in (0, n):
        tail = (1 - level) / 2
        low = _beta_quantile(tail, right, n - right + 1) if right else 0.0
        high = _beta_quantile(1 - tail, right + 1, n - right) if right < n else 1.0
        return low, high, "clopper-pearson"
    return *_wilson(right / n, n, normal_quantile((1 + level) / 2)), "wilson"


def _score_interval(mean: float, spread: float, clusters: int, level: float) -> tuple[float, float, str]:
    if spread == 0:
        # Nothing varied, so nothing is known of the spread: each cluster counts as a single toss.
        if mean in (0.0, 1.0):
            return _proportion(round(mean) * clusters, clusters, level)
        effective = float(clusters)
    else:
        effective = mean * (1 - mean) / spread**2
    return *_wilson(mean, effective, student_quantile((1 + level) / 2, clusters - 1)), "wilson, effective n"


def _wilson(mean: float, n: float, z: float) -> tuple[float, float]:
    scale = 1 + z * z / n
    middle = (mean + z * z / (2 * n)) / scale
    reach = z / scale * sqrt(max(mean * (1 - mean), 0.0) / n + (z / (2 * n)) ** 2)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def cluster_sums(values_N: Array, number_N: npt.NDArray[np.intp], clusters: int) -> tuple[Array, Array]:
    """[clusters] the sum of each cluster's values, and how many there are."""
    sums_C = np.bincount(number_N, values_N, clusters).astype(np.float64)
    return sums_C, np.bincount(number_N, minlength=clusters).astype(np.float64)


def _counts(C: int, seed: int, resamples: int) -> Iterator[Array]:
    # [some resamples, C] how often each cluster was drawn, until there are enough.
    if resamples < 1:
        raise UsageError(f"{resamples} resamples")
    rng = np.random.default_rng(seed)
    rows = max(1, _COUNTS_AT_ONCE // C)
    for first in range(0, resamples, rows):
        R = min(rows, resamples - first)
        drawn = rng.integers(0, C, (R, C)) + np.arange(R)[:, None] * C
        yield np.bincount(drawn.ravel(), minlength=R * C).reshape(R, C).astype(np.float64)


def _members(number_N: npt.NDArray[np.intp], C: int) -> list[npt.NDArray[np.intp]]:
    order = np.argsort(number_N, kind="stable")
    return np.split(order, np.cumsum(np.bincount(number_N, minlength=C))[:-1])


def _resampled_items(
    number_N: npt.NDArray[np.intp], C: int, seed: int, resamples: int
) -> Iterator[npt.NDArray[np.intp]]:
    # The items of as many clusters as there are, drawn with repetition.
    if resamples < 1:
        raise UsageError(f"{resamples} resamples")
    rng = np.random.default_rng(seed)
    members = _members(number_N, C) if len(number_N) > C else None
    for _ in range(resamples):
        drawn = rng.integers(0, C, C)
        yield drawn if members is None else np.concatenate([members[c] for c in drawn.tolist()])


def _without_each_group(number_N: npt.NDArray[np.intp], C: int, seed: int) -> Iterator[npt.NDArray[np.intp]]:
    # The items that stay when one cluster is left out; of many clusters, one of 200 groups of them.
    group_C = np.random.default_rng(seed).permutation(C) % _JACKKNIFE_GROUPS
    group_N = group_C[number_N]
    for group in range(min(C, _JACKKNIFE_GROUPS)):
        yield np.flatnonzero(group_N != group)


def _acceleration(left_out_G: Array) -> float:
    left_out_G = left_out_G[np.isfinite(left_out_G)]
    if len(left_out_G) < 2:
        return 0.0
    gaps_G = left_out_G.mean() - left_out_G
    scale = float(np.sum(gaps_G**2)) ** 1.5
    return float(np.sum(gaps_G**3)) / (6 * scale) if scale > 0 else 0.0


def _bootstrap_interval(
    value: float, resampled_R: Array, C: int, acceleration: float, level: float, bounds: tuple[float, float]
) -> tuple[float, float, str]:
    if np.ptp(resampled_R) <= 1e-12 * abs(value):
        return *bounds, "no variation"
    below = (np.sum(resampled_R < value) + np.sum(resampled_R == value) / 2) / len(resampled_R)
    bias = normal_quantile(min(max(float(below), 1 / len(resampled_R)), 1 - 1 / len(resampled_R)))
    # Resamples of C clusters vary less than the statistic does, by (C - 1) / C, and their tails are thinner.
    reach = sqrt(C / (C - 1)) * student_quantile((1 + level) / 2, C - 1)
    shares = []
    for z in (-reach, reach):
        scale = 1 - acceleration * (bias + z)
        # An extreme acceleration turns the order over: then the ends are the farthest resamples.
        shares.append(_NORMAL.cdf(bias + (bias + z) / scale) if scale > 0 else float(z > 0))
    low, high = np.quantile(resampled_R, shares)
    return max(bounds[0], float(low)), min(bounds[1], float(high)), "bca"


def _order_statistics(sorted_N: Array, q: float, level: float) -> tuple[float, float]:
    n, tail = len(sorted_N), (1 - level) / 2
    # below[k]: the probability that at most k of n items lie below the quantile.
    steps = np.log(np.arange(n, 0, -1) / np.arange(1, n + 1)) + log(q) - log1p(-q)
    below = np.cumsum(np.exp(n * log1p(-q) + np.concatenate([[0.0], np.cumsum(steps)])))
    first = int(np.searchsorted(below, tail, side="right"))  # the lower end has so many items at or below it
    last = int(np.searchsorted(below, 1 - tail)) + 1
    return float(sorted_N[first - 1]) if first else -inf, float(sorted_N[last - 1]) if last <= n else inf


def _beta_quantile(p: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _beta_cdf(middle, a, b) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _beta_cdf(x: float, a: float, b: float) -> float:
    # The regularised incomplete beta function by its continued fraction (DLMF 8.17.22), evaluated as Lentz 1976 does.
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # beyond, the fraction of the complement converges
        return 1 - _beta_cdf(1 - x, b, a)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for part in (even, odd):
            d = 1 / _nonzero(1 + part * d)
            c = _nonzero(1 + part / c)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value


def _nonzero(x: float) -> float:
    return x if abs(x) > 1e-300 else 1e-300
