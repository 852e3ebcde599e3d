"""The words of a text in any script, and hashes of runs of them: what de-duplication and decontamination compare."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

# Scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han. There each character counts as a word.
_UNSPACED: Final = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_JOINERS: Final = "\u200c\u200d"  # stand within words of Persian and of India's languages
_MULTIPLIERS: Final = np.random.Philox(np.random.SeedSequence(5)).random_raw(64) | np.uint64(1)
_CACHED_WORDS: Final = 1 << 20


def words(text: str) -> list[str]:
    """The words of a text, case-folded and in NFC: letters and digits with their marks and joiners."""
    return _pattern().findall(unicodedata.normalize("NFC", text).casefold())


class WordHasher:
    """64-bit hashes of words, the same in every process; frequent words are looked up."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> Hashes:
        """The hash of each word of `text`."""
        return np.array([self._hash(word) for word in words(text)], dtype=np.uint64)

    def _hash(self, word: str) -> int:
        value = self._known.get(word)
        if value is None:
            if len(self._known) == _CACHED_WORDS:
                self._known.clear()
            data = word.encode("utf-8", "surrogatepass")
            value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
            self._known[word] = value
        return value


def runs(hashes: Hashes, n: int) -> Hashes:
    """A hash of each run of `n` words; none where there are fewer."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for k in range(n):
        total += hashes[k : k + count] * _MULTIPLIERS[k]  # modulo 2^64
    return mixed(total)


def mixed(values: Hashes) -> Hashes:
    """Each value with its bits spread over all 64 (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _pattern() -> re.Pattern[str]:
    # Python's \w leaves out combining marks, without which words of many scripts fall apart.
    marks = "".join(chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("M"))
    letters = f"[^\\W{_UNSPACED}]"
    return re.compile(f"[{_UNSPACED}]|{letters}+(?:[{marks}{_JOINERS}]+{letters}*)*")
