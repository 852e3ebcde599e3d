"""Phi-3 mini and medium, Phi-3.5 mini, Phi-4 and Phi-4-mini.

Particular: q, k and v lie in one matrix, gate and up in another; only a part of each head may rotate (Phi-4-mini);
the long contexts come from longrope with one list of factors for sequences within the original context and one for
those beyond it.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import (
    decoder_entries,
    layer_count,
    read_attention,
    read_decoder,
    read_feedforward,
    read_norm,
    write_decoder,
)
from craton.checkpoints.families.family import Family, Keys, rotary_keys
from craton.checkpoints.names import Entry, row_parts, same
from craton.errors import CheckpointError
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import FeedForwardConfig, LayerConfig


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    scaling = rotary_keys(keys)
    original = scaling.get("original_max_position_embeddings", int, 4096)
    keys = keys.defaulting(max_position_embeddings=4096, original_max_position_embeddings=original, rms_norm_eps=1e-5)
    keys.refuse("attention_bias", False)
    layer = LayerConfig(
        attention=read_attention(keys, window=keys.get("sliding_window", int, None)),
        feedforward=read_feedforward(keys),
        norm=read_norm(keys),
    )
    rotary = layer.attention.rotary
    if rotary is not None and rotary.scaling is not None and rotary.scaling.kind != "longrope":
        raise CheckpointError(
            f"Phi-3 knows no rope scaling but longrope, not {rotary.scaling.kind!r}", where=scaling.where
        )
    return read_decoder(keys, (layer,) * layer_count(keys))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    attention = config.trunk.layers[0].attention
    extra: dict[str, Any] = {"sliding_window": attention.window}
    if attention.rotary is not None and attention.rotary.scaling is not None:
        extra["original_max_position_embeddings"] = attention.rotary.scaling.original_context
    return write_decoder(config, "Phi3ForCausalLM", "phi3", **extra)


def attention_entries(layer: LayerConfig, theirs: str, ours: str) -> list[Entry]:
    """One layer's attention."""
    theirs, ours, config = f"{theirs}.self_attn", f"{ours}.attention", layer.attention
    sizes = [heads * config.head_size for heads in (config.heads, config.kv_heads, config.kv_heads)]
    return [
        row_parts(f"{theirs}.qkv_proj.weight", [f"{ours}.{part}.weight" for part in ("q", "k", "v")], sizes),
        same(f"{theirs}.o_proj.weight", f"{ours}.o.weight"),
    ]


def feedforward_entries(layer: LayerConfig, theirs: str, ours: str) -> list[Entry]:
    """One layer's feed-forward."""
    assert isinstance(layer.feedforward, FeedForwardConfig)
    theirs, ours, hidden = f"{theirs}.mlp", f"{ours}.feedforward", layer.feedforward.hidden
    return [
        row_parts(f"{theirs}.gate_up_proj.weight", [f"{ours}.gate.weight", f"{ours}.up.weight"], [hidden, hidden]),
        same(f"{theirs}.down_proj.weight", f"{ours}.down.weight"),
    ]


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, CausalLMConfig)
    return decoder_entries(config, attention=attention_entries, feedforward=feedforward_entries)


PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
)
