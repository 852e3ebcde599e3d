"""Texts that are longer than the encoder reads."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from craton.retrieval.index import Encoder


class Words:
    """A tokeniser of whole words that it knows ("aaaa"), else of letters; two tokens stand around every text."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [match.span() for match in re.finditer(r"\baaaa\b|\S", text)]
        return [0] * len(spans), spans

    def encode(self, text: str) -> list[int]:
        return [0, *self.encode_with_offsets(text)[0], 0]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("aaaa " * 4, 6),
        ("aaaa " * 9, 8),
        ("aaaa " * 5 + "bbb", 8),
        ("b" * 50, 8),
        (" ", 3),
        ("aaaa " * 6 + "b", 8),  # one more than fits
    ],
)
def test_a_text_is_read_as_far_as_it_fits(text: str, tokens: int) -> None:
    encoder = Encoder("none")
    encoder._model = SimpleNamespace(tokenizer=Words())  # type: ignore[assignment]
    cut = encoder._cut(text, 8)
    assert len(Words().encode(cut)) == tokens
    assert text.startswith(cut) or not text.strip()


def test_a_part_of_a_word_may_be_more_tokens_than_it_was_of_the_whole() -> None:
    class Pairs(Words):
        def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
            # Two letters are a token where the text is whole, and one letter is where it is cut.
            size = 2 if text.endswith(".") else 1
            spans = [(start, min(start + size, len(text))) for start in range(0, len(text), size)]
            return [0] * len(spans), spans

    encoder = Encoder("none")
    encoder._model = SimpleNamespace(tokenizer=Pairs())  # type: ignore[assignment]
    cut = encoder._cut("a" * 99 + ".", 12)
    assert 0 < len(Pairs().encode(cut)) <= 12
