"""A speech model before its first step: the shape, tokeniser and weights of a fresh one, the window of any."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from craton.errors import UsageError
from craton.modalities.audio import FRAMES_PER_SECOND
from craton.modalities.audio.speech_tokens import SECONDS_PER_TIME
from craton.modalities.text import Tokenizer, tokenizer_json
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.models import Seq2Seq, Seq2SeqConfig
from craton.models.initialisation import initialise
from craton.trunk import (
    AttentionConfig,
    CrossAttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LearnedPositions,
    NormConfig,
    TrunkConfig,
)

STEP: Final = 32  # widths are multiples of it, and heads have so many numbers
DECODER_LAYERS: Final = 2
END: Final = "<|endoftext|>"
# In Whisper's order; languages would stand behind the first.
CONTROL: Final = (
    "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>",
    "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip
_NORM: Final = NormConfig(kind="layer", eps=1e-5, bias=True)
_BIAS: Final = ("q", "v", "o")


def speech_config(parameters: int, *, seconds: int, mels: int, vocab: int, context: int) -> Seq2SeqConfig:
    """A Whisper of about so many parameters that hears windows of so many seconds.

    The encoder has 4 + width / 128 layers, as models of texts have; the decoder two, which are
    what each token costs (Distil-Whisper, Gandhi 2023, arXiv 2311.00430).
    """

    def depth(width: int) -> int:
        return round(4 + width / 128)

    def count(width: int) -> int:
        layers = 12 * depth(width) + 16 * DECODER_LAYERS
        return layers * width**2 + 3 * width * (mels + width) + width * (vocab + context)

    width = min(range(2 * STEP, 4097, STEP), key=lambda w: abs(math.log(count(w) / parameters)))
    frames, heads = seconds * FRAMES_PER_SECOND // 2, width // STEP

    def trunk(layers: int, positions: int, cross: CrossAttentionConfig | None) -> TrunkConfig:
        layer = LayerConfig(
            attention=AttentionConfig(
                heads=heads, kv_heads=heads, head_size=STEP, mask="causal" if cross else "full", bias=_BIAS
            ),
            feedforward=FeedForwardConfig(hidden=4 * width, activation="gelu", bias=True),
            norm=_NORM,
            cross_attention=cross,
        )
        return TrunkConfig(
            width=width, layers=(layer,) * layers, positions=LearnedPositions(count=positions), final_norm=_NORM
        )

    cross = CrossAttentionConfig(heads=heads, kv_heads=heads, head_size=STEP, context_width=width, bias=_BIAS)
    return Seq2SeqConfig(
        vocab=vocab,
        context=context,
        mels=mels,
        frames=frames,
        encoder=trunk(depth(width), frames, None),
        decoder=trunk(DECODER_LAYERS, context, cross),
    )


def fresh_model(config: Seq2SeqConfig, seed: int) -> Seq2Seq:
    """Fresh weights; the encoder's positions are sinusoids, as Whisper's are."""
    model = Seq2Seq(config)
    initialise(model, seed)
    with torch.no_grad():
        _positions(model).copy_(sinusoids(config.frames, config.encoder.width))
    return model


def let_all_be_trained(model: Seq2Seq) -> None:
    """But for the encoder's positions, which stay as they are (Radford 2022, section 2.2)."""
    model.requires_grad_(True)
    _positions(model).requires_grad_(False)


def shortened(model: Seq2Seq, frames: int) -> Seq2Seq:
    """The same model for windows of fewer vectors: the first of its encoder's positions, the same weights else.

    Raises UsageError for more than it has.
    """
    config = model.config
    if frames > config.frames:
        raise UsageError(
            f"the model hears {2 * config.frames / FRAMES_PER_SECOND:g} s at once",
            where="--window",
            remedy="ask for no more than that",
        )
    encoder = config.encoder.model_copy(update={"positions": LearnedPositions(count=frames)})
    with torch.device("meta"):
        short = Seq2Seq(config.model_copy(update={"frames": frames, "encoder": encoder}))
    state = {**model.state_dict(), "encoder.positions.weight": _positions(model).detach()[:frames].clone()}
    short.load_state_dict(state, assign=True)
    if config.tied:
        short.head.weight = short.embedding.weight
    return short


def _positions(model: Seq2Seq) -> Tensor:
    assert model.encoder.positions is not None
    return model.encoder.positions.weight


def sinusoids(count: int, width: int) -> Tensor:
    """[count, width]: sines, then cosines, of wavelengths from 2 pi to 20,000 pi (Vaswani 2017, section 3.5)."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def speech_tokenizer(texts: Sequence[str], vocab: int, seconds: int) -> Tokenizer:
    """A tokeniser in Whisper's form, learnt on texts that begin with a space: pieces, <|endoftext|>, control tokens, a
    time for every 0.02 s of the window. vocab: tokens without the times, at most.

    Raises UsageError for fewer than the 256 bytes and the special ones take.
    """
    learnt = TokenizerSettings(vocab=vocab)
    tokens = vocab - len(CONTROL) - 1 + len(learnt.special)  # those of chats are not kept
    if tokens < len(learnt.special) + 256:
        raise UsageError(
            f"{vocab} tokens are too few for the bytes and the special ones",
            where="--vocab",
            remedy=f"ask for {256 + len(CONTROL) + 1} or more",
        )
    plain = train_tokenizer([f" {text}" for text in texts], TokenizerSettings(vocab=tokens))
    description = json.loads(plain.backend.to_str())
    ids = description["model"]["vocab"]
    pieces = [token for token in sorted(ids, key=ids.__getitem__) if token not in learnt.special]
    times = [f"<|{number * SECONDS_PER_TIME:.2f}|>" for number in range(round(seconds / SECONDS_PER_TIME) + 1)]
    special = [END, *CONTROL, *times]
    description["model"]["vocab"] = {token: number for number, token in enumerate([*pieces, *special])}
    # Times are no special tokens in Whisper's own files either: they are read in a text, not left out of it.
    description["added_tokens"] = [
        tokenizer_json.added_token(token, len(pieces) + place, special=place <= len(CONTROL))
        for place, token in enumerate(special)
    ]
    backend = tokenizer_json.build(description, where="the tokeniser just learnt")
    return Tokenizer(backend, special_tokens={"bos_token": END, "eos_token": END, "pad_token": END})
