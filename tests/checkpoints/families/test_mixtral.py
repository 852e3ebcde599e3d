"""Mixtral."""

from __future__ import annotations

import pytest

from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.mixtral import MIXTRAL
from craton.errors import CheckpointError

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-3,
}

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


@pytest.mark.peer
@pytest.mark.parametrize(
    "odd",
    [
        {"num_local_experts": 5, "num_experts_per_tok": 3, "num_key_value_heads": 2, "head_dim": 24},
        {"num_local_experts": 4, "num_key_value_heads": 1, "sliding_window": 9, "tie_word_embeddings": True},
    ],
    ids=["three-of-five", "window-tied"],
)
def test_mixtral(check_causal, odd):
    transformers = pytest.importorskip("transformers")
    check_causal(transformers.MixtralConfig(**SMALL, **odd, max_position_embeddings=128))


def test_defaults_are_the_familys_own():
    values = {key: value for key, value in SMALL.items() if key != "rms_norm_eps"} | {"num_attention_heads": 8}
    config = MIXTRAL.config(Keys(values, "config.json"))
    layer = config.trunk.layers[0]
    assert layer.attention.rotary.theta == 1e6
    assert layer.norm.eps == 1e-5
    assert (layer.feedforward.count, layer.feedforward.per_token) == (8, 2)
    assert config.context == 131072


def test_more_experts_a_token_than_there_are():
    keys = Keys({**SMALL, "num_key_value_heads": 4, "num_local_experts": 2, "num_experts_per_tok": 3}, "config.json")
    with pytest.raises(CheckpointError, match="3 of 2 experts"):
        MIXTRAL.config(keys)


@pytest.mark.peer
def test_published_keys(read_published):
    config = read_published(MIXTRAL_8X7B)
    assert config.trunk.layers[0].attention.rotary.theta == 1e6


@pytest.mark.peer
def test_absent_keys(read_published):
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    read_published({key: MIXTRAL_8X7B[key] for key in ("architectures", "model_type", *sizes)})
