"""Segment Anything (Kirillov 2023, arXiv 2304.02643), as transformers' SamModel, over a plain Vision Transformer.

Particular: its files may also describe an encoder of windows and relative positions (ViTDet), which is what was
published as facebook/sam-vit-*. That would be a second kind of block here, so those weights are refused by name; what
is grown here opens in transformers, and whatever was trained there without windows opens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from craton.checkpoints.families.clip import nested
from craton.checkpoints.families.decoder import layer_count, read_activation, write_activation
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.families.vision import patch_entries, read_pictures, reshaped, with_bias, write_pictures
from craton.checkpoints.families.vit import read_layer_attention
from craton.checkpoints.names import Entry, row_parts, same
from craton.errors import CheckpointError
from craton.models import ModelConfig, SegmenterConfig, VisionConfig
from craton.trunk import FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig

VISION_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
DECODER_DEFAULTS = {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 2}

SHARED = "shared_image_embedding.positional_embedding"

# Ours -> theirs.
LAYER_NAMES = {
    "attention.o": "attn.proj",
    "attention_norm.input": "layer_norm1",
    "feedforward.up": "mlp.lin1",
    "feedforward.down": "mlp.lin2",
    "feedforward_norm.input": "layer_norm2",
}
ATTENTION_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
TWO_WAY_NAMES = {
    "among_norm": "layer_norm1",
    "look_norm": "layer_norm2",
    "feedforward.up": "mlp.lin1",
    "feedforward.down": "mlp.lin2",
    "feedforward_norm": "layer_norm3",
    "mark_norm": "layer_norm4",
} | {
    f"{o}.{part}": f"{t}.{name}"
    for o, t in (("among", "self_attn"), ("look", "cross_attn_token_to_image"), ("mark", "cross_attn_image_to_token"))
    for part, name in ATTENTION_NAMES.items()
}
PROMPT_NAMES = {"mask_norm": "mask_embed.layer_norm1", "mask_middle_norm": "mask_embed.layer_norm2"}
PROMPT_WINDOWS = {"mask_in": "conv1", "mask_middle": "conv2", "mask_out": "conv3"}


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    vision = nested(keys, "vision_config", VISION_DEFAULTS)
    prompts, decoder = nested(keys, "prompt_encoder_config", {}), nested(keys, "mask_decoder_config", DECODER_DEFAULTS)
    windows, relative = vision.get("window_size", int, 14), vision.get("use_rel_pos", bool, True)
    if windows or relative:
        raise CheckpointError(
            "its encoder attends in windows or by relative positions (ViTDet), as the published SAM's does; here a "
            "plain Vision Transformer sees",
            where=f"{vision.where}: keys 'window_size', 'use_rel_pos'",
            remedy="grow one (craton pretrain-masks), or take a SamModel with window_size 0 and use_rel_pos false",
        )
    vision.refuse("use_abs_pos", True)
    decoder.refuse("attention_downsample_rate", 2)
    prompts.refuse("num_point_embeddings", 4)
    width = decoder.count("hidden_size")
    vision.refuse("output_channels", width)
    prompts.refuse("hidden_size", width)
    pictures = read_pictures(vision, 1024, 16)
    prompts.refuse("image_size", pictures["image"][0])
    prompts.refuse("patch_size", pictures["patch"])
    frequencies = vision.get("num_pos_feats", int, 128)
    if 2 * frequencies != width:
        raise CheckpointError(
            f"{frequencies} frequencies do not make a width of {width}", where=f"{vision.where}: key 'num_pos_feats'"
        )
    return SegmenterConfig(
        vision=VisionConfig(
            **pictures,
            trunk=_read_trunk(vision),
            class_token=False,
            pooling="mean",
        ),
        width=width,
        layers=layer_count(decoder),
        heads=decoder.count("num_attention_heads"),
        hidden=decoder.get("mlp_dim", int, 2048),
        activation=read_activation(decoder, default="relu"),
        eps=decoder.get("layer_norm_eps", float, 1e-6),
        masks=decoder.get("num_multimask_outputs", int, 3),
        iou_layers=decoder.get("iou_head_depth", int, 3),
        iou_hidden=decoder.get("iou_head_hidden_dim", int, 256),
        mask_channels=prompts.get("mask_input_channels", int, 16),
        prompt_activation=read_activation(prompts, default="gelu"),
        prompt_eps=prompts.get("layer_norm_eps", float, 1e-6),
    )


def _read_trunk(vision: Keys) -> TrunkConfig:
    width = vision.count("hidden_size")
    hidden = vision.get("mlp_dim", int, int(width * vision.get("mlp_ratio", float, 4.0)))
    layer = LayerConfig(
        attention=read_layer_attention(vision),
        feedforward=FeedForwardConfig(hidden=hidden, activation=read_activation(vision, default="gelu"), bias=True),
        norm=NormConfig(kind="layer", eps=vision.get("layer_norm_eps", float, 1e-6), bias=True),
    )
    return TrunkConfig(width=width, layers=(layer,) * layer_count(vision), final_norm=None)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, SegmenterConfig)
    trunk, layer = config.vision.trunk, config.vision.trunk.layers[0]
    assert isinstance(layer.feedforward, FeedForwardConfig)
    sides = {"image_size": config.side, "patch_size": config.vision.patch}
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": write_pictures(config.vision)
        | {
            "model_type": "sam_vision_model",
            "hidden_size": trunk.width,
            "output_channels": config.width,
            "num_hidden_layers": len(trunk.layers),
            "num_attention_heads": layer.attention.heads,
            "hidden_act": write_activation(layer.feedforward.activation),
            "layer_norm_eps": layer.norm.eps,
            "qkv_bias": "q" in layer.attention.bias,
            "mlp_dim": layer.feedforward.hidden,
            "use_abs_pos": True,
            "use_rel_pos": False,
            "window_size": 0,
            "global_attn_indexes": [],
            "num_pos_feats": config.width // 2,
        },
        "prompt_encoder_config": sides
        | {
            "model_type": "sam_prompt_encoder",
            "hidden_size": config.width,
            "mask_input_channels": config.mask_channels,
            "num_point_embeddings": 4,
            "hidden_act": write_activation(config.prompt_activation),
            "layer_norm_eps": config.prompt_eps,
        },
        "mask_decoder_config": {
            "model_type": "sam_mask_decoder",
            "hidden_size": config.width,
            "hidden_act": write_activation(config.activation),
            "mlp_dim": config.hidden,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "attention_downsample_rate": 2,
            "num_multimask_outputs": config.masks,
            "iou_head_depth": config.iou_layers,
            "iou_head_hidden_dim": config.iou_hidden,
            "layer_norm_eps": config.eps,
        },
    }


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, SegmenterConfig)
    return [*_vision_entries(config), *_prompt_entries(config), *_decoder_entries(config)]


def _vision_entries(config: SegmenterConfig) -> list[Entry]:
    vision, theirs = config.vision, "vision_encoder"
    grid, sizes = vision.grid, (vision.trunk.width,) * 3
    found = [
        *patch_entries(f"{theirs}.patch_embed.projection", "vision.patches", vision),
        reshaped(
            f"{theirs}.pos_embed",
            "vision.positions.weight",
            lambda t: t.flatten(0, 2),
            lambda t: t.unflatten(0, grid)[None],
        ),
        reshaped(f"{theirs}.neck.conv1.weight", "neck_in.weight", lambda t: t.flatten(1), lambda t: t[..., None, None]),
        same(f"{theirs}.neck.conv2.weight", "neck_out.weight"),
        *with_bias({f"{theirs}.neck.layer_norm1": "neck_in_norm", f"{theirs}.neck.layer_norm2": "neck_out_norm"}),
    ]
    for number, layer in enumerate(vision.trunk.layers):
        t, o = f"{theirs}.layers.{number}", f"vision.trunk.layers.{number}"
        found += with_bias({f"{t}.{name}": f"{o}.{ours}" for ours, name in LAYER_NAMES.items()})
        for kind in ("weight", "bias") if "q" in layer.attention.bias else ("weight",):
            parts = [f"{o}.attention.{part}.{kind}" for part in "qkv"]
            found.append(row_parts(f"{t}.attn.qkv.{kind}", parts, sizes))
    return found


def _prompt_entries(config: SegmenterConfig) -> list[Entry]:
    theirs, ours = "prompt_encoder", "prompts"
    kinds = tuple(f"{theirs}.point_embed.{number}.weight" for number in range(4))
    found = [
        Entry((SHARED,), (f"{ours}.positions.frequencies",), fp32=True),
        Entry(kinds, (f"{ours}.kinds.weight",), _stack, _unstack, by_rows=False),
        same(f"{theirs}.not_a_point_embed.weight", f"{ours}.no_point.weight"),
        same(f"{theirs}.no_mask_embed.weight", f"{ours}.no_mask.weight"),
        *with_bias({f"{theirs}.{t}": f"{ours}.{o}" for o, t in PROMPT_NAMES.items()}),
    ]
    inputs = {"mask_in": (1, 2, 2), "mask_middle": (config.mask_channels // 4, 2, 2)}
    for o, t in PROMPT_WINDOWS.items():
        shape = inputs.get(o, (config.mask_channels, 1, 1))
        found += [_windows(f"{theirs}.mask_embed.{t}.weight", f"{ours}.{o}.weight", shape)]
        found += [same(f"{theirs}.mask_embed.{t}.bias", f"{ours}.{o}.bias")]
    return found


def _decoder_entries(config: SegmenterConfig) -> list[Entry]:
    theirs, ours = "mask_decoder", "decoder"
    pairs = {
        f"{theirs}.upscale_conv1": f"{ours}.enlarge",
        f"{theirs}.upscale_conv2": f"{ours}.enlarge_again",
        f"{theirs}.upscale_layer_norm": f"{ours}.enlarge_norm",
        f"{theirs}.transformer.layer_norm_final_attn": f"{ours}.look_norm",
    }
    for o, t in ATTENTION_NAMES.items():
        pairs[f"{theirs}.transformer.final_attn_token_to_image.{t}"] = f"{ours}.look.{o}"
    for number in range(config.layers):
        for o, t in TWO_WAY_NAMES.items():
            pairs[f"{theirs}.transformer.layers.{number}.{t}"] = f"{ours}.layers.{number}.{o}"
    for number in range(config.masks + 1):
        pairs |= _perceptron(f"{theirs}.output_hypernetworks_mlps.{number}", f"{ours}.mask_heads.{number}", 3)
    pairs |= _perceptron(f"{theirs}.iou_prediction_head", f"{ours}.quality_head", config.iou_layers)
    return [
        same(f"{theirs}.iou_token.weight", f"{ours}.quality_token.weight"),
        same(f"{theirs}.mask_tokens.weight", f"{ours}.mask_tokens.weight"),
        *with_bias(pairs),
    ]


def _perceptron(theirs: str, ours: str, layers: int) -> dict[str, str]:
    names = ["proj_in", *(f"layers.{number}" for number in range(layers - 2)), "proj_out"]
    return {f"{theirs}.{name}": f"{ours}.layers.{number}" for number, name in enumerate(names)}


def _windows(theirs: str, ours: str, shape: tuple[int, int, int]) -> Entry:
    # A convolution over windows that do not overlap there, a linear layer of each window here.
    return reshaped(theirs, ours, lambda t: t.flatten(1), lambda t: t.unflatten(1, shape))


def _stack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.cat(list(tensors))]


def _unstack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return list(tensors[0].split(1))


SAM = Family(
    name="sam",
    architectures=("SamModel",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    # The same numbers once more.
    ignored=(r"prompt_encoder\.shared_embedding\.positional_embedding",),
)
