"""Which of several models none beats in everything, and which of them to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from craton.compression.footprint import Footprint
from craton.compression.shrink_settings import Target
from craton.evaluation.intervals import Estimate
from craton.evaluation.paired import Difference

BASE: Final = "as it is"


@dataclass(frozen=True)
class Rung:
    """A model of the ladder, measured. quality: on the task's development items; difference: paired with the base's,
    all intervals of the ladder holding at once (none: it is the base). bits_per_byte: of held-out text."""

    label: str
    path: str
    quality: Estimate
    bits_per_byte: Estimate
    footprint: Footprint
    difference: Difference | None = None

    def keeps(self, margin: float) -> bool:
        """Whether it is shown to lose no more than the margin."""
        return self.difference is None or self.difference.low >= -margin

    def dominates(self, other: Rung) -> bool:
        """Whether it is at least as good in quality, bytes and speed, and better in one."""
        ours, theirs = self._standing(), other._standing()
        return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))

    def _standing(self) -> tuple[float, ...]:
        return (self.quality.value, -self.footprint.disk, self.footprint.decode)


@dataclass(frozen=True)
class Choice:
    """chosen: the model to take, the base where none keeps the quality. kept: the labels of those that do."""

    chosen: Rung
    kept: tuple[str, ...]
    sentence: str


def front(rungs: Sequence[Rung]) -> list[Rung]:
    """The Pareto front: the models that none dominates."""
    return [rung for rung in rungs if not any(other.dominates(rung) for other in rungs)]


def choose(rungs: Sequence[Rung], target: Target, margin: float) -> Choice:
    """The model to take: among those shown to keep the quality within the margin, the smallest or the fastest; for the
    target quality, the best answers among all that are smaller than the base, the smaller where they tie."""
    base = rungs[0]
    smaller = [rung for rung in rungs[1:] if rung.footprint.disk < base.footprint.disk]
    kept = [rung for rung in smaller if rung.keeps(margin)]
    labels = tuple(rung.label for rung in kept)
    if target == "quality" and smaller:
        best = max(smaller, key=lambda rung: (rung.quality.value, -rung.footprint.disk))
        return Choice(best, labels, f"Take {best.label}: the best answers of all that are smaller.")
    if not kept:
        return Choice(
            base,
            labels,
            f"Keep the model as it is: no smaller one is shown to keep the quality within {margin:.1%} on "
            f"{base.quality.n} items.",
        )
    if target == "latency":
        fastest = max(kept, key=lambda rung: rung.footprint.decode)
        return Choice(fastest, labels, f"Take {fastest.label}: the fastest that keeps the quality within {margin:.1%}.")
    smallest = min(kept, key=lambda rung: rung.footprint.disk)
    return Choice(smallest, labels, f"Take {smallest.label}: the smallest that keeps the quality within {margin:.1%}.")
