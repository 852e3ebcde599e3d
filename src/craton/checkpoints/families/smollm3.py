"""SmolLM3: Llama, but every fourth layer has no positions at all (NoPE, Kazemnejad 2023, arXiv 2305.19466).

Particular: `no_rope_layers` is 1 for each layer that rotates and 0 for each that does not; where it is absent,
`no_rope_layer_interval` says how often one does not. A window, if one is switched on, holds in the layers without
positions.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import (
    decoder_entries,
    layer_count,
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
from craton.errors import CheckpointError
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import FeedForwardConfig, LayerConfig

DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2_000_000.0,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(**DEFAULTS)
    window = keys.get("sliding_window", int, None) if keys.get("use_sliding_window", bool, False) else None
    rotates = _rotating_layers(keys)
    is_local = read_local_layers(keys, window, lambda number: not rotates[number])
    attention = read_attention(keys, window=window, bias=read_bias(keys))
    feedforward = read_feedforward(keys, bias=keys.get("mlp_bias", bool, False))
    norm = read_norm(keys)
    layers = []
    for rotated, local in zip(rotates, is_local, strict=True):
        switches = ({} if rotated else {"rotary": None}) | ({} if local else {"window": None})
        of_layer = attention.model_copy(update=switches)
        layers.append(LayerConfig(attention=of_layer, feedforward=feedforward, norm=norm))
    return read_decoder(keys, layers)


def _rotating_layers(keys: Keys) -> list[bool]:
    count, interval = layer_count(keys), keys.count("no_rope_layer_interval")
    if not keys.has("no_rope_layers"):
        return [(number + 1) % interval != 0 for number in range(count)]
    flags = keys.need("no_rope_layers", list)
    if len(flags) != count or any(flag not in (0, 1) for flag in flags):
        raise CheckpointError(
            f"'no_rope_layers' must hold a 0 or 1 for each of the {count} layers",
            where=f"{keys.where}: key 'no_rope_layers'",
        )
    return [bool(flag) for flag in flags]


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    layers = config.trunk.layers
    assert isinstance(layers[0].feedforward, FeedForwardConfig)
    windows = write_local_layers(config)
    return write_decoder(
        config,
        "SmolLM3ForCausalLM",
        "smollm3",
        attention_bias=bool(layers[0].attention.bias),
        mlp_bias=layers[0].feedforward.bias,
        no_rope_layers=[int(layer.attention.rotary is not None) for layer in layers],
        use_sliding_window=windows["sliding_window"] is not None,
        **windows,
    )


SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    entries=decoder_entries,  # type: ignore[arg-type]
)
