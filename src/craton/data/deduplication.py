"""Documents that say what an earlier one said: the same text, or nearly the same by MinHash. The first one stays."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from craton.data.words import Hashes, runs

SHINGLE_WORDS: Final = 5
PERMUTATIONS: Final = 128
THRESHOLD: Final = 0.8
"""Documents are near-duplicates when at least so much of their shingles, together, is common to both (Jaccard)."""
BANDS: Final = 16
"""Bands of 8 rows find 95 % of the pairs at the threshold and 99.4 % at 0.85; what they find is compared in full."""

Signature = npt.NDArray[np.uint32]

_RAW: Final = np.random.Philox(np.random.SeedSequence(3)).random_raw((2, PERMUTATIONS))
_FACTORS, _ADDENDS = _RAW[0] | np.uint64(1), _RAW[1]
_ROWS_AT_ONCE: Final = 4096


class ExactDuplicates:
    """Remembers digests of texts (`craton.data.documents.digest`) and where each was first seen."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def add(self, digest: bytes, origin: str) -> str | None:
        """The origin of the first text with this digest; None if this is the first."""
        first = self._first.get(digest)
        if first is None:
            self._first[digest] = origin
        return first


def signature(hashes: Hashes) -> Signature | None:
    """The MinHash signature of a text's word hashes (Broder 1997); None for a text without words.

    [128] for each of 128 random orders of all shingles (runs of 5 words; a shorter text is one) the first of this
    text's. Two signatures agree at a place with the probability that is the texts' Jaccard similarity.
    """
    if not len(hashes):
        return None
    shingles = runs(hashes, min(SHINGLE_WORDS, len(hashes)))
    least = np.full(PERMUTATIONS, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(shingles), _ROWS_AT_ONCE):
        part = shingles[start : start + _ROWS_AT_ONCE, None]
        # Multiply-shift hashing (Dietzfelbinger et al. 1997); the upper half of the product is the random one.
        orders = ((part * _FACTORS + _ADDENDS) >> np.uint64(32)).astype(np.uint32)
        np.minimum(least, orders.min(axis=0), out=least)
    return least


class NearDuplicates:
    """Finds the earlier text that a text nearly repeats, by locality-sensitive hashing of signatures (Leskovec et al.,
    Mining of Massive Datasets, ch. 3). Some 3 kB of memory for each text that stays."""

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self._threshold = threshold
        self._origins: list[str] = []
        self._signatures = np.zeros((1024, PERMUTATIONS), np.uint32)
        self._buckets: dict[int, list[int]] = {}  # key of a band -> texts

    def add(self, signature: Signature, origin: str) -> str | None:
        """The origin of the most similar earlier text if it is similar enough; else None, and this text is kept."""
        keys = _band_keys(signature)
        candidates = {text for key in keys for text in self._buckets.get(key, ())}
        if candidates:
            texts = np.array(sorted(candidates))
            similarity = (self._signatures[texts] == signature).mean(axis=1)
            best = int(similarity.argmax())
            if similarity[best] >= self._threshold:
                return self._origins[texts[best]]
        number = len(self._origins)
        if number == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.zeros_like(self._signatures)])
        self._signatures[number] = signature
        self._origins.append(origin)
        for key in keys:
            self._buckets.setdefault(key, []).append(number)
        return None


def _band_keys(signature: Signature) -> list[int]:
    """A key for each band. Of this process only, and two bands may share one: candidates are compared anyway."""
    data = signature.tobytes()
    size = len(data) // BANDS
    return [hash((band, data[band * size : (band + 1) * size])) for band in range(BANDS)]
