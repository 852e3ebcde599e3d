"""How well a tokeniser fits a language: tokens per word, bytes per token, words kept whole, texts that come back.

Fertility is what a text costs (Rust 2021, arXiv 2012.15613; Petrov 2023, arXiv 2305.15425): a language that takes three
times the tokens gets a third of the context and of the speed, and its words reach the model in shreds.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from craton.modalities.text.tokenizer import Tokenizer
from craton.modalities.text.tokenizer_training import JOINERS, stretches


@dataclass
class Fertility:
    """What one tokeniser makes of the texts. altered: documents that did not come back exactly as they were."""

    tokens: int = 0
    whole_words: int = 0
    altered: int = 0


@dataclass
class Measured:
    """The texts, and for each tokeniser what it makes of them. All counts are sums over the documents.

    A word is a letter, digit or underscore and all letters, digits, underscores, combining marks and zero-width joiners
    that follow: "doesn't" is two words, می‌شود is one. Scripts that put no spaces between words make long ones; look at
    the bytes of a token there.
    """

    documents: int = 0
    bytes: int = 0
    words: int = 0
    by_tokenizer: dict[str, Fertility] = field(default_factory=dict)

    def tokens_per_word(self, name: str) -> float | None:
        """All tokens, those of spaces and punctuation too, for each word; None where there is no word."""
        return self.by_tokenizer[name].tokens / self.words if self.words else None

    def bytes_per_token(self, name: str) -> float | None:
        """Bytes of UTF-8 that a token stands for; None where there is no token."""
        tokens = self.by_tokenizer[name].tokens
        return self.bytes / tokens if tokens else None

    def whole_share(self, name: str) -> float | None:
        """The share of words that one token covers from end to end (with what stands around it, perhaps)."""
        return self.by_tokenizer[name].whole_words / self.words if self.words else None


def measure_fertility(texts: Iterable[str], tokenizers: Mapping[str, Tokenizer]) -> Measured:
    """Measure all tokenisers on the same texts (each one document), which are read once.

    No special tokens are added. A text that holds one spelt out counts it as one token.
    """
    measured = Measured(by_tokenizer={name: Fertility() for name in tokenizers})
    for text in texts:
        parts = list(stretches(text))
        measured.documents += 1
        measured.bytes += len(text.encode())
        intact = dict.fromkeys(tokenizers, True)
        for part in parts:
            spans = np.array([match.span() for match in _word().finditer(part)], dtype=np.int64).reshape(-1, 2)
            measured.words += len(spans)
            for name, tokenizer in tokenizers.items():
                ids, offsets = tokenizer.encode_with_offsets(part)
                result = measured.by_tokenizer[name]
                result.tokens += len(ids)
                result.whole_words += _whole_words(spans, ids, offsets, tokenizer.unk_id)
                intact[name] = intact[name] and tokenizer.decode(ids, skip_special_tokens=False) == part
        for name, is_intact in intact.items():
            measured.by_tokenizer[name].altered += not is_intact
    return measured


def _whole_words(
    spans: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    ids: list[int],
    offsets: list[tuple[int, int]],
    unk_id: int | None,
) -> int:
    """How many of the words [W, 2] are touched by one token alone, which is not the unknown one."""
    starts_T, ends_T = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    first_W = np.searchsorted(ends_T, spans[:, 0], side="right")
    behind_W = np.searchsorted(starts_T, spans[:, 1], side="left")
    whole_W = behind_W - first_W == 1
    if unk_id is not None:
        whole_W &= np.append(np.array(ids) != unk_id, False)[first_W]
    return int(whole_W.sum())


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    # The marks have no class of their own in `re`, and most are not in \w: vowel signs of Hindi, of Persian, accents.
    marks = "".join(chr(code) for code in range(0x300, 0xE01F0) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(rf"\w[\w{marks}{JOINERS}]*")
