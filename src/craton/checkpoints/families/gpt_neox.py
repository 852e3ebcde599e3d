"""GPT-NeoX: GPT-NeoX-20B, Pythia, Dolly 2, StableLM-Alpha, RedPajama-INCITE.

Particular: attention and feed-forward read the same residual stream (unless `use_parallel_residual` is off); only
`rotary_pct` of each head is rotated; query, key and value lie in one matrix whose rows go head by head; the head is a
matrix of its own, `embed_out`.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import (
    layer_count,
    read_activation,
    read_bias,
    split_width,
    write_activation,
)
from craton.checkpoints.families.family import Family, Keys, read_rotary, read_rotated, write_rotary, write_rotated
from craton.checkpoints.names import Entry, head_parts, same
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig

# Ours -> theirs, within one layer.
LAYER_NAMES = {
    "attention_norm.input": "input_layernorm",
    "feedforward_norm.input": "post_attention_layernorm",
    "feedforward.up": "mlp.dense_h_to_4h",
    "feedforward.down": "mlp.dense_4h_to_h",
}


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys = keys.defaulting(
        rope_theta=keys.get("rotary_emb_base", float, 10000.0),
        partial_rotary_factor=keys.get("rotary_pct", float, 0.25),
    )
    heads, size = keys.need("num_attention_heads", int), split_width(keys)
    norm = NormConfig(kind="layer", eps=keys.get("layer_norm_eps", float, 1e-5), bias=True)
    layer = LayerConfig(
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_size=size,
            bias=read_bias(keys, default=True),
            rotary=read_rotary(keys, read_rotated(keys, size)),
        ),
        feedforward=FeedForwardConfig(
            hidden=keys.need("intermediate_size", int), activation=read_activation(keys, default="gelu"), bias=True
        ),
        norm=norm,
        parallel=keys.get("use_parallel_residual", bool, True),
    )
    return CausalLMConfig(
        vocab=keys.need("vocab_size", int),
        context=keys.get("max_position_embeddings", int, 2048),
        tied=keys.get("tie_word_embeddings", bool, False),
        trunk=TrunkConfig(width=keys.need("hidden_size", int), layers=(layer,) * layer_count(keys), final_norm=norm),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json. `rotary_pct` and `rotary_emb_base` say it again to what is older than transformers 5."""
    assert isinstance(config, CausalLMConfig)
    layer = config.trunk.layers[0]
    rotary = layer.attention.rotary
    assert isinstance(layer.feedforward, FeedForwardConfig)
    assert rotary is not None
    share = write_rotated(rotary.dims, layer.attention.head_size)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab,
        "hidden_size": config.trunk.width,
        "num_hidden_layers": len(config.trunk.layers),
        "num_attention_heads": layer.attention.heads,
        "attention_bias": bool(layer.attention.bias),
        "intermediate_size": layer.feedforward.hidden,
        "hidden_act": write_activation(layer.feedforward.activation),
        "use_parallel_residual": layer.parallel,
        "max_position_embeddings": config.context,
        "layer_norm_eps": layer.norm.eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {**write_rotary(rotary), "partial_rotary_factor": share},
        "rotary_pct": share,
        "rotary_emb_base": rotary.theta,
    }


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, CausalLMConfig)
    entries = [same("gpt_neox.embed_in.weight", "embedding.weight")]
    if not config.tied:
        entries.append(same("embed_out.weight", "head.weight"))
    pairs = {"gpt_neox.final_layer_norm": "trunk.final_norm"}
    for number, layer in enumerate(config.trunk.layers):
        theirs, ours = f"gpt_neox.layers.{number}", f"trunk.layers.{number}"
        pairs |= {f"{theirs}.{t}": f"{ours}.{o}" for o, t in LAYER_NAMES.items()}
        for kind in ("weight", "bias") if layer.attention.bias else ("weight",):
            parts = [f"{ours}.attention.{part}.{kind}" for part in ("q", "k", "v")]
            entries.append(head_parts(f"{theirs}.attention.query_key_value.{kind}", parts, layer.attention.heads))
            entries.append(same(f"{theirs}.attention.dense.{kind}", f"{ours}.attention.o.{kind}"))
    return entries + [same(f"{t}.{kind}", f"{o}.{kind}") for t, o in pairs.items() for kind in ("weight", "bias")]


GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", r"embed_out\.weight"),
)
