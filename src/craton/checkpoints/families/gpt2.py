"""GPT-2 and what shares its architecture name: DistilGPT-2, DialoGPT, Cerebras-GPT.

Particular: learned positions; matrices stored [in, out] (its Conv1D); query, key and value in one. The
published files carry causal masks as tensors, and stand with and without "transformer.".
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import layer_count, read_activation, split_width, write_activation
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.names import Entry, row_parts, same, transposed
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, LearnedPositions, NormConfig, TrunkConfig

# Ours -> theirs, within one layer.
NORMS = {"attention_norm.input": "ln_1", "feedforward_norm.input": "ln_2"}
MATRICES = {"attention.o": "attn.c_proj", "feedforward.up": "mlp.c_fc", "feedforward.down": "mlp.c_proj"}


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys.refuse("scale_attn_weights", True)
    keys.refuse("scale_attn_by_inverse_layer_idx", False)
    keys.refuse("add_cross_attention", False)
    width, heads, context = keys.need("n_embd", int), keys.need("n_head", int), keys.need("n_positions", int)
    head_size = split_width(keys, "n_embd", "n_head")
    norm = NormConfig(kind="layer", eps=keys.get("layer_norm_epsilon", float, 1e-5), bias=True)
    layer = LayerConfig(
        attention=AttentionConfig(heads=heads, kv_heads=heads, head_size=head_size, bias=("q", "k", "v", "o")),
        feedforward=FeedForwardConfig(
            hidden=keys.get("n_inner", int, 4 * width),
            activation=read_activation(keys, "activation_function", "gelu_new"),
            bias=True,
        ),
        norm=norm,
    )
    trunk = TrunkConfig(
        width=width,
        layers=(layer,) * layer_count(keys, "n_layer"),
        positions=LearnedPositions(count=context),
        final_norm=norm,
    )
    tied = keys.get("tie_word_embeddings", bool, True)
    return CausalLMConfig(vocab=keys.need("vocab_size", int), context=context, tied=tied, trunk=trunk)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    layer = config.trunk.layers[0]
    assert isinstance(layer.feedforward, FeedForwardConfig)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_embd": config.trunk.width,
        "n_layer": len(config.trunk.layers),
        "n_head": layer.attention.heads,
        "n_inner": layer.feedforward.hidden,
        "n_positions": config.context,
        "activation_function": write_activation(layer.feedforward.activation),
        "layer_norm_epsilon": layer.norm.eps,
        "tie_word_embeddings": config.tied,
    }


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, CausalLMConfig)
    entries = [same("wte.weight", "embedding.weight"), same("wpe.weight", "trunk.positions.weight")]
    if not config.tied:
        entries.append(same("lm_head.weight", "head.weight"))
    norms = {"ln_f": "trunk.final_norm"}
    for number in range(len(config.trunk.layers)):
        theirs, ours = f"h.{number}", f"trunk.layers.{number}"
        norms |= {f"{theirs}.{t}": f"{ours}.{o}" for o, t in NORMS.items()}
        for kind in ("weight", "bias"):
            parts = [f"{ours}.attention.{part}.{kind}" for part in ("q", "k", "v")]
            entries.append(row_parts(f"{theirs}.attn.c_attn.{kind}", parts, [config.trunk.width] * 3, transpose=True))
        for o, t in MATRICES.items():
            entries.append(transposed(f"{theirs}.{t}.weight", f"{ours}.{o}.weight"))
            entries.append(same(f"{theirs}.{t}.bias", f"{ours}.{o}.bias"))
    return entries + [same(f"{t}.{kind}", f"{o}.{kind}") for t, o in norms.items() for kind in ("weight", "bias")]


GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    renames=((r"^transformer\.", ""),),
)
