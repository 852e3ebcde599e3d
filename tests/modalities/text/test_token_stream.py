"""Streaming: pieces add up to the whole text, and no piece is taken back by a later token."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from craton.errors import UsageError
from craton.modalities.text import Tokenizer

FAST = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

WORDS = st.sampled_from(
    [
        "fox",
        " the",
        "می‌شود",
        "سلام ",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👋🏽",
        "東京",
        "\x00",
        "\u200f",
        "é",
        "e\u0301",
        "\n\n",
        "  ",
        "n't",
        " .",
        "▁",
    ]
)
MIXED_TEXT = st.lists(st.one_of(WORDS, st.text(max_size=4)), max_size=12).map("".join)


def pieces(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*(stream.push(i) for i in ids), stream.finish()]


@FAST
@given(text=MIXED_TEXT)
def test_pieces_of_a_text_add_up(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert "".join(pieces(any_tokenizer, ids)) == any_tokenizer.decode(ids)


@FAST
@given(numbers=st.lists(st.integers(0, 2**16), max_size=30), skip=st.booleans())
@example(numbers=[], skip=True)
def test_pieces_of_random_ids_add_up(any_tokenizer: Tokenizer, numbers: list[int], skip: bool) -> None:
    """Random tokens make invalid UTF-8, special tokens within characters, and ids beyond the vocabulary."""
    ids = [number % (any_tokenizer.vocab_size + 3) for number in numbers]
    whole = any_tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces(any_tokenizer, ids, skip=skip)) == whole


@FAST
@given(data=st.binary(max_size=24))
@example(data=b"\xe2\x82\x28\xf0\x9f\x98")
@example(data=b"\xf4\x90\x80\x80\xed\xa0\x80\xc0\xaf")
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace"])
def test_pieces_of_random_bytes_add_up(kind: str, data: bytes, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    single = {
        tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size)) if i not in tokenizer.special_ids
    }
    ids = [single[bytes([byte])] for byte in data]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace"])
def test_no_piece_holds_half_a_character(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    text = "a 👩‍👩‍👧‍👦 ژ 漢 𐍈 z"
    emitted = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(emitted) == text
    assert not any("\ufffd" in piece for piece in emitted)
    assert emitted.count("") < len(emitted) - 5


def test_half_a_character_at_the_end_comes_out_on_finish(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a🦊")[:-1]
    emitted = pieces(byte_level, ids)
    assert emitted[-1] == "\ufffd"
    assert "".join(emitted[:-1]) == "a"


def test_the_space_before_a_sentencepiece_text_is_dropped_once(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("  the fox")
    assert "".join(pieces(sentencepiece, ids)) == "  the fox"


def test_streams_of_one_tokenizer_are_independent(byte_level: Tokenizer) -> None:
    first, second = byte_level.stream(), byte_level.stream()
    ids = byte_level.encode("🦊")
    assert [first.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert second.push(byte_level.encode("x")[0]) == "x"
    assert first.push(ids[-1]) == "🦊"


def test_cost_of_a_token_does_not_grow(sentencepiece: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = Backend.decode

    class Counting:
        def __init__(self, backend: Backend) -> None:
            self._backend = backend

        def __getattr__(self, name: str) -> object:
            return getattr(self._backend, name)

        def decode(self, ids: list[int], **options: bool) -> str:
            decoded.append(len(ids))
            return decode(self._backend, ids, **options)

    ids = sentencepiece.encode("the quick 🦊 می‌شود " * 200)
    stream = sentencepiece.stream()
    monkeypatch.setattr(stream, "_backend", Counting(sentencepiece.backend))
    monkeypatch.setattr(stream._pieces, "_backend", Counting(sentencepiece.backend))  # type: ignore[attr-defined]
    text = "".join([*(stream.push(i) for i in ids), stream.finish()])
    assert text == sentencepiece.decode(ids)
    assert max(decoded) < 30


def test_a_decoder_that_looks_ahead_cannot_be_streamed(byte_level: Tokenizer) -> None:
    backend = Backend.from_str(byte_level.backend.to_str())
    for decoder in (
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ):
        backend.decoder = decoder
        with pytest.raises(UsageError, match="cannot be streamed"):
            Tokenizer(backend).stream()


@pytest.mark.parametrize("text", ["سلام دنیا 👋🏽 x", "def f():\n    return 1\n", "e\u0301 \u200d 👩‍👩‍👧"])
def test_real_tokenizer(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)
    assert "".join(pieces(smollm2, ids)) == smollm2.decode(ids) == text


@FAST
@given(ids=st.lists(st.integers(0, 49151), max_size=40))
def test_real_tokenizer_with_random_ids(smollm2: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(smollm2, ids, skip=False)) == smollm2.decode(ids, skip_special_tokens=False)
