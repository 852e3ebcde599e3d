"""Small tokenizers of each kind, trained here on a few lines of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from craton.checkpoints.gguf.reader import GGUFFile
from craton.modalities.text import Tokenizer, tokenizer_from_gguf

LINES = [
    "The quick brown fox jumps over the lazy dog, and then it doesn't run any more than 1234 times.",
    "زبان فارسی از راست به چپ نوشته می‌شود و کتاب‌های بسیاری به این زبان نوشته شده است.",
    "def fold(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n",
    "東京は日本の首都です。人口は約千四百万人。",
    "Emoji 👩‍👩‍👧‍👦 👋🏽 🏳️‍🌈 and words: naïve, Straße, İstanbul.",
] * 4

CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=CHAT_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def train_wordpiece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and GGUF types in SentencePiece's order: control tokens, bytes, merged pieces, characters."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    by_id = sorted(backend.get_vocab().items(), key=lambda entry: entry[1])
    merged = [token for token, _ in by_id if len(token) > 1]
    characters = [token for token, _ in by_id if len(token) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *characters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(characters))]
    types = [2, 3, 3, *([6] * 256), *([1] * (len(merged) + len(characters)))]
    return tokens, scores, types


@pytest.fixture(scope="session")
def lines() -> list[str]:
    return LINES


@pytest.fixture(scope="session")
def sentencepiece_metadata() -> dict[str, Any]:
    tokens, scores, types = sentencepiece_vocabulary()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="session")
def byte_level_metadata(byte_level: Tokenizer) -> dict[str, Any]:
    model = json.loads(byte_level.backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=lambda token: int(model["vocab"][token]))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *([1] * (len(tokens) - 3))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return Tokenizer(train_byte_level(), special_tokens=special)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(sentencepiece_metadata)


@pytest.fixture(scope="session")
def metaspace(sentencepiece: Tokenizer) -> Tokenizer:
    """SentencePiece's BPE in the newer layout: spaces made visible by a pre-tokeniser and by the decoder."""
    description = json.loads(sentencepiece.backend.to_str())
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    description["normalizer"], description["pre_tokenizer"] = None, space
    description["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, space, {"type": "Fuse"}]}
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    return Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    return Tokenizer(train_wordpiece(), special_tokens={"unk_token": "[UNK]", "pad_token": "[PAD]"})


@pytest.fixture(params=["byte_level", "sentencepiece", "metaspace", "wordpiece"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_gguf: Path) -> dict[str, Any]:
    with GGUFFile.open(smollm2_gguf) as file:
        return {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(smollm2_metadata)
