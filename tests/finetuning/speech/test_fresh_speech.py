"""A fresh speech model: its size, its tokeniser, its window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import UsageError
from craton.finetuning.speech.fresh import (
    CONTROL,
    fresh_model,
    let_all_be_trained,
    shortened,
    sinusoids,
    speech_config,
    speech_tokenizer,
)
from craton.modalities.audio import SpeechTokens
from craton.models import Seq2Seq

TEXTS = ("seven", "seven eight", "Größe, سلام")


@pytest.mark.parametrize("parameters", [500_000, 2_000_000, 20_000_000])
def test_a_model_is_about_as_large_as_was_asked(parameters):
    config = speech_config(parameters, seconds=1, mels=80, vocab=400, context=64)
    assert 0.7 < sum(p.numel() for p in Seq2Seq(config).parameters()) / parameters < 1.4
    assert config.frames == 50


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=30))
def test_every_text_comes_back(text):
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text or "<|" in text


def _tokenizer(made=[]):  # noqa: B006  (learnt once)
    if not made:
        made.append(speech_tokenizer(TEXTS, 300, 2))
    return made[0]


def test_a_tokeniser_has_whispers_control_tokens_and_its_windows_times():
    tokenizer = _tokenizer()
    tokens = SpeechTokens.of(tokenizer, tokenizer.vocab_size, multilingual=False)
    assert tokens.end < tokens.start < tokens.translate < tokens.transcribe < tokens.no_times
    assert tokens.seconds(tokenizer.vocab_size - 1) == 2.0
    assert tokenizer.backend.id_to_token(tokens.first_time + 1) == "<|0.02|>"
    assert tokenizer.vocab_size <= 300 + 101
    assert tokenizer.encode(" seven", add_special_tokens=False)[-1] < tokens.end
    # The same texts give the same tokeniser.
    assert speech_tokenizer(TEXTS, 300, 2).backend.to_str() == tokenizer.backend.to_str()
    with pytest.raises(UsageError, match="too few"):
        speech_tokenizer(TEXTS, 256 + len(CONTROL), 2)
    assert speech_tokenizer(TEXTS, 256 + len(CONTROL) + 1, 1)


def test_fresh_weights_depend_on_the_seed_alone_and_positions_are_whispers():
    config = speech_config(60_000, seconds=1, mels=20, vocab=300, context=16)
    one, again, other = (fresh_model(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["front.conv1.weight"], other["front.conv1.weight"])
    assert 0.8 < float(one["front.conv2.weight"].std()) * (3 * config.encoder.width) ** 0.5 < 1.2
    table = one["encoder.positions.weight"]
    assert torch.equal(table, sinusoids(50, config.encoder.width))
    assert torch.equal(table[0, : config.encoder.width // 2], torch.zeros(config.encoder.width // 2))
    model = fresh_model(config, 0)
    let_all_be_trained(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["encoder.positions.weight"]


def test_a_shorter_window_is_the_beginning_of_a_longer_one():
    config = speech_config(60_000, seconds=2, mels=20, vocab=300, context=16)
    model = fresh_model(config, 0)
    short = shortened(model, 50)
    assert short.config.frames == 50
    assert short.head.weight is short.embedding.weight
    mel_BMF = torch.randn(2, 20, 100)
    with torch.inference_mode():
        assert torch.equal(short.encode(mel_BMF), model.encode(mel_BMF))
    with pytest.raises(UsageError, match="hears 2 s at once"):
        shortened(model, 101)
