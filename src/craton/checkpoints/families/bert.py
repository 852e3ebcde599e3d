"""BERT and what shares its architecture: MiniLM, BGE, E5 and most small sentence encoders.

Particular: norms on the residual stream, after each branch; learned positions; a second embedding for the two parts of
a pair. The heads of its pretraining (`cls`) are no part of an encoder and are left in the file.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import layer_count, read_activation, split_width, write_activation
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.names import Entry, same
from craton.models import EncoderConfig, ModelConfig
from craton.trunk import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LearnedPositions,
    NormConfig,
    TrunkConfig,
)

# Ours -> theirs, within one layer.
LAYER_NAMES = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.o": "attention.output.dense",
    "attention_norm.residual": "attention.output.LayerNorm",
    "feedforward.up": "intermediate.dense",
    "feedforward.down": "output.dense",
    "feedforward_norm.residual": "output.LayerNorm",
}

POSITIONS = same("embeddings.position_embeddings.weight", "trunk.positions.weight")


def read_config(keys: Keys, *, unused_positions: int = 0) -> EncoderConfig:
    """config.json -> ours. unused_positions: how many rows of the position table stand before the first token's."""
    keys.refuse("position_embedding_type", "absolute")
    keys.refuse("is_decoder", False)
    heads, head_size = keys.need("num_attention_heads", int), split_width(keys)
    norm = NormConfig(kind="layer", eps=keys.get("layer_norm_eps", float, 1e-12), bias=True)
    layer = LayerConfig(
        attention=AttentionConfig(
            heads=heads, kv_heads=heads, head_size=head_size, mask="full", bias=("q", "k", "v", "o")
        ),
        feedforward=FeedForwardConfig(
            hidden=keys.need("intermediate_size", int),
            activation=read_activation(keys, default="gelu"),
            bias=True,
        ),
        norm=norm,
        attention_norms=("residual",),
        feedforward_norms=("residual",),
    )
    context = keys.need("max_position_embeddings", int) - unused_positions
    return EncoderConfig(
        vocab=keys.need("vocab_size", int),
        context=context,
        token_types=keys.get("type_vocab_size", int, 2),
        trunk=TrunkConfig(
            width=keys.need("hidden_size", int),
            layers=(layer,) * layer_count(keys),
            positions=LearnedPositions(count=context),
            input_norm=norm,
        ),
        pooler=any(name.endswith("pooler.dense.weight") for name in keys.tensors),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, EncoderConfig)
    layer = config.trunk.layers[0]
    assert isinstance(layer.feedforward, FeedForwardConfig)
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": config.vocab,
        "hidden_size": config.trunk.width,
        "num_hidden_layers": len(config.trunk.layers),
        "num_attention_heads": layer.attention.heads,
        "intermediate_size": layer.feedforward.hidden,
        "hidden_act": write_activation(layer.feedforward.activation),
        "max_position_embeddings": config.context,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": layer.norm.eps,
    }


def entries(config: ModelConfig, positions: Entry = POSITIONS) -> list[Entry]:
    """Every tensor; `positions` is the entry of the position table."""
    assert isinstance(config, EncoderConfig)
    entries = [same("embeddings.word_embeddings.weight", "embedding.weight"), positions]
    if config.token_types:
        entries.append(same("embeddings.token_type_embeddings.weight", "token_types.weight"))
    pairs = {"embeddings.LayerNorm": "trunk.input_norm"}
    if config.pooler:
        pairs["pooler.dense"] = "pooler"
    for number in range(len(config.trunk.layers)):
        pairs |= {f"encoder.layer.{number}.{t}": f"trunk.layers.{number}.{o}" for o, t in LAYER_NAMES.items()}
    return entries + [same(f"{t}.{kind}", f"{o}.{kind}") for t, o in pairs.items() for kind in ("weight", "bias")]


BERT = Family(
    name="bert",
    architectures=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    ignored=(r"embeddings\.position_ids", r"cls\..*"),
    # With and without the base model's name; the first files, bert-base-uncased among them, call a norm's scale gamma.
    renames=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
)
