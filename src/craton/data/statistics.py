"""What a body of texts is like: lengths, scripts, shares of letters, words, exact duplicates; all in one pass."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

import numpy as np

QUANTILES: Final = {"least": 0, "5 %": 5, "median": 50, "95 %": 95, "most": 100}
_KANA_HAN: Final = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana"}


class Lengths:
    """Lengths of many things, four bytes for each."""

    def __init__(self) -> None:
        self._lengths = array("I")

    def add(self, length: int) -> None:
        """Take one more."""
        self._lengths.append(length)

    @property
    def total(self) -> int:
        """Their sum."""
        return int(np.frombuffer(self._lengths, dtype=np.uint32).sum(dtype=np.int64)) if self._lengths else 0

    def quantiles(self) -> dict[str, int]:
        """By name the length that this share of the things does not exceed; empty where there are none."""
        if not self._lengths:
            return {}
        lengths = np.frombuffer(self._lengths, dtype=np.uint32)
        values = np.percentile(lengths, list(QUANTILES.values()), method="inverted_cdf")
        return {name: int(value) for name, value in zip(QUANTILES, values, strict=True)}


class TextStatistics:
    """Counts of characters, words and scripts, and which texts have been there before."""

    def __init__(self) -> None:
        self.texts = self.characters = self.letters = self.words = self.duplicates = 0
        self.lengths = Lengths()
        self.scripts: Counter[str] = Counter()
        self._invisible = 0
        self._seen: set[bytes] = set()

    def add(self, parts: Iterable[str], beside: Iterable[str] = ()) -> bool:
        """Take the texts of one record; gives whether the same ones, in this order, were there before. beside: names of
        what else tells records apart, and is no text (pictures)."""
        digest = hashlib.blake2b(repr(tuple(beside)).encode(), digest_size=12)
        length = 0
        for part in parts:
            digest.update(part.encode("utf-8", "surrogatepass") + b"\xff")  # a byte that no text has
            length += len(part)
            self._count(part)
        self.texts += 1
        self.lengths.add(length)
        key = digest.digest()
        repeated = key in self._seen
        self._seen.add(key)
        self.duplicates += repeated
        return repeated

    @property
    def mean_word_length(self) -> float:
        """Visible characters in a word, as white space separates words."""
        return (self.characters - self._invisible) / max(self.words, 1)

    @property
    def non_letters(self) -> float:
        """The share of visible characters that are no letters: digits, punctuation, symbols."""
        return 1 - self.letters / max(self.characters - self._invisible, self.letters, 1) if self.characters else 0.0

    def script_shares(self) -> dict[str, float]:
        """The share of each script among the letters, the largest first."""
        return {name: count / self.letters for name, count in self.scripts.most_common()}

    def as_dict(self) -> dict[str, Any]:
        """The JSON form; shares are between 0 and 1."""
        return {
            "characters": self.characters,
            "lengths": self.lengths.quantiles(),
            "words": self.words,
            "mean_word_length": round(self.mean_word_length, 2),
            "non_letters": round(self.non_letters, 4),
            "scripts": {name: round(share, 4) for name, share in self.script_shares().items()},
            "duplicates": self.duplicates,
        }

    def _count(self, text: str) -> None:
        self.characters += len(text)
        self.words += len(text.split())
        for character, count in Counter(text).items():  # few characters are different: each is looked up once
            kind = script_of(character)
            if kind is None:
                self._invisible += count * (character.isspace() or unicodedata.category(character) == "Cf")
            else:
                self.letters += count
                self.scripts[kind] += count


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """The script of a letter or of a mark on one, by the first word of its Unicode name; None for anything else."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    first = unicodedata.name(character, "OTHER").split(" ", 1)[0]
    return _KANA_HAN.get(first, first.capitalize())
