"""Tokenisers trained here: what they reserve, that they repeat and lose nothing, and how well they fit Persian."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.checkpoints.save import save_tokenizer
from craton.config import parse
from craton.errors import UsageError
from craton.modalities.text import Tokenizer, render
from craton.modalities.text.fertility import measure_fertility
from craton.modalities.text.tokenizer_training import TokenizerSettings, stretches, train_tokenizer

Kind = Literal["bpe", "unigram"]
KINDS: tuple[Kind, ...] = ("bpe", "unigram")
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it doesn't run any more than 1234 times.\n" * 3,
    "زبان فارسی از راست به چپ نوشته می‌شود و کتاب‌های بسیاری به این زبان نوشته می‌شود. کِتابِ او\n" * 3,
    "def fold(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n" * 3,
    "東京は日本の首都です。人口は約千四百万人。\n\n" * 3,
] * 5
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "سلام!"},
    {"role": "assistant", "content": "\n\n  سلام. چه خبر؟ \n"},
    {"role": "user", "content": "The weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Shiraz"}}}],
    },
    {"role": "tool", "content": "31"},
    {"role": "tool", "content": "32"},
    {"role": "assistant", "content": "31 degrees."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def train(kind: Kind = "bpe", vocab: int = 380, reserve: int = 0) -> Tokenizer:
    return train_tokenizer(CORPUS, TokenizerSettings(vocab=vocab, kind=kind, reserve=reserve))


TRAINED = {kind: train(kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    return TRAINED[request.param]


# --- what is reserved ---------------------------------------------------------------------------------------------


def test_special_tokens_have_the_first_ids(trained: Tokenizer) -> None:
    assert [trained.backend.id_to_token(i) for i in range(len(SPECIAL))] == SPECIAL
    assert trained.vocab_size == 380
    assert trained.special_tokens["bos_token"] == trained.special_tokens["eos_token"] == "<|endoftext|>"
    assert (trained.bos_id, trained.pad_id, trained.eos_ids) == (0, 0, (0, 2))
    # Tool tokens are what programs read in an answer; the others are left out of decoded text.
    assert trained.special_ids == {0, 1, 2}
    assert trained.decode(trained.encode("a<|im_end|><tool_call>")) == "a<tool_call>"


@pytest.mark.parametrize("kind", KINDS)
def test_spare_tokens_follow_the_special_ones(kind: Kind) -> None:
    spare = train(kind, reserve=3)
    assert [spare.backend.id_to_token(i) for i in range(6, 10)][1:] == [f"<|reserved_{i}|>" for i in range(3)]
    assert spare.encode("x<|reserved_1|>")[1] == 8
    assert spare.vocab_size == 380


def test_every_id_has_one_token(trained: Tokenizer) -> None:
    assert sorted(trained.backend.get_vocab().values()) == list(range(trained.vocab_size))


def test_nothing_is_added_to_a_text(trained: Tokenizer) -> None:
    assert trained.encode("") == []
    assert not trained.adds_bos


# --- what is learnt -----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text(), kind=st.sampled_from(KINDS))
def test_any_text_comes_back(text: str, kind: Kind) -> None:
    tokenizer = TRAINED[kind]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["▁a ▁▁ b", "<0x41><0x0A>", "\0 \x7f\ufdd0", "\r\n\t \n  x", "👩‍👩‍👧‍👦 🏳️‍🌈", "e\u0301 é"]
)
def test_texts_that_others_change_come_back(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("word", ["می‌شود", "کتاب‌های", "کِتابِ", "naïve", "नमस्ते", "क्\u200dष"])
def test_joiners_and_marks_stay_inside_words(trained: Tokenizer, word: str) -> None:
    words = trained.backend.pre_tokenizer.pre_tokenize_str(f"x {word} y")
    assert [span for _, span in words] == [(0, 1), (1, 2 + len(word)), (2 + len(word), 4 + len(word))]


def test_each_digit_is_a_token_of_its_own(trained: Tokenizer) -> None:
    # 1234 occurs often enough to be a piece, were digits allowed to join.
    assert [trained.decode([i]) for i in trained.encode("1234")] == ["1", "2", "3", "4"]
    assert len(trained.backend.pre_tokenizer.pre_tokenize_str("۱۴۰۳")) == 4


def test_frequent_words_are_one_token() -> None:
    # Also those that are part of no other word: the Unigram trainer by itself starts without them.
    lines = ["alpha beta gamma می‌شود\n"] * 20
    for kind in KINDS:
        tokenizer = train_tokenizer(lines, TokenizerSettings(vocab=400, kind=kind))
        for word in (" beta", " gamma", " می‌شود"):
            assert len(tokenizer.encode(word)) == 1, (kind, word)


def test_a_piece_has_been_seen_twice() -> None:
    tokenizer = train_tokenizer(["seldom often often"], TokenizerSettings(vocab=1000))
    pieces = [tokenizer.decode([i]) for i in range(len(SPECIAL) + 256, tokenizer.vocab_size)]
    assert " often" in pieces
    assert not any("dom" in piece for piece in pieces)


@pytest.mark.peer
def test_another_regex_engine_and_a_plain_merge_loop_give_the_same_tokens() -> None:
    regex = pytest.importorskip("regex")
    tokenizer = TRAINED["bpe"]
    description = json.loads(tokenizer.backend.to_str())
    model = description["model"]
    pattern = description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    rank = {tuple(merge): i for i, merge in enumerate(model["merges"])}
    spelt = {tokenizer.token_bytes(i): i for i in range(len(SPECIAL), tokenizer.vocab_size)}
    spelling = {piece: tokenizer.backend.id_to_token(i) for piece, i in spelt.items()}

    def ids(text: str) -> Iterator[int]:
        for word in regex.findall(pattern, text):
            parts = [bytes([byte]) for byte in word.encode()]
            while len(parts) > 1:
                pairs = [
                    (rank.get((spelling[a], spelling[b]), len(rank)), i) for i, (a, b) in enumerate(pairwise(parts))
                ]
                best, i = min(pairs)
                if best == len(rank):
                    break
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            yield from (spelt[part] for part in parts)

    for text in (*CORPUS[:4], "It'll be «سلام»: ۱۲۳ می‌شود!!\n\n  x  \t"):
        assert list(ids(text)) == tokenizer.encode(text)


# --- the same corpus, the same tokeniser --------------------------------------------------------------------------

AGAIN = """
import sys
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
text = sys.stdin.buffer.read().decode()
settings = TokenizerSettings(vocab=int(sys.argv[2]), kind=sys.argv[1])
sys.stdout.buffer.write(train_tokenizer([text], settings).backend.to_str(pretty=True).encode())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_learns_the_same_bytes(kind: Kind) -> None:
    # Enough different words for hash tables to differ in their order, and characters that EM would prune.
    words = random.Random(0)
    text = "".join(
        "".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=words.randint(2, 6))) + words.choice(" \n")
        for _ in range(4000)
    ) + "".join(f" {chr(0x4E00 + i)}{chr(0x4F00 + i)}\n" * 2 for i in range(60))
    runs = [
        subprocess.run(
            [sys.executable, "-c", AGAIN, kind, "900"],
            input=text.encode(),
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in (1, 2)
    ]
    assert runs[0] == runs[1]
    here = train_tokenizer([text], TokenizerSettings(vocab=900, kind=kind))
    assert here.backend.to_str(pretty=True).encode() == runs[0]


def test_a_saved_tokeniser_is_read_back(trained: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(trained, tmp_path)
    read = Tokenizer.from_folder(tmp_path)
    assert read.backend.to_str() == trained.backend.to_str()
    assert (read.bos_id, read.eos_ids, read.pad_id, read.special_ids) == (0, (0, 2), 0, {0, 1, 2})
    assert read.chat_template == trained.chat_template


# --- chats --------------------------------------------------------------------------------------------------------


def test_exactly_the_assistants_words_and_stop_tokens_are_trained(trained: Tokenizer) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Shiraz"}}\n</tool_call>'
    rendered = render(CHAT, trained, tools=TOOLS)
    learnt = trained.decode(
        [i for i, is_trained in zip(rendered.ids, rendered.trained, strict=True) if is_trained],
        skip_special_tokens=False,
    )
    assert learnt == f"سلام. چه خبر؟<|im_end|>{call}<|im_end|>31 degrees.<|im_end|>"
    assert rendered.ids.count(2) > sum(i == 2 and t for i, t in zip(rendered.ids, rendered.trained, strict=True)) == 3


def test_a_chat_has_no_bos_and_one_token_for_each_mark(trained: Tokenizer) -> None:
    rendered = render(CHAT, trained, tools=TOOLS)
    assert trained.bos_id not in rendered.ids
    assert rendered.ids[0] == trained.backend.token_to_id("<|im_start|>")
    assert rendered.text.count("<|im_start|>") == rendered.ids.count(1) == rendered.ids.count(2)
    assert rendered.text.count("<tool_response>") == 2
    assert rendered.text.count("Be brief.") == 1


def test_a_prompt_begins_what_is_trained(trained: Tokenizer) -> None:
    whole = render(CHAT, trained, tools=TOOLS)
    for end in (2, 4, 7):
        prompt = render(CHAT[:end], trained, tools=TOOLS, add_generation_prompt=True)
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert whole.trained[len(prompt.ids)]
        assert not whole.trained[len(prompt.ids) - 1]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.peer
def test_transformers_reads_it_and_renders_the_same(
    trained: Tokenizer, tmp_path: Path, tools: list[dict[str, Any]] | None
) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(trained, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS[:4]:
        assert theirs(text)["input_ids"] == trained.encode(text)
    ours = render(CHAT, trained, tools=tools)
    assert theirs.apply_chat_template(CHAT, tools=tools, tokenize=False) == ours.text
    both = theirs.apply_chat_template(CHAT, tools=tools, return_assistant_tokens_mask=True, return_dict=True)
    assert both["input_ids"] == ours.ids
    assert both["assistant_masks"] == [int(is_trained) for is_trained in ours.trained]
    assert theirs.eos_token == theirs.pad_token == "<|endoftext|>"


# --- corpora that give less, or nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_corpus_gives_fewer_tokens(kind: Kind) -> None:
    tokenizer = train_tokenizer(["one two one two\n"], TokenizerSettings(vocab=5000, kind=kind))
    assert len(SPECIAL) + 256 < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("three")) == "three"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [[], [""], ["", " \n\t"]])
def test_an_empty_corpus_is_refused(kind: Kind, texts: list[str]) -> None:
    with pytest.raises(UsageError, match="no text"):
        train_tokenizer(texts, TokenizerSettings(kind=kind))


def test_bytes_alone_are_a_tokeniser_and_fewer_are_none() -> None:
    least = len(SPECIAL) + 256
    assert train_tokenizer(["abab"], TokenizerSettings(vocab=least)).vocab_size == least
    with pytest.raises(UsageError, match="too few for 9 special") as refusal:
        train_tokenizer(["abab"], TokenizerSettings(vocab=least, reserve=2))
    assert str(least + 2) in (refusal.value.remedy or "")


def test_more_characters_than_tokens_are_refused() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(300)) * 2
    with pytest.raises(UsageError, match="more different characters than the 137"):
        train_tokenizer([text], TokenizerSettings(vocab=400, kind="unigram"))
    assert train_tokenizer([text], TokenizerSettings(vocab=400)).vocab_size <= 400


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_refused(kind: Kind) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        train_tokenizer(["fine", "\ud800"], TokenizerSettings(kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_reader_raises_arrives(kind: Kind) -> None:
    def texts() -> Iterator[str]:
        yield "fine " * 100_000
        raise ZeroDivisionError("line 17")

    with pytest.raises(ZeroDivisionError, match="line 17"):
        train_tokenizer(texts(), TokenizerSettings(kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_endless_lines_cost_little_and_teach_nothing(kind: Kind) -> None:
    letters = "".join(random.Random(0).choices("acgt", k=1_000_000))
    noisy = train_tokenizer(["tick tock\n" * 9 + letters + "=" * 500_000], TokenizerSettings(vocab=400, kind=kind))
    quiet = train_tokenizer(["tick tock\n" * 9 + " "], TokenizerSettings(vocab=400, kind=kind))
    assert noisy.backend.get_vocab().keys() == quiet.backend.get_vocab().keys()


@pytest.mark.parametrize("flags", [{"vocab": 0}, {"vocab": 10**9}, {"kind": "wordpiece"}, {"reserve": -1}, {"size": 1}])
def test_wrong_settings_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        parse(TokenizerSettings, flags, where="the flags")


# --- stretches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["word ", "a line of words\n", "x", "\n", "می‌شود و ", "  indented\n\n"])
def test_stretches_add_up_and_end_where_words_end(unit: str) -> None:
    text = unit * (600_000 // len(unit))
    parts = list(stretches(text))
    assert "".join(parts) == text
    assert all(1 << 16 <= len(part) <= 1 << 17 for part in parts[:-1])
    tokenizer = TRAINED["bpe"]
    if unit.strip() != unit:
        assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_short_text_is_one_stretch() -> None:
    assert list(stretches("")) == [""]
    assert list(stretches("a b\nc")) == ["a b\nc"]


# --- real text ----------------------------------------------------------------------------------------------------


def nine_to_one(path: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    cut = text.rfind("\n", 0, int(len(text) * 0.9)) + 1
    return text[:cut], text[cut:]


@pytest.mark.parametrize("kind", KINDS)
def test_persian_costs_at_most_half_of_what_it_costs_smollm2(kind: Kind, shared_data: Path, smollm2: Tokenizer) -> None:
    known, held_out = nine_to_one(shared_data / "parsinlu" / "text_fa.txt")
    own = train_tokenizer([known], TokenizerSettings(vocab=8_000, kind=kind))
    measured = measure_fertility([held_out], {"own": own, "smollm2": smollm2})
    costs = {name: measured.tokens_per_word(name) or 0.0 for name in ("own", "smollm2")}
    assert measured.words > 10_000
    assert 1.0 < costs["own"] <= costs["smollm2"] / 2
    assert (measured.whole_share("own") or 0) > 0.9
    assert measured.by_tokenizer["own"].altered == 0


def test_english_costs_what_it_costs_smollm2_with_a_quarter_of_the_tokens(
    shared_data: Path, smollm2: Tokenizer
) -> None:
    known, held_out = nine_to_one(shared_data / "wikitext2" / "valid.txt")
    own = train_tokenizer([known], TokenizerSettings(vocab=12_000))
    measured = measure_fertility([held_out], {"own": own, "smollm2": smollm2})
    assert (measured.tokens_per_word("own") or 9) < 1.1 * (measured.tokens_per_word("smollm2") or 0)
