"""From measured answers to one recommendation: what is better beyond chance, what that costs, and what would flip it.

All pairs of ways are compared on the same items, by source document, and the p-values are adjusted for their number
(Holm 1979). Ways that no other way beats are tied, and of tied ways the cheapest in all is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from craton.evaluation.costs import Cost, break_even_interval, cost_of_pass, total
from craton.evaluation.intervals import Estimate, estimate
from craton.evaluation.paired import Difference, minimum_detectable_effect, paired_difference, simultaneous

HORIZONS: Final = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class Measured:
    """A way, measured. scores: [seeds][items], 0 to 1, the same items in the same order for every way. seconds: of each
    item's answer, mean over seeds. setup and update: seconds. diagnostic: explains the others, cannot be chosen."""

    name: str
    scores: Sequence[Sequence[float]]
    seconds: Sequence[float]
    setup: float
    update: float = 0.0
    diagnostic: bool = False

    @property
    def quality(self) -> list[float]:
        """Each item's score, mean over seeds: so a difference between ways includes the luck of the seeds."""
        return [float(value) for value in np.mean(np.asarray(self.scores, float), axis=0)]

    @property
    def seed_spread(self) -> float | None:
        """The standard deviation of the quality between seeds; None for one seed."""
        means = np.mean(np.asarray(self.scores, float), axis=1)
        return float(means.std(ddof=1)) if len(means) > 1 else None

    @property
    def cost(self) -> Cost:
        """What it costs, in seconds of this machine."""
        return Cost(self.setup, float(np.mean(self.seconds)), self.update)


@dataclass(frozen=True)
class Comparison:
    """Two ways: the quality of `better` less that of `other`, with the p-value adjusted for all pairs."""

    better: str
    other: str
    difference: Difference


@dataclass(frozen=True)
class BreakEven:
    """From how many questions on `dear`, with the dearer set-up, is the cheaper in all, with updates; None: never."""

    dear: str
    cheap: str
    queries: float | None
    low: float
    high: float

    @property
    def sentence(self) -> str:
        """It, for people."""
        said = f"{self.dear} pays back its set-up against {self.cheap}"
        if self.queries is None:
            return f"{said} at no number of questions"
        high = "no number that this test can name" if self.high == float("inf") else f"{self.high:,.0f}"
        return f"{said} from {self.queries:,.0f} questions on (95 %: {self.low:,.0f} to {high})"


@dataclass(frozen=True)
class Verdict:
    """The recommendation.

    kind: "clear" where it beats every other way, "tie" where it is the cheapest of several that cannot be told apart.
    best: the highest quality, recommended or not. tied: all that no other way beats, the best one among them.
    break_evens: of the recommended way with each other one, better or worse. detectable: see `detectable_effect`.
    beats_majority: whether it is better than always giving the most frequent answer (None: not measured).
    """

    recommended: str
    kind: str
    best: str
    tied: tuple[str, ...]
    quality: dict[str, Estimate]
    comparisons: tuple[Comparison, ...]
    break_evens: tuple[BreakEven, ...]
    totals: dict[str, dict[int, float]]
    cost_of_pass: dict[str, float]
    detectable: float
    beats_majority: bool | None
    sentence: str
    margin: str
    flips: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        value = asdict(self)
        value["quality"] = {name: one.as_dict() for name, one in self.quality.items()}
        value["comparisons"] = [
            {"better": c.better, "other": c.other, **c.difference.as_dict()} for c in self.comparisons
        ]
        for one in value["break_evens"]:
            one.update({key: None if one[key] == float("inf") else one[key] for key in ("low", "high")})
        value["cost_of_pass"] = {k: None if v == float("inf") else v for k, v in self.cost_of_pass.items()}
        return value


def decide(
    ways: Sequence[Measured],
    clusters: Sequence[str],
    *,
    queries: float,
    updates: float = 0.0,
    level: float = 0.95,
    seed: int = 0,
) -> Verdict:
    """The verdict over `ways`. clusters: each item's source document. queries, updates: of the life to plan for."""
    chosen = [way for way in ways if not way.diagnostic]
    quality = {way.name: estimate(way.quality, clusters, level=level, seed=seed, score=True) for way in ways}
    ranked = sorted(chosen, key=lambda way: -quality[way.name].value)
    best = ranked[0]
    pairs = list(itertools.combinations(ranked, 2))
    raw = [paired_difference(o.quality, b.quality, clusters, level=level, seed=seed, score=True) for b, o in pairs]
    comparisons = [
        Comparison(b.name, o.name, d) for (b, o), d in zip(pairs, simultaneous(raw) if raw else [], strict=True)
    ]
    beaten = {c.other for c in comparisons if (c.difference.p_adjusted or 0.0) < 1 - level}
    tied = [way for way in ranked if way.name not in beaten]
    recommended = min(tied, key=lambda way: (total(way.cost, queries, updates), -quality[way.name].value))
    kind = "clear" if len(tied) == 1 else "tie"
    majority = next((way for way in ways if way.name == "majority"), None)
    beats = None
    if majority is not None:
        gain = paired_difference(majority.quality, recommended.quality, clusters, level=level, seed=seed, score=True)
        beats = gain.value > 0 and gain.p < 1 - level
    break_evens = [
        _break_even(recommended, other, clusters, updates / queries, level, seed)
        for other in ranked
        if other is not recommended
    ]
    detectable = detectable_effect(len(clusters), len(set(clusters)), len(chosen))
    return Verdict(
        recommended=recommended.name,
        kind=kind,
        best=best.name,
        tied=tuple(way.name for way in tied),
        quality=quality,
        comparisons=tuple(comparisons),
        break_evens=tuple(break_evens),
        totals={
            way.name: {horizon: total(way.cost, horizon, updates * horizon / queries) for horizon in HORIZONS}
            for way in chosen
        },
        cost_of_pass={way.name: cost_of_pass(way.cost.marginal, quality[way.name].value) for way in chosen},
        detectable=detectable,
        beats_majority=beats,
        sentence=_sentence(recommended.name, kind, len(tied), queries),
        margin=_margin(recommended.name, best.name, comparisons, kind),
        flips=tuple(_flips(recommended, tied, break_evens, comparisons, detectable, beats)),
    )


def detectable_effect(n: int, groups: int, ways: int = 2) -> float:
    """The smallest difference between two of so many ways that n items in so many documents show four times in five,
    where one is right half the time and they err independently: cautious. As all pairs are tested, each is asked for
    its part of the error (Bonferroni, the first step of Holm). To be said before a run; infinite for too few items."""
    # Items of one document are counted as correlated by a tenth.
    pairs = max(1, ways * (ways - 1) // 2)
    clusters = None if groups == n else groups
    return minimum_detectable_effect(n, clusters=clusters, intra_cluster=0.1, level=1 - 0.05 / pairs)


def _break_even(
    recommended: Measured, other: Measured, clusters: Sequence[str], updates_per_query: float, level: float, seed: int
) -> BreakEven:
    dear, cheap = (recommended, other) if recommended.setup >= other.setup else (other, recommended)
    queries, low, high = break_even_interval(
        dear.cost,
        cheap.cost,
        list(dear.seconds),
        list(cheap.seconds),
        clusters,
        updates_per_query=updates_per_query,
        level=level,
        seed=seed,
    )
    return BreakEven(dear.name, cheap.name, queries, low, high)


def _sentence(recommended: str, kind: str, tied: int, queries: float) -> str:
    if kind == "clear":
        return f"Take {recommended}: it answers better than every other way."
    return (
        f"Tie: {tied} ways cannot be told apart on this test. Take the cheaper: {recommended}, "
        f"the least in all over {queries:,.0f} questions."
    )


def _margin(recommended: str, best: str, comparisons: Sequence[Comparison], kind: str) -> str:
    ours = [c for c in comparisons if recommended in (c.better, c.other)]
    if not ours:
        return "It was the only way that was tried."
    if kind == "clear":
        nearest = min((c for c in ours if c.better == recommended), key=lambda c: c.difference.value)
        d = nearest.difference
        return (
            f"{d.value:+.1%} over {nearest.other}, the next best (adjusted interval {d.low:+.1%} to {d.high:+.1%}, "
            f"p = {d.p_adjusted:.2g})."
        )
    if recommended == best:
        nearest = min((c for c in ours if c.better == best), key=lambda c: c.difference.value)
        d = nearest.difference
        return f"It also scored highest, by {d.value:+.1%} over {nearest.other} ({d.low:+.1%} to {d.high:+.1%})."
    d = next(c.difference for c in ours if c.better == best)
    return (
        f"{best} scored {d.value:+.1%} more, which may be chance (adjusted interval {d.low:+.1%} to {d.high:+.1%}, "
        f"p = {d.p_adjusted:.2g})."
    )


def _flips(
    recommended: Measured,
    tied: Sequence[Measured],
    break_evens: Sequence[BreakEven],
    comparisons: Sequence[Comparison],
    detectable: float,
    beats: bool | None,
) -> list[str]:
    flips, names = [], {way.name for way in tied}
    if beats is False:
        flips.append("nothing here is shown to beat always giving the most frequent answer: think again about the task")
    for one in break_evens:
        other = one.cheap if one.dear == recommended.name else one.dear
        if other not in names or one.queries is None or one.queries == 0:
            continue
        span = f"{_count(one.low)} to {_count(one.high)}"
        side = "fewer" if one.dear == recommended.name else "more"
        flips.append(f"{side} than {_count(one.queries)} questions ({span}): then {other} is cheaper in all")
    if len(tied) > 1:
        flips.append(
            f"more test items: these could show differences of {detectable:.1%} or more, four times in five"
            if np.isfinite(detectable)
            else "more test items, of more documents: these are too few to show any difference"
        )
    others = [c for c in comparisons if c.better == recommended.name and c.other not in names]
    if len(tied) == 1 and others:
        nearest = min(others, key=lambda c: c.difference.value)
        flips.append(
            f"valuing cost so highly that {nearest.difference.value:.1%} more right answers than {nearest.other} "
            "are not worth it"
        )
    if recommended.update and recommended.setup:
        flips.append("facts that change often: each change costs it " + seconds(recommended.update))
    return flips


def seconds(value: float) -> str:
    """Seconds for people."""
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 120 else (f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h")


def _count(value: float) -> str:
    if not np.isfinite(value):
        return "never"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
