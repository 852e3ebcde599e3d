"""A small tokeniser for the tests of shards: bytes and a few merges, trained in milliseconds."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from craton.modalities.text import Tokenizer

CORPUS = ["The quick brown fox jumps over the lazy dog until 12:30.", "زبان فارسی از راست به چپ نوشته می‌شود."] * 3


def byte_tokenizer(vocab_size: int = 400, template: str | None = None) -> Tokenizer:
    """Byte-level BPE with an end token, and a chat template if one is given."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    templates = {} if template is None else {"default": template}
    return Tokenizer(backend, special_tokens={"eos_token": "<|end|>"}, chat_templates=templates)


@pytest.fixture(scope="session")
def bytes_bpe() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_bpe() -> Tokenizer:
    """With a template that ends each turn."""
    return byte_tokenizer(
        template="{% for message in messages %}"
        "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
    )
