"""Qwen's mixtures of experts: Qwen3-30B-A3B and 235B-A22B; Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B.

Particular: some layers may be dense (`mlp_only_layers`, `decoder_sparse_step`); the chosen weights sum to one only
with `norm_topk_prob`. Qwen3 norms queries and keys; Qwen2 has biases on q, k and v, and a shared expert that each
token weighs by a sigmoid of its own.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import (
    decoder_entries,
    feedforward_entries,
    feedforward_kinds,
    layer_count,
    mlp_entries,
    read_attention,
    read_bias,
    read_decoder,
    read_experts,
    read_feedforward,
    read_norm,
    write_decoder,
)
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.names import Entry, same
from craton.errors import CheckpointError
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import AttentionConfig, ExpertsConfig, FeedForwardConfig, LayerConfig


def read_qwen3(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    # transformers 5 writes `num_local_experts`, the published files say `num_experts`.
    keys = keys.defaulting(
        max_position_embeddings=32768,
        num_key_value_heads=4,
        num_experts_per_tok=8,
        num_experts=keys.get("num_local_experts", int, 128),
        moe_intermediate_size=768,
    )
    window = keys.get("sliding_window", int, 4096) if keys.get("use_sliding_window", bool, False) else None
    attention = read_attention(keys, bias=read_bias(keys), qk_norm=read_norm(keys), window=window)
    return _read(keys, attention)


def read_qwen2(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys.refuse("use_sliding_window", False)
    keys = keys.defaulting(
        max_position_embeddings=32768,
        num_key_value_heads=16,
        num_experts_per_tok=4,
        num_experts=60,
        moe_intermediate_size=1408,
    )
    attention = read_attention(keys, bias=("q", "k", "v") if keys.get("qkv_bias", bool, True) else ())
    shared = read_feedforward(keys, hidden=keys.get("shared_expert_intermediate_size", int, 5632))
    return _read(keys, attention, shared=shared, shared_gate=True)


def _read(keys: Keys, attention: AttentionConfig, **switches: Any) -> CausalLMConfig:
    norm, count, step = read_norm(keys), layer_count(keys), keys.get("decoder_sparse_step", int, 1)
    if step <= 0:
        raise CheckpointError(f"decoder_sparse_step = {step} is not a step", where=keys.where)
    expert = read_feedforward(keys, hidden=keys.need("moe_intermediate_size", int))
    normalise = keys.get("norm_topk_prob", bool, False)
    experts = read_experts(keys, "num_experts", expert, normalise=normalise, **switches)
    dense_layers = keys.get("mlp_only_layers", list, [])
    sparse = LayerConfig(attention=attention, feedforward=experts, norm=norm)
    dense = LayerConfig(attention=attention, feedforward=read_feedforward(keys), norm=norm)
    return read_decoder(keys, [dense if n in dense_layers or (n + 1) % step else sparse for n in range(count)])


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    attention = config.trunk.layers[0].attention
    switches = {
        "attention_bias": bool(attention.bias),
        "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
    }
    return write_decoder(config, "Qwen3MoeForCausalLM", "qwen3_moe", **switches, **_write_experts(config))


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    bias = bool(config.trunk.layers[0].attention.bias)
    return write_decoder(config, "Qwen2MoeForCausalLM", "qwen2_moe", qkv_bias=bias, **_write_experts(config))


def _write_experts(config: CausalLMConfig) -> dict[str, Any]:
    layers = config.trunk.layers
    values: dict[str, Any] = {
        "mlp_only_layers": [n for n, layer in enumerate(layers) if isinstance(layer.feedforward, FeedForwardConfig)]
    }
    _, experts = feedforward_kinds(config)
    if experts is not None:
        values |= {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.per_token,
            "moe_intermediate_size": experts.expert.hidden,
            "norm_topk_prob": experts.normalise,
        }
        if experts.shared is not None:
            values["shared_expert_intermediate_size"] = experts.shared.hidden
    return values


def feedforward(layer: LayerConfig, theirs: str, ours: str) -> list[Entry]:
    """The feed-forward of one layer, with Qwen2's shared expert."""
    entries, config = mlp_entries(layer, theirs, ours), layer.feedforward
    if isinstance(config, ExpertsConfig) and config.shared is not None:
        theirs, ours = f"{theirs}.mlp.shared_expert", f"{ours}.feedforward.shared"
        entries += feedforward_entries(config.shared, theirs, ours)
        entries.append(same(f"{theirs}_gate.weight", f"{ours}_gate.weight"))
    return entries


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, CausalLMConfig)
    return decoder_entries(config, feedforward=feedforward)


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    read_config=read_qwen3,
    write_config=write_qwen3,
    entries=entries,
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    read_config=read_qwen2,
    write_config=write_qwen2,
    entries=entries,
)
