"""Llama 2 and 3, and what shares its architecture name: SmolLM2, TinyLlama, Yi and others."""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import (
    decoder_entries,
    layer_count,
    read_attention,
    read_feedforward,
    read_norm,
    write_decoder,
)
from craton.checkpoints.families.family import Family, Keys
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import LayerConfig, TrunkConfig


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    norm = read_norm(keys)
    attention = read_attention(keys, bias=("q", "k", "v", "o") if keys.get("attention_bias", bool, False) else ())
    feedforward = read_feedforward(keys, bias=keys.get("mlp_bias", bool, False))
    layer = LayerConfig(attention=attention, feedforward=feedforward, norm=norm)
    return CausalLMConfig(
        vocab=keys.need("vocab_size", int),
        context=keys.get("max_position_embeddings", int, 2048),
        tied=keys.get("tie_word_embeddings", bool, False),
        trunk=TrunkConfig(width=keys.need("hidden_size", int), layers=(layer,) * layer_count(keys), final_norm=norm),
    )


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
