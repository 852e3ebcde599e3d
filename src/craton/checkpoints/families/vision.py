"""What the families that see share: sides, patches, extra tokens, and the layer that CLIP and SigLIP have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from craton.checkpoints.families.decoder import layer_count, read_activation, split_width, write_activation
from craton.checkpoints.families.family import Keys
from craton.checkpoints.names import Entry, same
from craton.errors import CheckpointError
from craton.models import VisionConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig

# Ours -> theirs within a layer of CLIP's and SigLIP's towers, both of pictures and of texts.
TOWER_NAMES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.out_proj",
    "attention_norm.input": "layer_norm1",
    "feedforward.up": "mlp.fc1",
    "feedforward.down": "mlp.fc2",
    "feedforward_norm.input": "layer_norm2",
}


def read_sides(keys: Keys, key: str, default: int) -> tuple[int, int]:
    """Height and width: a number for both, or a list of two."""
    value = keys.values.get(key, default)
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise CheckpointError(
            f"{key!r} must be a number of pixels or a list of two, not {value!r}", where=f"{keys.where}: key {key!r}"
        )
    return sides[0], sides[1]


def read_pictures(keys: Keys, image: int, patch: int) -> dict[str, Any]:
    """`image`, `patch` and `channels` of a `VisionConfig`, with the defaults of a family."""
    height, width = read_sides(keys, "patch_size", patch)
    if height != width:
        raise CheckpointError(f"patches of {height} x {width} pixels are not square", where=keys.where)
    return {
        "image": read_sides(keys, "image_size", image),
        "patch": height,
        "channels": keys.get("num_channels", int, 3),
    }


def write_pictures(config: VisionConfig) -> dict[str, Any]:
    """The inverse of `read_pictures`."""
    height, width = config.image
    return {
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch,
        "num_channels": config.channels,
    }


def read_tower(
    keys: Keys, eps: float, activation: str, *, mask: Literal["causal", "full"] = "full", **switches: Any
) -> TrunkConfig:
    """The trunk of CLIP's and SigLIP's towers: norms before the branches, biases everywhere."""
    heads = keys.need("num_attention_heads", int)
    norm = NormConfig(kind="layer", eps=keys.get("layer_norm_eps", float, eps), bias=True)
    layer = LayerConfig(
        attention=AttentionConfig(
            heads=heads, kv_heads=heads, head_size=split_width(keys), mask=mask, bias=("q", "k", "v", "o")
        ),
        feedforward=FeedForwardConfig(
            hidden=keys.need("intermediate_size", int),
            activation=read_activation(keys, "hidden_act", activation),
            bias=True,
        ),
        norm=norm,
    )
    return TrunkConfig(
        width=keys.need("hidden_size", int),
        layers=(layer,) * layer_count(keys),
        final_norm=norm,
        **{name: norm if value is True else value for name, value in switches.items()},
    )


def write_tower(trunk: TrunkConfig) -> dict[str, Any]:
    """The inverse of `read_tower`."""
    layer = trunk.layers[0]
    assert isinstance(layer.feedforward, FeedForwardConfig)
    return {
        "hidden_size": trunk.width,
        "num_hidden_layers": len(trunk.layers),
        "num_attention_heads": layer.attention.heads,
        "intermediate_size": layer.feedforward.hidden,
        "hidden_act": write_activation(layer.feedforward.activation),
        "layer_norm_eps": layer.norm.eps,
    }


def tower_entries(theirs: str, ours: str, layers: int) -> list[Entry]:
    """The tensors of the layers of such a tower, `theirs` and `ours` being the prefixes of its parts."""
    pairs = {
        f"{theirs}encoder.layers.{number}.{t}": f"{ours}trunk.layers.{number}.{o}"
        for number in range(layers)
        for o, t in TOWER_NAMES.items()
    }
    return with_bias(pairs)


def with_bias(pairs: Mapping[str, str]) -> list[Entry]:
    """Weight and bias of these modules, theirs -> ours."""
    return [same(f"{t}.{kind}", f"{o}.{kind}") for t, o in pairs.items() for kind in ("weight", "bias")]


def patch_entries(theirs: str, ours: str, config: VisionConfig) -> list[Entry]:
    """The patch embedding: a convolution there, a linear layer here."""
    shape = (config.channels, config.patch, config.patch)
    weight = reshaped(f"{theirs}.weight", f"{ours}.weight", lambda t: t.flatten(1), lambda t: t.unflatten(1, shape))
    weight = replace(weight, linear=False)
    return [weight, same(f"{theirs}.bias", f"{ours}.bias")] if config.patch_bias else [weight]


def reshaped(theirs: str, ours: str, load: Any, save: Any) -> Entry:
    """One tensor whose shape alone differs."""
    return Entry((theirs,), (ours,), lambda t: [load(t[0])], lambda t: [save(t[0])], by_rows=False)


def token_entry(theirs: str, ours: str, ones: int) -> Entry:
    """A table of vectors [n, width] here, there with `ones` dimensions of 1 before them (-1: one vector [width])."""
    if ones < 0:
        return reshaped(theirs, ours, lambda t: t[None], lambda t: t[0])
    leading = (1,) * ones
    return reshaped(theirs, ours, lambda t: t.reshape(t.shape[-2:]), lambda t: t.reshape(leading + tuple(t.shape)))


def extra_entry(theirs: Sequence[str], config: VisionConfig) -> Entry:
    """The class token and, if there are any, the registers: [1, n, width] each there, one table here."""
    sizes = [1, config.registers] if config.registers else [1]

    def load(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.cat([tensor.flatten(0, 1) for tensor in tensors])]

    def save(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [part[None] for part in tensors[0].split(sizes)]

    return Entry(tuple(theirs[: len(sizes)]), ("extra.weight",), load, save, by_rows=False)
