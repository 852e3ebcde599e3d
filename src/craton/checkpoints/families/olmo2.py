"""OLMo 2 (arXiv 2501.00656), 1B to 32B.

Particular: the norms stand on what each branch gives back and not on what it reads; queries and keys are normed over
all of their heads at once.
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
    read_norm,
    write_decoder,
)
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.names import Entry
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import LayerConfig

NORMS = {
    "attention_norm.output": "post_attention_layernorm",
    "feedforward_norm.output": "post_feedforward_layernorm",
}


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(max_position_embeddings=2048, rms_norm_eps=1e-5)
    norm = read_norm(keys)
    layer = LayerConfig(
        attention=read_attention(keys, bias=read_bias(keys), qk_norm=norm, qk_norm_over="width"),
        feedforward=read_feedforward(keys),
        norm=norm,
        attention_norms=("output",),
        feedforward_norms=("output",),
    )
    return read_decoder(keys, (layer,) * layer_count(keys))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    bias = bool(config.trunk.layers[0].attention.bias)
    return write_decoder(config, "Olmo2ForCausalLM", "olmo2", attention_bias=bias)


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, CausalLMConfig)
    return decoder_entries(config, NORMS)


OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
)
