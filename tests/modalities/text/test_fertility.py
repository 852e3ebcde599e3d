"""What texts cost in tokens, beside counts made by hand or one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.modalities.text import Tokenizer
from craton.modalities.text.fertility import measure_fertility
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer

BYTES = train_tokenizer(["nothing to learn"], TokenizerSettings(vocab=263))


def words(text: str) -> int:
    return measure_fertility([text], {}).words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" .,!? \n«»", 0),
        ("one two  three\nfour", 4),
        ("doesn't well-known", 4),
        ("snake_case 12.5", 3),
        ("می‌شود", 1),
        ("کِتابِ مَن", 2),
        ("e\u0301te\u0301", 1),
        ("नमस्ते दुनिया", 2),
        ("\u200cالف", 1),
        ("👩‍👩‍👧‍👦", 0),
        ("東京は日本", 1),
    ],
)
def test_words(text: str, count: int) -> None:
    assert words(text) == count


def test_figures_of_a_tokeniser_that_has_only_bytes() -> None:
    measured = measure_fertility(["ab c", "é"], {"bytes": BYTES})
    assert (measured.documents, measured.bytes, measured.words) == (2, 6, 3)
    assert measured.by_tokenizer["bytes"].tokens == 6
    assert measured.tokens_per_word("bytes") == 2.0
    assert measured.bytes_per_token("bytes") == 1.0
    assert measured.whole_share("bytes") == pytest.approx(1 / 3)  # only c: é is two bytes


def test_without_words_or_tokens_there_is_no_figure() -> None:
    measured = measure_fertility([""], {"bytes": BYTES})
    assert (measured.documents, measured.tokens_per_word("bytes"), measured.bytes_per_token("bytes")) == (1, None, None)
    assert measured.whole_share("bytes") is None
    assert measure_fertility(["..."], {"bytes": BYTES}).tokens_per_word("bytes") is None


def test_documents_that_do_not_come_back_are_counted(wordpiece: Tokenizer, byte_level: Tokenizer) -> None:
    measured = measure_fertility(["the dog", "The Dog", "any  more"], {"lower": wordpiece, "bytes": byte_level})
    assert measured.by_tokenizer["lower"].altered == 2
    assert measured.by_tokenizer["bytes"].altered == 0


def test_an_unknown_word_is_not_kept_whole(wordpiece: Tokenizer) -> None:
    assert wordpiece.encode("ʘʘʘ", add_special_tokens=False) == [wordpiece.unk_id]
    known, unknown = (measure_fertility([text], {"own": wordpiece}) for text in ("the", "ʘʘʘ"))
    assert (known.words, known.by_tokenizer["own"].whole_words) == (1, 1)
    assert (unknown.words, unknown.by_tokenizer["own"].whole_words) == (1, 0)


def test_whole_words_are_those_under_one_token(any_tokenizer: Tokenizer, lines: list[str]) -> None:
    # One by one, with another notion of a word that is the same on these lines.
    for line in [text.replace("'", "").replace("_", "") for text in lines[:3]]:
        ids, offsets = any_tokenizer.encode_with_offsets(line)
        whole, start = 0, 0
        for word in "".join(c if c.isalnum() or c == "\u200c" else " " for c in line).split():
            start = line.index(word, start)
            covering = [i for i, (a, b) in zip(ids, offsets, strict=True) if a < start + len(word) and start < b]
            whole += len(covering) == 1 and covering[0] != any_tokenizer.unk_id
            start += len(word)
        measured = measure_fertility([line], {"own": any_tokenizer})
        assert measured.by_tokenizer["own"].whole_words == whole
        assert measured.by_tokenizer["own"].tokens == len(ids)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(), max_size=4))
def test_sums_over_documents(texts: list[str]) -> None:
    together = measure_fertility(texts, {"bytes": BYTES})
    apart = [measure_fertility([text], {"bytes": BYTES}) for text in texts]
    assert together.words == sum(one.words for one in apart)
    assert together.by_tokenizer["bytes"].tokens == sum(len(BYTES.encode(text)) for text in texts)
    assert together.by_tokenizer["bytes"].whole_words == sum(one.by_tokenizer["bytes"].whole_words for one in apart)
    assert together.by_tokenizer["bytes"].altered == 0


def test_a_long_document_is_one_document(byte_level: Tokenizer) -> None:
    line = "The quick brown fox, می‌شود 1234.\n"
    measured = measure_fertility([line * 9000], {"own": byte_level})
    one = measure_fertility([line], {"own": byte_level})
    assert (measured.documents, measured.words) == (1, 9000 * one.words)
    assert measured.by_tokenizer["own"].tokens == len(byte_level.encode(line * 9000))
    assert measured.by_tokenizer["own"].whole_words == 9000 * one.by_tokenizer["own"].whole_words


def test_tokens_of_smollm2_in_english_and_persian(smollm2: Tokenizer) -> None:
    english = measure_fertility(["The weather is very nice today."], {"smollm2": smollm2})
    persian = measure_fertility(["هوا امروز بسیار خوب است."], {"smollm2": smollm2})
    assert english.by_tokenizer["smollm2"].tokens == 7
    assert english.whole_share("smollm2") == 1.0
    assert (persian.tokens_per_word("smollm2") or 0) > 3
