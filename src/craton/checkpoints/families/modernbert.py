"""ModernBERT base and large, and what is trained from them (GTE-ModernBERT, ModernBERT-embed).

Particular: no biases; the embedding is normed and the first attention therefore not; most layers see only a window of
`local_attention` tokens around each, with a rotary theta of their own; query, key and value in one matrix, and so the
activated and the gating half of the feed-forward. The head of its pretraining is left in the file.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import (
    read_activation,
    read_bias,
    read_local_layers,
    split_width,
    write_activation,
)
from craton.checkpoints.families.family import Family, Keys, read_rotary, write_rotary
from craton.checkpoints.names import Entry, row_parts, same
from craton.errors import CheckpointError
from craton.models import EncoderConfig, ModelConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    window, every = keys.get("local_attention", int, 128), keys.get("global_attn_every_n_layers", int, 3)
    if every <= 0:
        raise CheckpointError(f"global_attn_every_n_layers = {every} is not a step", where=keys.where)
    norm = NormConfig(kind="layer", eps=keys.get("norm_eps", float, 1e-5), bias=keys.get("norm_bias", bool, False))
    feedforward = FeedForwardConfig(
        hidden=keys.need("intermediate_size", int),
        activation=read_activation(keys, "hidden_activation", "gelu"),
        gated=True,
        bias=keys.get("mlp_bias", bool, False),
    )
    far, near = (
        LayerConfig(attention=attention, feedforward=feedforward, norm=norm)
        for attention in (
            _read_attention(keys, "full_attention", keys.get("global_rope_theta", float, 160000.0), None),
            _read_attention(keys, "sliding_attention", keys.get("local_rope_theta", float, 10000.0), window),
        )
    )
    layers = [near if local else far for local in read_local_layers(keys, window, lambda number: number % every != 0)]
    layers[0] = layers[0].model_copy(update={"attention_norms": ()})
    return EncoderConfig(
        vocab=keys.need("vocab_size", int),
        context=keys.get("max_position_embeddings", int, 8192),
        trunk=TrunkConfig(width=keys.need("hidden_size", int), layers=tuple(layers), input_norm=norm, final_norm=norm),
    )


def _read_attention(keys: Keys, layer_type: str, theta: float, window: int | None) -> AttentionConfig:
    heads, size = keys.need("num_attention_heads", int), split_width(keys)
    return AttentionConfig(
        heads=heads,
        kv_heads=heads,
        head_size=size,
        mask="full",
        bias=read_bias(keys),
        window=window,
        rotary=read_rotary(keys.defaulting(rope_theta=theta), size, layer_type=layer_type),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, EncoderConfig)
    layers, first = config.trunk.layers, config.trunk.layers[0]
    assert isinstance(first.feedforward, FeedForwardConfig)
    kinds = {"sliding_attention" if layer.attention.window else "full_attention": layer for layer in layers}
    values: dict[str, Any] = {
        "architectures": ["ModernBertModel"],
        "model_type": "modernbert",
        "vocab_size": config.vocab,
        "hidden_size": config.trunk.width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": first.attention.heads,
        "intermediate_size": first.feedforward.hidden,
        "hidden_activation": write_activation(first.feedforward.activation),
        "max_position_embeddings": config.context,
        "pad_token_id": None,  # the tokeniser knows it; the default lies outside of a small vocabulary
        "norm_eps": first.norm.eps,
        "norm_bias": first.norm.bias,
        "attention_bias": bool(first.attention.bias),
        "mlp_bias": first.feedforward.bias,
        "layer_types": ["sliding_attention" if layer.attention.window else "full_attention" for layer in layers],
        "rope_parameters": {
            kind: write_rotary(layer.attention.rotary) for kind, layer in kinds.items() if layer.attention.rotary
        },
    }
    if "sliding_attention" in kinds:
        values["local_attention"] = kinds["sliding_attention"].attention.window
    return values


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, EncoderConfig)
    entries = [same("embeddings.tok_embeddings.weight", "embedding.weight")]
    norms = {"embeddings.norm": "trunk.input_norm", "final_norm": "trunk.final_norm"}
    for number, layer in enumerate(config.trunk.layers):
        theirs, ours, feedforward = f"layers.{number}", f"trunk.layers.{number}", layer.feedforward
        assert isinstance(feedforward, FeedForwardConfig)
        norms[f"{theirs}.mlp_norm"] = f"{ours}.feedforward_norm.input"
        if "input" in layer.attention_norms:
            norms[f"{theirs}.attn_norm"] = f"{ours}.attention_norm.input"
        for kind in ("weight", "bias") if layer.attention.bias else ("weight",):
            parts = [f"{ours}.attention.{part}.{kind}" for part in ("q", "k", "v")]
            entries.append(row_parts(f"{theirs}.attn.Wqkv.{kind}", parts, [config.trunk.width] * 3))
            entries.append(same(f"{theirs}.attn.Wo.{kind}", f"{ours}.attention.o.{kind}"))
        for kind in ("weight", "bias") if feedforward.bias else ("weight",):
            parts = [f"{ours}.feedforward.{part}.{kind}" for part in ("gate", "up")]
            entries.append(row_parts(f"{theirs}.mlp.Wi.{kind}", parts, [feedforward.hidden] * 2))
            entries.append(same(f"{theirs}.mlp.Wo.{kind}", f"{ours}.feedforward.down.{kind}"))
    kinds = ("weight", "bias") if config.trunk.layers[0].norm.bias else ("weight",)
    return entries + [same(f"{t}.{kind}", f"{o}.{kind}") for t, o in norms.items() for kind in kinds]


MODERNBERT = Family(
    name="modernbert",
    architectures=("ModernBertModel", "ModernBertForMaskedLM"),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    ignored=(r"head\..*", r"decoder\..*"),
    renames=((r"^model\.", ""),),
)
