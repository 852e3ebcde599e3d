"""Llama 2 and 3, and what shares its architecture name: SmolLM2, TinyLlama, Yi and others."""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import (
    decoder_entries,
    layer_count,
    read_attention,
    read_bias,
    read_decoder,
    read_feedforward,
    read_norm,
    write_decoder,
)
from craton.checkpoints.families.family import Family, Keys
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import LayerConfig


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(max_position_embeddings=2048)
    norm = read_norm(keys)
    attention = read_attention(keys, bias=read_bias(keys))
    feedforward = read_feedforward(keys, bias=keys.get("mlp_bias", bool, False))
    layer = LayerConfig(attention=attention, feedforward=feedforward, norm=norm)
    return read_decoder(keys, (layer,) * layer_count(keys))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    layer = config.trunk.layers[0]
    bias = {"attention_bias": bool(layer.attention.bias), "mlp_bias": layer.feedforward.bias}
    return write_decoder(config, "LlamaForCausalLM", "llama", **bias)


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    entries=decoder_entries,  # type: ignore[arg-type]
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
