"""Small models and data for the loop's tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from craton.data.example import Example, next_token_targets
from craton.models import CausalLM, CausalLMConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig

VOCAB = 64


def make_model(seed: int = 0, **switches) -> CausalLM:
    torch.manual_seed(seed)
    layer = LayerConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=8, rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=48, activation="silu", gated=True),
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=32, layers=(layer,) * 2, final_norm=NormConfig(kind="rms"))
    model = CausalLM(CausalLMConfig(**{"vocab": VOCAB, "context": 64, "trunk": trunk, "tied": True} | switches))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.05)
    return model


def make_examples(count: int = 24, seed: int = 0, empty: tuple[int, ...] = ()) -> list[Example]:
    """Sequences of unequal length with masks of unequal share; those in `empty` train nothing."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        n = int(rng.integers(3, 40))
        trained = np.zeros(n, bool) if i in empty else rng.random(n) < rng.random()
        examples.append(Example((next_token_targets(rng.integers(0, VOCAB, n), trained),), origin=f"data:{i + 1}"))
    return examples


@pytest.fixture
def model() -> CausalLM:
    return make_model()
