"""Chance that a key alone decides: scenes and prompts are pure functions of (seed, epoch, place)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Draws:
    """A stream of numbers under a key. Of numpy it takes the raw stream of a bit generator alone, which stays the same
    from version to version (see `craton.data.plan.permutation`)."""

    def __init__(self, *key: int) -> None:
        self._stream = np.random.Philox(np.random.SeedSequence(key))

    def many(self, *shape: int) -> NDArray[np.float64]:
        """Numbers from 0 to 1, without 1."""
        raw: NDArray[np.uint64] = self._stream.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(11)) * np.float64(2.0**-53)).reshape(shape)

    def between(self, low: float, high: float) -> float:
        """One number."""
        return low + (high - low) * float(self.many(1)[0])

    def below(self, count: int) -> int:
        """A whole number from 0, less than `count`."""
        return int(self.many(1)[0] * count)

    def chance(self, share: float) -> bool:
        """True in this share of all cases."""
        return float(self.many(1)[0]) < share

    def order(self, count: int) -> list[int]:
        """The numbers below `count`, shuffled."""
        return [int(n) for n in np.argsort(self.many(count), kind="stable")]
