"""Mixtral 8x7B and 8x22B: Mistral's attention with a mixture of experts in every layer.

Particular: the experts lie in `block_sparse_moe`, their matrices called w1 (gate), w3 (up) and w2 (down); the weights
of the chosen experts always sum to one.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import (
    decoder_entries,
    experts_entries,
    layer_count,
    read_attention,
    read_decoder,
    read_experts,
    read_feedforward,
    read_norm,
    write_decoder,
)
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.names import Entry
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import ExpertsConfig, LayerConfig


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(
        max_position_embeddings=131072,
        num_key_value_heads=8,
        num_experts_per_tok=2,
        num_local_experts=8,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
    )
    layer = LayerConfig(
        attention=read_attention(keys, window=keys.get("sliding_window", int, None)),
        feedforward=read_experts(keys, "num_local_experts", read_feedforward(keys)),
        norm=read_norm(keys),
    )
    return read_decoder(keys, (layer,) * layer_count(keys))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    layer = config.trunk.layers[0]
    experts = layer.feedforward
    assert isinstance(experts, ExpertsConfig)
    return write_decoder(
        config,
        "MixtralForCausalLM",
        "mixtral",
        num_local_experts=experts.count,
        num_experts_per_tok=experts.per_token,
        sliding_window=layer.attention.window,
    )


def experts(layer: LayerConfig, theirs: str, ours: str) -> list[Entry]:
    """The experts of one layer."""
    assert isinstance(layer.feedforward, ExpertsConfig)
    return experts_entries(layer.feedforward, f"{theirs}.block_sparse_moe", f"{ours}.feedforward", ("w1", "w3", "w2"))


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, CausalLMConfig)
    return decoder_entries(config, feedforward=experts)


MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
