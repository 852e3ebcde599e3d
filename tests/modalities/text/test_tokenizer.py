"""Encoding, decoding, token bytes, and folders in the Hugging Face layout."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from craton.errors import FileFormatError, UsageError
from craton.modalities.text import Tokenizer

TEXTS = ["Hello, world!", "کتاب‌های فارسی می‌خوانم", "👩‍👩‍👧‍👦 👋🏽", "東京 1234", "", "two  spaces ", "a\x00\x1b\n\t"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace"])
def test_lossless_tokenizers_give_the_text_back(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_padding_and_truncation_in_the_file_are_switched_off(byte_level: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level.backend.to_str())
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    tokenizer = Tokenizer(backend)
    long = "the quick brown fox " * 10
    assert tokenizer.encode(long) == byte_level.encode(long)
    assert tokenizer.encode_batch(["a", long]) == [byte_level.encode("a"), byte_level.encode(long)]


def test_special_tokens_are_added_on_request_only(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.adds_bos
    assert sentencepiece.encode("fox") == [sentencepiece.bos_id, *sentencepiece.encode("fox", add_special_tokens=False)]
    assert sentencepiece.decode(sentencepiece.encode("fox")) == "fox"
    assert sentencepiece.decode(sentencepiece.encode("fox"), skip_special_tokens=False).startswith("<s>")


def test_attributes(byte_level: Tokenizer) -> None:
    assert byte_level.vocab_size == 500
    assert (byte_level.bos_id, byte_level.eos_ids, byte_level.unk_id, byte_level.pad_id) == (1, (2,), 0, None)
    assert byte_level.special_ids == {0, 1, 2}
    assert not byte_level.adds_bos
    assert byte_level.chat_template is None


def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        byte_level.encode("a\ud800")
    with pytest.raises(UsageError, match="surrogate"):
        byte_level.encode_batch(["fine", "a\ud800"])


def test_negative_ids_are_refused_and_unknown_ones_ignored(byte_level: Tokenizer) -> None:
    with pytest.raises(UsageError, match="0 or more"):
        byte_level.decode([5, -1])
    assert byte_level.decode([*byte_level.encode("fox"), 10**6]) == "fox"
    assert byte_level.token_bytes(10**6) == b""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_bytes_of_tokens_add_up_to_the_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_bytes_of_sentencepiece_tokens_add_up_to_the_text(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text, add_special_tokens=False)
    # SentencePiece puts a space before every text.
    assert b"".join(map(sentencepiece.token_bytes, ids)) == (f" {text}" if text else "").encode()


def test_bytes_of_tokens_that_are_parts_of_characters(sentencepiece: Tokenizer, byte_level: Tokenizer) -> None:
    token = sentencepiece.backend.token_to_id("<0xF0>")
    assert sentencepiece.token_bytes(token) == b"\xf0"
    assert b"".join(byte_level.token_bytes(i) for i in byte_level.encode("🦊")) == "🦊".encode()
    assert byte_level.token_bytes(2) == b"<|im_end|>"


def test_bytes_of_added_tokens_are_their_text(byte_level: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level.backend.to_str())
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("دو واژه", "  ", "<x>")])
    tokenizer = Tokenizer(backend)
    text = "a دو واژه  <x>"
    ids = tokenizer.encode(text)
    assert tokenizer.backend.token_to_id("دو واژه") in ids
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) == tokenizer.decode(ids) == text


def test_bytes_of_wordpieces_carry_their_space(wordpiece: Tokenizer) -> None:
    ids = wordpiece.encode("the quickest", add_special_tokens=False)
    assert b"".join(map(wordpiece.token_bytes, ids)) == b" the quickest"


def test_offsets_are_characters_and_not_trimmed(byte_level: Tokenizer) -> None:
    text = "the سلام 👋 fox"
    ids, offsets = byte_level.encode_with_offsets(text)
    assert ids == byte_level.encode(text)
    assert offsets[0][0] == 0
    assert offsets[-1][1] == len(text)
    # Every token starts where the one before ends, or within its last character; spaces belong to their tokens.
    for (_, end), (start, _) in itertools.pairwise(offsets):
        assert start in (end, end - 1)


# Folders


def save(folder: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_folder_with_everything(tmp_path: Path, byte_level: Tokenizer) -> None:
    folder = save(
        tmp_path,
        byte_level,
        tokenizer_config={"eos_token": {"content": "<|im_end|>", "special": True}, "chat_template": "in the config"},
        special_tokens_map={"bos_token": "<|im_start|>", "pad_token": "<|endoftext|>", "eos_token": "overruled"},
        generation_config={"eos_token_id": [2, 0], "bos_token_id": 5},
        config={"eos_token_id": 7},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (2, 0)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 0, None)
    assert tokenizer.chat_template == "in the config"
    assert tokenizer.encode("fox") == byte_level.encode("fox")

    (folder / "chat_template.jinja").write_text("in a file", encoding="utf-8")
    assert Tokenizer.from_folder(folder).chat_template == "in a file"


def test_named_templates(tmp_path: Path, byte_level: Tokenizer) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = save(tmp_path, byte_level, tokenizer_config={"chat_template": templates})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents", encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_templates == {"default": "plain", "tool_use": "tools", "rag": "documents"}


def test_template_of_a_processor(tmp_path: Path, byte_level: Tokenizer) -> None:
    folder = save(tmp_path, byte_level, chat_template={"chat_template": "of a processor"})
    assert Tokenizer.from_folder(folder).chat_template == "of a processor"


def test_bos_is_taken_from_the_model_config_unless_the_tokenizer_says_none(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    folder = save(tmp_path, byte_level, config={"bos_token_id": 1, "eos_token_id": 2})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    save(tmp_path, byte_level, config={"bos_token_id": 1, "eos_token_id": 2}, tokenizer_config={"bos_token": None})
    assert Tokenizer.from_folder(folder).bos_id is None


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_eos_token": True}, {}])
@pytest.mark.peer
def test_what_surrounds_a_text_is_tokenizer_json_s_business_as_in_transformers(
    tmp_path: Path, sentencepiece: Tokenizer, flags: dict[str, bool]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | flags
    folder = save(tmp_path, sentencepiece, tokenizer_config=config)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert Tokenizer.from_folder(folder).encode("the fox") == theirs("the fox")["input_ids"]


def test_byte_level_vocabulary_files(tmp_path: Path) -> None:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        ["the quick brown fox, the lazy dog"] * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    trained.model.save(str(tmp_path))
    size = trained.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "the quick dog’s 12 foxes سلام"
    assert tokenizer.encode(text) == trained.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_ids == (size,)
    assert tokenizer.encode("dog<|end|>")[-1] == size
    config = '{"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|end|>", "add_bos_token": true}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert Tokenizer.from_folder(tmp_path).encode(text) == [size, *trained.encode(text).ids]


def test_wordpiece_vocabulary_file(tmp_path: Path, wordpiece: Tokenizer) -> None:
    tokens = sorted(wordpiece.backend.get_vocab(), key=wordpiece.backend.token_to_id)
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "The QUICK brown; 東京 naïve"
    assert tokenizer.encode(text) == wordpiece.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == wordpiece.decode(wordpiece.encode(text))
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.special_ids) == (0, 1, {0, 1, 2, 3, 4})


def test_real_folder(minilm_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(minilm_folder)
    assert tokenizer.encode("Hello there, world!") == [101, 7592, 2045, 1010, 2088, 999, 102]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.unk_id) == (30522, 0, 100)
    long = tokenizer.encode("word " * 1000)
    assert len(long) == 1002  # the file asks for 128


@pytest.mark.peer
def test_real_folder_as_in_transformers(minilm_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    ours = Tokenizer.from_folder(minilm_folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_folders_that_cannot_be_read(tmp_path: Path, byte_level: Tokenizer) -> None:
    with pytest.raises(FileFormatError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path / "absent")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(FileFormatError, match="SentencePiece") as refusal:
        Tokenizer.from_folder(tmp_path)
    assert "save_pretrained" in str(refusal.value.remedy)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(FileFormatError, match="CLIPTokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'),
        ("tokenizer_config.json", b"{,}"),
        ("tokenizer_config.json", b'"text"'),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9": 5}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9999": {"content": "new"}}}'),
        ("added_tokens.json", b'{"new": "four"}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_malformed_files(tmp_path: Path, byte_level: Tokenizer, name: str, content: bytes) -> None:
    save(tmp_path, byte_level)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError) as refusal:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(refusal.value.where)


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 7, "eos_token": ["x"], "chat_template": 3},
        {"chat_template": [1, {"name": "x"}], "added_tokens_decoder": {}},
        {"bos_token": {}, "add_bos_token": True},
    ],
)
def test_configs_with_odd_entries_are_read_past(tmp_path: Path, byte_level: Tokenizer, config: dict[str, Any]) -> None:
    folder = save(tmp_path, byte_level, tokenizer_config=config, generation_config={"eos_token_id": "two"})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_templates == {}
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == ()
