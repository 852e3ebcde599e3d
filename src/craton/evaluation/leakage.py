"""Test items that a model has seen in training: the same text, a run of 13 words, or nearly the same by MinHash.

What is found is dropped from the training side, always: a test set is sealed, and losing its hardest or easiest items
would change what it measures.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

import numpy as np

from craton.data.decontamination import SHORTEST_RUN, EvaluationOverlap
from craton.data.deduplication import BANDS, THRESHOLD, Signature, signature
from craton.data.documents import digest
from craton.data.records import Record
from craton.data.words import WordHasher, words
from craton.errors import UsageError

Leak = Literal["exact", "overlap_13", "near"]
T = TypeVar("T")

SHORTEST: Final = SHORTEST_RUN
"""Texts of fewer words leak only if they are the same: "What is 3 + 4?" is near to much that it does not give away."""


@dataclass
class LeakageReport:
    """Which training texts give a test text away. The counts are of training texts, each under the first of exact,
    overlap_13 and near that holds. pairs: (training index, test index, kind), by rising training index."""

    exact: int = 0
    overlap_13: int = 0
    near: int = 0
    pairs: list[tuple[int, int, Leak]] = field(default_factory=list)

    @property
    def leaks(self) -> int:
        """How many training texts leak."""
        return len(self.pairs)

    def kept(self, train: Sequence[T]) -> list[T]:
        """The training items without those that leak; whatever stands in the texts' order."""
        dropped = {index for index, _, _ in self.pairs}
        return [item for index, item in enumerate(train) if index not in dropped]

    def as_dict(self) -> dict[str, object]:
        """The JSON form."""
        return {"exact": self.exact, "overlap_13": self.overlap_13, "near": self.near, "pairs": self.pairs}


def find_leaks(train: Sequence[str], test: Sequence[str], *, threshold: float = THRESHOLD) -> LeakageReport:
    """The training texts that hold, or nearly are, a test text; the first such test text is named.

    exact: the same but for case, white space, composition and punctuation around it. overlap_13: a shared run of 13
    words, or all words of a test text of 8 to 12 (Brown et al. 2020, appendix C). near: so much of both texts' runs of
    5 words in common (Jaccard, as MinHash estimates it; Broder 1997). Texts of fewer than 8 words leak by exact only.
    Give what tells items apart, without what all prompts repeat: a shared instruction would make leaks of all.
    Raises UsageError for a threshold that is no share.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"a threshold of {threshold}: it is a share, above 0 and at most 1")
    hasher = WordHasher()
    same: dict[bytes, int] = {}
    for number, text in enumerate(test):
        same.setdefault(_digest(text), number)
    long = [number for number, text in enumerate(test) if len(words(text)) >= SHORTEST]
    overlap = EvaluationOverlap((Record({"text": test[number]}, str(number)) for number in long), hasher)
    near = _Near(((number, signature(hasher(test[number]))) for number in long), threshold)

    report = LeakageReport()
    for index, text in enumerate(train):
        found = same.get(_digest(text))
        if found is not None:
            report.exact += 1
            report.pairs.append((index, found, "exact"))
            continue
        hashes = hasher(text)
        if len(hashes) < SHORTEST:
            continue
        origin = overlap.find(hashes)
        if origin is not None:
            report.overlap_13 += 1
            report.pairs.append((index, int(origin), "overlap_13"))
            continue
        found = near.find(signature(hashes))
        if found is not None:
            report.near += 1
            report.pairs.append((index, found, "near"))
    return report


class _Near:
    """Finds the text most similar to another one. Unlike `deduplication.NearDuplicates` it keeps nothing of what it is
    asked: each training text is compared with the test texts alone."""

    def __init__(self, signatures: Iterable[tuple[int, Signature | None]], threshold: float) -> None:
        self._threshold = threshold
        self._signatures: dict[int, Signature] = {}
        self._buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        for number, own in signatures:
            if own is not None:
                self._signatures[number] = own
                for key in _bands(own):
                    self._buckets[key].append(number)

    def find(self, own: Signature | None) -> int | None:
        """The number of the most similar text, if it is similar enough; of equally similar ones the first."""
        if own is None:
            return None
        candidates = sorted({number for key in _bands(own) for number in self._buckets.get(key, ())})
        if not candidates:
            return None
        shares = [float(np.mean(self._signatures[number] == own)) for number in candidates]
        best = int(np.argmax(shares))
        return candidates[best] if shares[best] >= self._threshold else None


def _bands(own: Signature) -> list[tuple[int, bytes]]:
    data = own.tobytes()
    size = len(data) // BANDS
    return [(band, data[band * size : (band + 1) * size]) for band in range(BANDS)]


def _digest(text: str) -> bytes:
    # Punctuation within the text may be all that differs ("3 - 4" and "3 + 4"), so only that around it goes.
    folded = text.casefold().strip()
    first, last = 0, len(folded)
    while first < last and _edge(folded[first]):
        first += 1
    while first < last and _edge(folded[last - 1]):
        last -= 1
    return digest(folded[first:last] or folded)


def _edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")
