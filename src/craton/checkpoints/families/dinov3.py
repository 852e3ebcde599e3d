"""DINOv3's Vision Transformers (Siméoni 2025, arXiv 2508.10104).

Particular: rotary positions on two axes, by the patches' centres; registers; keys without bias.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import layer_count, read_activation, split_width, write_activation
from craton.checkpoints.families.dinov2 import NORM_NAMES, SCALES
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
from craton.models import ModelConfig, VisionConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig
from craton.trunk.config import Projection

BIASES: tuple[tuple[Projection, str, bool], ...] = (
    ("q", "query_bias", True),
    ("k", "key_bias", False),
    ("v", "value_bias", True),
    ("o", "proj_bias", True),
)
NAMES = NORM_NAMES | {f"attention.{name}": f"attention.{name}_proj" for name in "qkvo"}


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys.refuse("apply_layernorm", True)
    heads, size = keys.need("num_attention_heads", int), split_width(keys)
    norm = NormConfig(kind="layer", eps=keys.get("layer_norm_eps", float, 1e-5), bias=True)
    layer = LayerConfig(
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_size=size,
            mask="full",
            bias=tuple(name for name, key, default in BIASES if keys.get(key, bool, default)),
            rotary=RotaryConfig(dims=size, theta=keys.get("rope_theta", float, 100.0), axes=2),
        ),
        feedforward=FeedForwardConfig(
            hidden=keys.need("intermediate_size", int),
            activation=read_activation(keys, default="gelu"),
            gated=keys.get("use_gated_mlp", bool, False),
            bias=keys.get("mlp_bias", bool, True),
        ),
        norm=norm,
        layer_scale=keys.get("layerscale_value", float, 1.0),
    )
    return VisionConfig(
        **read_pictures(keys, 224, 16),
        trunk=TrunkConfig(width=keys.need("hidden_size", int), layers=(layer,) * layer_count(keys), final_norm=norm),
        registers=keys.get("num_register_tokens", int, 0),
        mask_token=True,
        positions="centres",
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, VisionConfig)
    layer = config.trunk.layers[0]
    assert isinstance(layer.feedforward, FeedForwardConfig)
    assert layer.attention.rotary is not None
    return (
        write_pictures(config)
        | {
            "architectures": ["DINOv3ViTModel"],
            "model_type": "dinov3_vit",
            "hidden_size": config.trunk.width,
            "num_hidden_layers": len(config.trunk.layers),
            "num_attention_heads": layer.attention.heads,
            "intermediate_size": layer.feedforward.hidden,
            "use_gated_mlp": layer.feedforward.gated,
            "mlp_bias": layer.feedforward.bias,
            "hidden_act": write_activation(layer.feedforward.activation),
            "layer_norm_eps": layer.norm.eps,
            "layerscale_value": layer.layer_scale,
            "rope_theta": layer.attention.rotary.theta,
            "num_register_tokens": config.registers,
        }
        | {key: name in layer.attention.bias for name, key, _ in BIASES}
    )


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, VisionConfig)
    found = [
        *patch_entries("embeddings.patch_embeddings", "patches", config),
        extra_entry(["embeddings.cls_token", "embeddings.register_tokens"], config),
        token_entry("embeddings.mask_token", "mask.weight", 1),
        *with_bias({"norm": "trunk.final_norm"}),
    ]
    for number, layer in enumerate(config.trunk.layers):
        feedforward = layer.feedforward
        assert isinstance(feedforward, FeedForwardConfig)
        parts = ("gate", "up", "down") if feedforward.gated else ("up", "down")
        names = NAMES | {f"feedforward.{part}": f"mlp.{part}_proj" for part in parts}
        plain = {f"attention.{name}" for name in "qkvo" if name not in layer.attention.bias}
        plain |= set() if feedforward.bias else {f"feedforward.{part}" for part in parts}
        theirs, ours = f"layer.{number}", f"trunk.layers.{number}"
        found += [same(f"{theirs}.{t}", f"{ours}.{o}") for t, o in SCALES.items()]
        for o, t in names.items():
            kinds = ("weight",) if o in plain else ("weight", "bias")
            found += [same(f"{theirs}.{t}.{kind}", f"{ours}.{o}.{kind}") for kind in kinds]
    return found


DINOV3 = Family(
    name="dinov3",
    architectures=("DINOv3ViTModel",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    # Of no registers a file may hold an empty tensor.
    ignored=(r"embeddings\.register_tokens",),
    renames=((r"^model\.", ""),),
)
