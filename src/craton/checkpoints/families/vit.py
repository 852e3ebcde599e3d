"""The Vision Transformer (Dosovitskiy 2020, arXiv 2010.11929), as google/vit-base-patch16-224 and DeiT's students.

Particular: norms before the branches; a class token, read directly by classifiers and through a dense layer otherwise.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import layer_count, read_activation, split_width, write_activation
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.families.vision import (
    extra_entry,
    patch_entries,
    read_pictures,
    token_entry,
    with_bias,
    write_pictures,
)
from craton.checkpoints.names import Entry, same
from craton.errors import CheckpointError
from craton.models import ModelConfig, VisionConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig
from craton.trunk.config import Projection

# Ours -> theirs, within one layer.
ATTENTION_NAMES = {
    "attention.q": "attention.attention.query",
    "attention.k": "attention.attention.key",
    "attention.v": "attention.attention.value",
    "attention.o": "attention.output.dense",
}
LAYER_NAMES = ATTENTION_NAMES | {
    "attention_norm.input": "layernorm_before",
    "feedforward.up": "intermediate.dense",
    "feedforward.down": "output.dense",
    "feedforward_norm.input": "layernorm_after",
}


def read_layer_attention(keys: Keys) -> AttentionConfig:
    """Attention of ViT and DINOv2: `qkv_bias` is of all three, the output always has one."""
    heads = keys.need("num_attention_heads", int)
    bias: tuple[Projection, ...] = ("q", "k", "v", "o") if keys.get("qkv_bias", bool, True) else ("o",)
    return AttentionConfig(heads=heads, kv_heads=heads, head_size=split_width(keys), mask="full", bias=bias)


def layer_entries(layer: LayerConfig, theirs: str, ours: str, names: dict[str, str]) -> list[Entry]:
    """The tensors of one layer whose modules are called `names`."""
    found: list[Entry] = []
    for o, t in names.items():
        plain = o.startswith("attention.") and o[-1] not in layer.attention.bias
        kinds = ("weight",) if plain else ("weight", "bias")
        found += [same(f"{theirs}.{t}.{kind}", f"{ours}.{o}.{kind}") for kind in kinds]
    return found


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    width = keys.need("hidden_size", int)
    keys.refuse("pooler_output_size", width)
    keys.refuse("pooler_act", "tanh")
    norm = NormConfig(kind="layer", eps=keys.get("layer_norm_eps", float, 1e-12), bias=True)
    layer = LayerConfig(
        attention=read_layer_attention(keys),
        feedforward=FeedForwardConfig(
            hidden=keys.need("intermediate_size", int), activation=read_activation(keys, default="gelu"), bias=True
        ),
        norm=norm,
    )
    pooler = any(name.endswith("pooler.dense.weight") for name in keys.tensors)
    return VisionConfig(
        **read_pictures(keys, 224, 16),
        trunk=TrunkConfig(width=width, layers=(layer,) * layer_count(keys), final_norm=norm),
        pooling="pooler" if pooler else "cls",
        mask_token=any(name.endswith("embeddings.mask_token") for name in keys.tensors),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json. Raises CheckpointError for a model that a ViT's files have no place for."""
    assert isinstance(config, VisionConfig)
    layer = config.trunk.layers[0]
    assert isinstance(layer.feedforward, FeedForwardConfig)
    if config.registers or layer.layer_scale or layer.feedforward.gated or config.positions != "learned":
        raise CheckpointError("a ViT has no registers, layer scale, gates or rotary positions")
    if config.projection or config.pooling not in ("cls", "pooler"):
        raise CheckpointError(f"a ViT's files have no place for a projection, nor for the pooling {config.pooling!r}")
    return write_pictures(config) | {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": config.trunk.width,
        "num_hidden_layers": len(config.trunk.layers),
        "num_attention_heads": layer.attention.heads,
        "intermediate_size": layer.feedforward.hidden,
        "hidden_act": write_activation(layer.feedforward.activation),
        "layer_norm_eps": layer.norm.eps,
        "qkv_bias": "q" in layer.attention.bias,
    }


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, VisionConfig)
    found = [
        *patch_entries("embeddings.patch_embeddings.projection", "patches", config),
        extra_entry(["embeddings.cls_token"], config),
        token_entry("embeddings.position_embeddings", "positions.weight", 1),
        *with_bias(
            {"layernorm": "trunk.final_norm"} | ({"pooler.dense": "pooler"} if config.pooling == "pooler" else {})
        ),
    ]
    if config.mask_token:
        found.append(token_entry("embeddings.mask_token", "mask.weight", 1))
    for number, layer in enumerate(config.trunk.layers):
        found += layer_entries(layer, f"encoder.layer.{number}", f"trunk.layers.{number}", LAYER_NAMES)
    return found


# Since transformers 5 the classes have other names than the files.
ATTENTION_MODULES = (
    (r"attention\.attention\.(q)uery$", r"attention.\1_proj"),
    (r"attention\.attention\.([kv])(ey|alue)$", r"attention.\1_proj"),
    (r"attention\.output\.dense$", "attention.o_proj"),
)

VIT = Family(
    name="vit",
    architectures=("ViTModel",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    renames=((r"^vit\.", ""),),
    modules=(
        *ATTENTION_MODULES,
        (r"^encoder\.layer\.", "layers."),
        (r"intermediate\.dense$", "mlp.fc1"),
        (r"(\d+)\.output\.dense$", r"\1.mlp.fc2"),
    ),
)
