"""DINOv2 (Oquab 2023, arXiv 2304.07193), and the same with registers (Darcet 2023, arXiv 2309.16588).

Particular: layer scale; the largest has a gated feed-forward of two thirds of the width; its position vectors are
interpolated to the picture's size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from craton.checkpoints.families.decoder import layer_count, read_activation, write_activation
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.families.vision import (
    extra_entry,
    patch_entries,
    read_pictures,
    token_entry,
    with_bias,
    write_pictures,
)
from craton.checkpoints.families.vit import ATTENTION_MODULES, ATTENTION_NAMES, layer_entries, read_layer_attention
from craton.checkpoints.names import Entry, row_parts, same
from craton.errors import CheckpointError
from craton.models import ModelConfig, VisionConfig
from craton.trunk import FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig

NORM_NAMES = {"attention_norm.input": "norm1", "feedforward_norm.input": "norm2"}
PLAIN_NAMES = ATTENTION_NAMES | NORM_NAMES | {"feedforward.up": "mlp.fc1", "feedforward.down": "mlp.fc2"}
GATED_NAMES = ATTENTION_NAMES | NORM_NAMES | {"feedforward.down": "mlp.weights_out"}
SCALES = {"layer_scale1.lambda1": "attention_scale.weight", "layer_scale2.lambda1": "feedforward_scale.weight"}


def _gated_hidden(width: int, ratio: int) -> int:
    # Two thirds, so that three matrices have the numbers of two; in whole eights.
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys.refuse("apply_layernorm", True)
    width, ratio = keys.need("hidden_size", int), keys.get("mlp_ratio", int, 4)
    gated = keys.get("use_swiglu_ffn", bool, False)
    norm = NormConfig(kind="layer", eps=keys.get("layer_norm_eps", float, 1e-6), bias=True)
    layer = LayerConfig(
        attention=read_layer_attention(keys),
        feedforward=FeedForwardConfig(
            hidden=_gated_hidden(width, ratio) if gated else width * ratio,
            activation="silu" if gated else read_activation(keys, default="gelu"),
            gated=gated,
            bias=True,
        ),
        norm=norm,
        layer_scale=keys.get("layerscale_value", float, 1.0),
    )
    registers = 0
    if any(name.endswith("register_tokens") for name in keys.tensors):
        registers = keys.get("num_register_tokens", int, 4)
    return VisionConfig(
        **read_pictures(keys, 224, 16 if registers else 14),
        trunk=TrunkConfig(width=width, layers=(layer,) * layer_count(keys), final_norm=norm),
        registers=registers,
        antialias=registers > 0,
        mask_token=any(name.endswith("mask_token") for name in keys.tensors),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, VisionConfig)
    layer, width = config.trunk.layers[0], config.trunk.width
    assert isinstance(layer.feedforward, FeedForwardConfig)
    gated, hidden = layer.feedforward.gated, layer.feedforward.hidden
    ratio = next((r for r in range(1, 65) if (_gated_hidden(width, r) if gated else width * r) == hidden), None)
    if ratio is None:
        raise CheckpointError(
            f"DINOv2's files have no place for a feed-forward of {hidden}, which is no multiple of {width}"
        )
    name = "dinov2_with_registers" if config.registers else "dinov2"
    values = write_pictures(config) | {
        "architectures": ["Dinov2WithRegistersModel" if config.registers else "Dinov2Model"],
        "model_type": name,
        "hidden_size": width,
        "num_hidden_layers": len(config.trunk.layers),
        "num_attention_heads": layer.attention.heads,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else write_activation(layer.feedforward.activation),
        "layer_norm_eps": layer.norm.eps,
        "layerscale_value": layer.layer_scale,
        "qkv_bias": "q" in layer.attention.bias,
        "use_mask_token": config.mask_token,
    }
    return values | ({"num_register_tokens": config.registers} if config.registers else {})


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, VisionConfig)
    found = [
        *patch_entries("embeddings.patch_embeddings.projection", "patches", config),
        extra_entry(["embeddings.cls_token", "embeddings.register_tokens"], config),
        token_entry("embeddings.position_embeddings", "positions.weight", 1),
        *with_bias({"layernorm": "trunk.final_norm"}),
    ]
    if config.mask_token:
        found.append(token_entry("embeddings.mask_token", "mask.weight", 0))
    for number, layer in enumerate(config.trunk.layers):
        theirs, ours = f"encoder.layer.{number}", f"trunk.layers.{number}"
        found += _layer(layer, theirs, ours)
    return found


def _layer(layer: LayerConfig, theirs: str, ours: str) -> list[Entry]:
    assert isinstance(layer.feedforward, FeedForwardConfig)
    found = [same(f"{theirs}.{t}", f"{ours}.{o}") for t, o in SCALES.items()]
    if not layer.feedforward.gated:
        return found + layer_entries(layer, theirs, ours, PLAIN_NAMES)
    sizes = (layer.feedforward.hidden,) * 2
    for kind in ("weight", "bias"):
        parts = (f"{ours}.feedforward.gate.{kind}", f"{ours}.feedforward.up.{kind}")
        found.append(row_parts(f"{theirs}.mlp.weights_in.{kind}", parts, sizes))
    return found + layer_entries(layer, theirs, ours, GATED_NAMES)


DINOV2 = Family(
    name="dinov2",
    architectures=("Dinov2Model",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    renames=((r"^dinov2(_with_registers)?\.", ""),),
    modules=ATTENTION_MODULES,
)
WITH_REGISTERS = replace(DINOV2, name="dinov2_with_registers", architectures=("Dinov2WithRegistersModel",))
