"""Documents that hold what a model will be evaluated on: found by runs of words that they share with the evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np

from craton.data.records import Record
from craton.data.words import Hashes, WordHasher, runs

RUN_WORDS: Final = 13
SHORTEST_RUN: Final = 8


class EvaluationOverlap:
    """Finds documents that share a run of 13 words with an evaluation text (Brown et al. 2020, appendix C).

    Of an evaluation text of 8 to 12 words, all words in a row count; a shorter one only where it is the whole document,
    as short questions and the like stand in unrelated text, too.
    """

    def __init__(self, records: Iterable[Record], hasher: WordHasher) -> None:
        found: dict[int, dict[int, str]] = defaultdict(dict)  # run length -> hash of the run -> origin
        self._whole: dict[int, str] = {}
        self.texts = 0
        for record in records:
            for text in strings(record.value):
                hashes = hasher(text)
                if not len(hashes):
                    continue
                self.texts += 1
                n = min(len(hashes), RUN_WORDS)
                into = found[n] if n >= SHORTEST_RUN else self._whole
                for run in runs(hashes, n).tolist():
                    into.setdefault(run, record.origin)
        self._runs = {n: (np.array(sorted(origins), np.uint64), origins) for n, origins in sorted(found.items())}

    def find(self, hashes: Hashes) -> str | None:
        """The origin of the evaluation record that the document with these word hashes overlaps with, if any does."""
        if 0 < len(hashes) < SHORTEST_RUN:
            return self._whole.get(int(runs(hashes, len(hashes))[0]))
        for n, (known, origins) in self._runs.items():
            here = runs(hashes, n)
            places = np.searchsorted(known, here)
            shared = here[known[np.minimum(places, len(known) - 1)] == here]
            if len(shared):
                return origins[int(shared[0])]
        return None


def strings(value: Any) -> Iterator[str]:
    """All texts in a record, whatever its form."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings(part)
