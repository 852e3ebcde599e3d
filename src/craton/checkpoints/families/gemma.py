"""Gemma, Gemma 2 (arXiv 2408.00118) and the text models of Gemma 3 (arXiv 2503.19786).

Particular to all: RMSNorm scales by 1 + w, embeddings are multiplied by the root of the width, heads have a size of
their own, the head is tied. Gemma 2 and 3 norm what each branch reads and what it gives back, scale q.k by
`query_pre_attn_scalar`, and have layers that see a window only: every other one in Gemma 2, five of six in Gemma 3.
Gemma 2 caps attention scores and logits softly. Gemma 3 norms queries and keys instead, and its local layers rotate
by a theta of their own, which the scaling for long contexts leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from craton.checkpoints.families.decoder import (
    decoder_entries,
    layer_count,
    read_activation,
    read_attention,
    read_bias,
    read_decoder,
    read_feedforward,
    read_head_size,
    read_local_layers,
    read_norm,
    write_activation,
    write_decoder,
    write_local_layers,
)
from craton.checkpoints.families.family import Family, Keys, read_rotary, write_rotary
from craton.checkpoints.names import Entry
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig
from craton.trunk.config import Activation, NormPlace

SANDWICH_NORMS: Mapping[str, str] = {
    "attention_norm.input": "input_layernorm",
    "attention_norm.output": "post_attention_layernorm",
    "feedforward_norm.input": "pre_feedforward_layernorm",
    "feedforward_norm.output": "post_feedforward_layernorm",
}

GEMMA1_DEFAULTS = {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GEMMA2_DEFAULTS = GEMMA1_DEFAULTS | {
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3_DEFAULTS = GEMMA1_DEFAULTS | {
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


def read_gemma1(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(**GEMMA1_DEFAULTS)
    activation = read_activation(keys, default="gelu_pytorch_tanh")
    # The first files say "gelu" and mean its tanh form, with which the models were trained.
    activation = "gelu_tanh" if activation == "gelu" else activation
    attention = read_attention(keys, bias=read_bias(keys))
    return _read(keys, [attention] * layer_count(keys), activation, ("input",))


def read_gemma2(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(**GEMMA2_DEFAULTS)
    window = keys.get("sliding_window", int, None)
    local = read_attention(
        keys,
        bias=read_bias(keys),
        scale=keys.count("query_pre_attn_scalar") ** -0.5,
        softcap=keys.get("attn_logit_softcapping", float, None),
        window=window,
    )
    everywhere = local.model_copy(update={"window": None})
    is_local = read_local_layers(keys, window, lambda number: number % 2 == 0)
    activation = read_activation(keys, "hidden_activation", "gelu_pytorch_tanh")
    return _read(keys, [local if here else everywhere for here in is_local], activation, ("input", "output"))


def read_gemma3(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(**GEMMA3_DEFAULTS)
    keys.refuse("attn_logit_softcapping", None)
    window, pattern = keys.get("sliding_window", int, None), keys.count("sliding_window_pattern")
    size, local_theta = read_head_size(keys), keys.need("rope_local_base_freq", float)
    local_keys = Keys({**keys.values, "rope_theta": local_theta, "rope_scaling": None}, keys.where)
    local = read_attention(
        keys,
        bias=read_bias(keys),
        scale=keys.count("query_pre_attn_scalar") ** -0.5,
        qk_norm=read_norm(keys, offset=1.0),
        rotary=read_rotary(local_keys, size, layer_type="sliding_attention"),
        window=window,
    )
    rotary = read_rotary(keys, size, layer_type="full_attention")
    everywhere = local.model_copy(update={"rotary": rotary, "window": None})
    is_local = read_local_layers(keys, window, lambda number: (number + 1) % pattern != 0)
    activation = read_activation(keys, "hidden_activation", "gelu_pytorch_tanh")
    return _read(keys, [local if here else everywhere for here in is_local], activation, ("input", "output"))


def _read(
    keys: Keys, attentions: Sequence[AttentionConfig], activation: Activation, places: tuple[NormPlace, ...]
) -> CausalLMConfig:
    keys.refuse("use_bidirectional_attention", False)
    norm, feedforward = read_norm(keys, offset=1.0), read_feedforward(keys, activation=activation)
    layers = [
        LayerConfig(
            attention=attention, feedforward=feedforward, norm=norm, attention_norms=places, feedforward_norms=places
        )
        for attention in attentions
    ]
    return read_decoder(
        keys,
        layers,
        embedding_scale=keys.count("hidden_size") ** 0.5,
        logit_softcap=keys.get("final_logit_softcapping", float, None),
    )


def write_gemma1(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    return _write(config, "GemmaForCausalLM", "gemma")


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    softcap = config.trunk.layers[0].attention.softcap
    return _write(config, "Gemma2ForCausalLM", "gemma2", **_write_sandwich(config), attn_logit_softcapping=softcap)


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    extra = _write_sandwich(config)
    rotaries = {
        kind: write_rotary(layer.attention.rotary)
        for kind, layer in zip(extra["layer_types"], config.trunk.layers, strict=True)
        if layer.attention.rotary is not None
    }
    return _write(config, "Gemma3ForCausalLM", "gemma3_text", **extra, rope_parameters=rotaries)


def _write_sandwich(config: CausalLMConfig) -> dict[str, Any]:
    layer = config.trunk.layers[0]
    assert isinstance(layer.feedforward, FeedForwardConfig)
    assert layer.attention.scale is not None
    return {
        "hidden_activation": write_activation(layer.feedforward.activation),
        "query_pre_attn_scalar": round(layer.attention.scale**-2),
        "final_logit_softcapping": config.logit_softcap,
        **write_local_layers(config),
    }


def _write(config: ModelConfig, architecture: str, model_type: str, **extra: Any) -> dict[str, Any]:
    assert isinstance(config, CausalLMConfig)
    bias = bool(config.trunk.layers[0].attention.bias)
    return write_decoder(config, architecture, model_type, attention_bias=bias, **extra)


def sandwich_entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of Gemma 2 and 3."""
    assert isinstance(config, CausalLMConfig)
    return decoder_entries(config, SANDWICH_NORMS)


GEMMA1 = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    read_config=read_gemma1,
    write_config=write_gemma1,
    entries=decoder_entries,  # type: ignore[arg-type]
)

GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    read_config=read_gemma2,
    write_config=write_gemma2,
    entries=sandwich_entries,
)

GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    read_config=read_gemma3,
    write_config=write_gemma3,
    entries=sandwich_entries,
)
