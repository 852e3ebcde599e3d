"""Mistral 7B, Nemo, Small and Codestral, and what was trained from them (Zephyr, OpenHermes): Llama with a window.

Particular: the window, where there is one, holds in every layer. The later models have none and say so by a null,
while a config that does not name it means 4096.
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
from craton.checkpoints.families.family import Family, Keys
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import LayerConfig


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131072)
    keys.refuse("layer_types", None)  # windows in some of the layers make it another architecture, Ministral
    layer = LayerConfig(
        attention=read_attention(keys, window=keys.get("sliding_window", int, None)),
        feedforward=read_feedforward(keys),
        norm=read_norm(keys),
    )
    return read_decoder(keys, (layer,) * layer_count(keys))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    window = config.trunk.layers[0].attention.window
    return write_decoder(config, "MistralForCausalLM", "mistral", sliding_window=window)


MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    entries=decoder_entries,  # type: ignore[arg-type]
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
