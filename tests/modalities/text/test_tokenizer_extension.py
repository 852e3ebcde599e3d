"""A byte-level BPE with pieces for a new language: what is new, and that the old stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from craton.errors import UsageError
from craton.modalities.text import Tokenizer, gguf_metadata_from_tokenizer, render, tokenizer_from_gguf
from craton.modalities.text.fertility import measure_fertility
from craton.modalities.text.token_pieces import byte_level_alphabet
from craton.modalities.text.tokenizer_extension import Extension, extend_tokenizer
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer

ENGLISH = "The quick brown fox jumps over the lazy dog; it doesn't run any more than 1234 times.\n" * 20
PERSIAN = "زبان فارسی از راست به چپ نوشته می‌شود و کتاب‌های بسیاری به این زبان نوشته شده است.\n" * 20

OLD = train_tokenizer([ENGLISH], TokenizerSettings(vocab=300))
EXTENDED = extend_tokenizer(OLD, [PERSIAN], 66)


def byte_level_bpe(tokens: Sequence[str], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate([*sorted(byte_level_alphabet()), *tokens])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def assert_coarser(old: Tokenizer, extension: Extension, text: str) -> None:
    """The new tokens of `text` are the old ones, with runs of two or more under a new piece of the same bytes."""
    new, ids = extension.tokenizer, old.encode(text)
    for token in new.encode(text):
        if token < old.vocab_size:
            assert ids.pop(0) == token
            continue
        piece, run = new.token_bytes(token), []
        while len(b"".join(map(old.token_bytes, run))) < len(piece):
            run.append(ids.pop(0))
        assert b"".join(map(old.token_bytes, run)) == piece
        assert len(run) > 1
    assert ids == []


# --- what is new --------------------------------------------------------------------------------------------------


def test_new_pieces_follow_the_old_ids() -> None:
    assert list(EXTENDED.sources) == list(range(300, 366))
    assert EXTENDED.tokenizer.vocab_size == 366
    assert sorted(EXTENDED.tokenizer.backend.get_vocab().values()) == list(range(366))


def test_a_piece_is_made_of_the_tokens_that_it_stands_for() -> None:
    for token, parts in EXTENDED.sources.items():
        assert len(parts) > 1
        assert all(part < OLD.vocab_size for part in parts)
        assert EXTENDED.tokenizer.token_bytes(token) == b"".join(map(OLD.token_bytes, parts))


def test_a_new_language_takes_fewer_tokens() -> None:
    measured = measure_fertility([PERSIAN], {"old": OLD, "new": EXTENDED.tokenizer})
    assert (measured.tokens_per_word("new") or 9) < (measured.tokens_per_word("old") or 0) / 2
    assert measured.by_tokenizer["new"].altered == 0
    used = set(EXTENDED.tokenizer.encode(PERSIAN))
    assert {"نوشته", "زبان", "می‌شود"} <= {EXTENDED.tokenizer.decode([i]).strip() for i in used}


def test_pieces_are_learnt_in_the_order_of_their_frequency() -> None:
    backend = byte_level_bpe([], [])
    extension = extend_tokenizer(Tokenizer(backend), ["ab " * 9 + "cd " * 5 + "efg " * 3], 3)
    texts = [extension.tokenizer.decode([i]) for i in extension.sources]
    # Before the first word stands no space: "ab" comes 9 times, " ab" only 8 times.
    assert texts == ["ab", " ab", "cd"]


def test_the_same_corpus_gives_the_same_extension() -> None:
    again = extend_tokenizer(OLD, [PERSIAN], 66)
    assert again.sources == EXTENDED.sources
    assert again.tokenizer.backend.to_str() == EXTENDED.tokenizer.backend.to_str()


def test_a_small_corpus_gives_fewer_pieces() -> None:
    extension = extend_tokenizer(OLD, ["کتاب کتاب"], 1000)
    assert 1 < len(extension.sources) < 20
    assert extension.tokenizer.vocab_size == 300 + len(extension.sources)


# --- what stays ---------------------------------------------------------------------------------------------------


def test_old_ids_never_move() -> None:
    new = EXTENDED.tokenizer.backend.get_vocab()
    assert all(new[token] == i for token, i in OLD.backend.get_vocab().items())
    assert EXTENDED.tokenizer.special_ids == OLD.special_ids
    assert (EXTENDED.tokenizer.bos_id, EXTENDED.tokenizer.eos_ids) == (OLD.bos_id, OLD.eos_ids)


def test_another_language_keeps_its_ids() -> None:
    assert EXTENDED.tokenizer.encode(ENGLISH) == OLD.encode(ENGLISH)
    assert EXTENDED.tokenizer.encode("東京 Straße\n\n\t x") == OLD.encode("東京 Straße\n\n\t x")


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.one_of(st.sampled_from(PERSIAN + ENGLISH), st.characters(codec="utf-8"))))
def test_any_text_has_its_old_tokens_or_new_ones_over_runs_of_them(text: str) -> None:
    assert_coarser(OLD, EXTENDED, text)
    assert EXTENDED.tokenizer.decode(EXTENDED.tokenizer.encode(text), skip_special_tokens=False) == text


def test_a_chat_is_rendered_as_before() -> None:
    messages = [{"role": "user", "content": "The lazy dog?"}, {"role": "assistant", "content": "It jumps."}]
    assert render(messages, EXTENDED.tokenizer) == render(messages, OLD)


def test_special_tokens_in_the_corpus_are_part_of_no_piece() -> None:
    extension = extend_tokenizer(OLD, ["<|im_start|><|im_start|>کتاب<|im_end|>" * 9], 50)
    assert extension.sources
    assert not any(part in OLD.special_ids for parts in extension.sources.values() for part in parts)


def test_tokens_that_were_added_behind_the_vocabulary_keep_their_ids() -> None:
    # As in Qwen's files: a vocabulary, and behind it special tokens that are not part of it.
    backend = byte_level_bpe(["ab"], [("a", "b")])
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["<tool>"])
    old = Tokenizer(backend, special_tokens={"eos_token": "<|end|>"})
    extension = extend_tokenizer(old, ["abab " * 9], 4)
    assert min(extension.sources) == old.vocab_size == 259
    read = Tokenizer(tokenizers.Tokenizer.from_str(extension.tokenizer.backend.to_str()))
    assert read.encode("<|end|>ab<tool>") == old.encode("<|end|>ab<tool>") == [257, 256, 258]
    assert read.special_ids == {257}


def test_an_old_token_is_not_made_in_a_new_way() -> None:
    # "abc" is in the vocabulary but out of reach, as a goes with b first. Were (ab, c) merged into it, the old merge
    # (abc, d) would have a word in texts that it never had one in.
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("abc", "d")]
    old = Tokenizer(byte_level_bpe(["ab", "bc", "abc", "abcd"], merges))
    extension = extend_tokenizer(old, ["abc abcd abcx " * 9], 20)
    texts = [extension.tokenizer.decode([i]).strip() for i in extension.sources]
    assert "abc" not in texts
    for text in ("abc", "abcd", "abcx abc", "xabcd"):
        assert_coarser(old, extension, text)


def test_where_whole_words_come_first_a_new_one_is_taken_whole() -> None:
    old = Tokenizer(byte_level_bpe(["ab", "bc"], [("a", "b"), ("b", "c")], ignore_merges=True))
    extension = extend_tokenizer(old, ["xabc abc bcbc " * 9], 20)
    for text in ("xabc abc bcbc", "abcabc", "bc b cab"):
        assert_coarser(old, extension, text)
    assert len(extension.tokenizer.encode(" abc")) == 1


def test_it_can_be_extended_again() -> None:
    twice = extend_tokenizer(EXTENDED.tokenizer, ["東京は日本の首都です。" * 20], 10)
    assert min(twice.sources) == 366
    assert twice.tokenizer.encode(PERSIAN) == EXTENDED.tokenizer.encode(PERSIAN)


def test_gguf_keeps_it(smollm2: Tokenizer) -> None:
    extension = extend_tokenizer(smollm2, [PERSIAN], 100)
    read = tokenizer_from_gguf(gguf_metadata_from_tokenizer(extension.tokenizer))
    assert read.encode(PERSIAN + ENGLISH) == extension.tokenizer.encode(PERSIAN + ENGLISH)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "wordpiece"])
def test_other_kinds_are_refused(kind: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UsageError, match="byte-level BPE") as refusal:
        extend_tokenizer(request.getfixturevalue(kind), [PERSIAN], 10)
    assert "tokenizer train" in (refusal.value.remedy or "")


@pytest.mark.parametrize(("texts", "words"), [([], "no text"), ([" \n"], "no text"), (["ab \udcff"], "surrogate")])
def test_a_corpus_without_text_is_refused(texts: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        extend_tokenizer(OLD, texts, 10)


# --- real text ----------------------------------------------------------------------------------------------------


def test_smollm2_learns_persian_and_forgets_no_english(smollm2: Tokenizer, shared_data: Path) -> None:
    text = (shared_data / "parsinlu" / "text_fa.txt").read_text(encoding="utf-8")[:400_000]
    english = (shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:100_000]
    cut = text.rfind("\n", 0, int(len(text) * 0.9)) + 1
    extension = extend_tokenizer(smollm2, [text[:cut]], 3000)
    measured = measure_fertility([text[cut:]], {"old": smollm2, "new": extension.tokenizer})
    assert (measured.tokens_per_word("new") or 9) < (measured.tokens_per_word("old") or 0) / 3
    assert measured.by_tokenizer["new"].altered == 0
    assert extension.tokenizer.encode(english) == smollm2.encode(english)
    old_ids = [part for i in extension.tokenizer.encode(text) for part in extension.sources.get(i, (i,))]
    assert old_ids == smollm2.encode(text)
    assert len(json.loads(extension.tokenizer.backend.to_str())["model"]["merges"]) >= 3000
