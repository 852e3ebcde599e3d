"""FLOPs of a token, by hand and by torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from craton.models import CausalLM, CausalLMConfig, Encoder, EncoderConfig
from craton.models.masked_lm import MaskedLM, MaskedLMConfig
from craton.training.flops import token_flops
from craton.trunk import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    NormConfig,
    RotaryConfig,
    TrunkConfig,
    replace_linears,
)

NORM = NormConfig(kind="rms")
DENSE = FeedForwardConfig(hidden=24, activation="silu", gated=True)
# q and o: 16 * 4 * 4 each; k and v: 16 * 2 * 4 each; gate, up and down.
LAYER = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24
HEAD = 16 * 50


def trunk(feedforward=DENSE, window=None, mask="causal"):
    attention = AttentionConfig(
        heads=4, kv_heads=2, head_size=4, mask=mask, window=window, rotary=RotaryConfig(dims=4) if window else None
    )
    layer = LayerConfig(attention=attention, feedforward=feedforward, norm=NORM)
    return TrunkConfig(width=16, layers=(layer,) * 3, final_norm=NORM)


def causal(tied=True, **switches):
    return CausalLM(CausalLMConfig(vocab=50, context=64, trunk=trunk(**switches), tied=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_model_by_hand(tied):
    flops = token_flops(causal(tied), 10)
    assert flops.forward == 2 * (3 * LAYER + HEAD) + 3 * 4 * 16 * 10
    assert flops.training == 6 * (3 * LAYER + HEAD) + 3 * 12 * 16 * 10


def test_a_token_sees_no_more_than_the_window():
    assert token_flops(causal(window=7), 64) == token_flops(causal(), 7)
    assert token_flops(causal(window=7), 5) == token_flops(causal(), 5)


def test_of_routed_experts_those_that_a_token_reaches_and_the_router_whole():
    experts = ExpertsConfig(count=8, per_token=2, expert=DENSE, shared=DENSE)
    difference = token_flops(causal(feedforward=experts), 10).training - token_flops(causal(), 10).training
    assert difference == 6 * 3 * (2 * 3 * 16 * 24 + 16 * 8)


def test_frozen_weights_pass_the_gradient_on_and_take_none():
    model = causal()
    before = token_flops(model, 10)
    model.requires_grad_(False)

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
            self.a, self.b = (
                nn.Parameter(torch.zeros(2, base.in_features)),
                nn.Parameter(torch.zeros(base.out_features, 2)),
            )

    replace_linears(model, lambda name, _: name.endswith(".q"), lambda _, base: Adapted(base))
    adapter = 3 * 2 * (16 + 16)
    flops = token_flops(model, 10)
    assert flops.forward == before.forward + 2 * adapter
    assert flops.training == 4 * (3 * LAYER + HEAD) + 6 * adapter + 3 * 12 * 16 * 10


def test_packed_weights_count_by_their_shape():
    model = causal().requires_grad_(False)

    class Packed(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.in_features, self.out_features = base.in_features, base.out_features

    before = token_flops(model, 10)
    replace_linears(model, lambda _, module: isinstance(module, nn.Linear), lambda _, base: Packed(base))
    assert token_flops(model, 10) == before


def test_the_head_of_a_masked_language_model_is_its_embedding():
    encoder = EncoderConfig(vocab=50, context=64, trunk=trunk(mask="full"))
    model = MaskedLM(MaskedLMConfig(encoder=encoder, activation="gelu", norm=NormConfig(kind="layer")))
    assert token_flops(model, 10).forward - token_flops(Encoder(encoder), 10).forward == 2 * (HEAD + 16 * 16)


def test_torch_counts_the_same():
    model, length = causal(), 32
    ids = torch.randint(50, (length,))
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = model(ids, torch.arange(length)).sum()
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        loss.backward()
    flops = token_flops(model, length)
    assert forward.get_total_flops() == flops.forward * length
    assert forward.get_total_flops() + backward.get_total_flops() == flops.training * length
