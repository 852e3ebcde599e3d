"""Mixtures: several sources with weights, of which each epoch draws exactly its share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from craton.data.example import Example
from craton.data.plan import Indices, permutation
from craton.data.shards import Shards, WindowSource
from craton.errors import UsageError

if TYPE_CHECKING:
    from craton.data.loader import ExampleSource


@dataclass(frozen=True)
class Share:
    """What an epoch draws from one part. passes: how often it goes through the part; below 1, the rest comes later."""

    examples: int
    drawn: int

    @property
    def passes(self) -> float:
        """Times that an epoch reads this part."""
        return self.drawn / self.examples


class Mixture:
    """Sources as one, drawn from in proportion to their weights. An epoch has as many examples as all parts together.

    Each part is an endless stream of passes, each in an order of its own, of which an epoch takes the next piece: a
    part that is drawn from less than once an epoch is read to its end in later ones, before anything repeats.

    Raises UsageError for no parts, empty ones, weights that are not positive, and windows of different lengths.
    """

    def __init__(self, parts: Sequence[tuple[ExampleSource, float]]) -> None:
        if not parts or any(len(source) == 0 for source, _ in parts):
            raise UsageError("a mixture needs parts, and each part an example")
        rows = {source.row for source, _ in parts}
        if len(rows) > 1:
            raise UsageError("the parts of a mixture must have windows of one length, or none of them windows")
        self.row: int | None = rows.pop()
        self._sources = [source for source, _ in parts]
        self.lengths: npt.NDArray[np.int64] = np.concatenate([source.lengths for source in self._sources])
        sizes = [len(source) for source in self._sources]
        self._first = np.cumsum([0, *sizes])
        drawn = exact_shares(sum(sizes), [weight for _, weight in parts])
        self.shares = tuple(Share(size, n) for size, n in zip(sizes, drawn, strict=True))

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Example:
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._sources[part][index - int(self._first[part])]

    def order(self, seed: int, epoch: int, shuffle: bool) -> Indices:
        """The examples of an epoch in their order: a pure function of its arguments."""
        drawn = np.concatenate([self._piece(part, seed, epoch, shuffle) for part in range(len(self.shares))])
        return drawn[permutation(len(drawn), seed, epoch)] if shuffle else drawn

    def _piece(self, part: int, seed: int, epoch: int, shuffle: bool) -> Indices:
        size, drawn = self.shares[part].examples, self.shares[part].drawn
        begin, end = epoch * drawn, (epoch + 1) * drawn
        first = begin // size
        passes = range(first, -(-end // size))
        # The last 1 keeps these keys apart from (seed, epoch), as numpy ignores zeros at the end of a key.
        orders = [permutation(size, seed, part, one, 1) if shuffle else np.arange(size) for one in passes]
        stream = np.concatenate(orders) if orders else np.zeros(0, np.int64)
        return stream[begin - first * size : end - first * size] + self._first[part]


def exact_shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to `weights` into whole numbers that add up to it (Hamilton's method: those with
    the largest remainders are rounded up). Raises UsageError for weights that are not positive numbers."""
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UsageError(f"weights must be positive numbers (got {', '.join(f'{weight:g}' for weight in weights)})")
    fractions = [Fraction(weight) for weight in weights]
    exact = [total * fraction / sum(fractions) for fraction in fractions]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def window_source(shards: Shards, context: int) -> ExampleSource:
    """The windows of shards for training: those of a mixture are drawn by its weights, which count tokens."""
    if len(shards.parts) == 1:
        return WindowSource(shards, context)
    return Mixture([(WindowSource(part.shards, context), part.weight) for part in shards.parts])
