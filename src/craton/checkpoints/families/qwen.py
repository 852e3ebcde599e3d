"""Qwen's dense models: Qwen 1.5, 2 and 2.5 (`Qwen2ForCausalLM`), QwQ, R1's distillations of them, and Qwen 3.

Particular: the layers from `max_window_layers` on see only a window, where `use_sliding_window` switches it on.
Qwen 2 has biases on queries, keys and values and none elsewhere; Qwen 3 has none, but norms each query and key head,
whose size is free.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import (
    decoder_entries,
    read_attention,
    read_bias,
    read_decoder,
    read_feedforward,
    read_local_layers,
    read_norm,
    write_decoder,
    write_local_layers,
)
from craton.checkpoints.families.family import Family, Keys
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import LayerConfig

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_qwen2(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys.refuse("use_mrope", False)
    return _read(keys.defaulting(**DEFAULTS), bias=("q", "k", "v"))


def read_qwen3(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(**DEFAULTS, head_dim=128)
    return _read(keys, bias=read_bias(keys), qk_norm=read_norm(keys))


def _read(keys: Keys, **switches: Any) -> CausalLMConfig:
    window = keys.get("sliding_window", int, None) if keys.get("use_sliding_window", bool, False) else None
    first_local = keys.need("max_window_layers", int)
    local = read_attention(keys, window=window, **switches)
    everywhere = local.model_copy(update={"window": None})
    feedforward, norm = read_feedforward(keys), read_norm(keys)
    layers = [
        LayerConfig(attention=local if is_local else everywhere, feedforward=feedforward, norm=norm)
        for is_local in read_local_layers(keys, window, lambda number: number >= first_local)
    ]
    return read_decoder(keys, layers)


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    return _write(config, "Qwen2ForCausalLM", "qwen2")


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    bias = bool(config.trunk.layers[0].attention.bias)
    return _write(config, "Qwen3ForCausalLM", "qwen3", attention_bias=bias)


def _write(config: ModelConfig, architecture: str, model_type: str, **extra: Any) -> dict[str, Any]:
    assert isinstance(config, CausalLMConfig)
    windows = write_local_layers(config)
    # For what is older than `layer_types`: the number of layers before the first local one.
    before = (windows["layer_types"] + ["sliding_attention"]).index("sliding_attention")
    extra |= windows | {"use_sliding_window": windows["sliding_window"] is not None, "max_window_layers": before}
    return write_decoder(config, architecture, model_type, **extra)


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read_config=read_qwen2,
    write_config=write_qwen2,
    entries=decoder_entries,  # type: ignore[arg-type]
)

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read_config=read_qwen3,
    write_config=write_qwen3,
    entries=decoder_entries,  # type: ignore[arg-type]
)
