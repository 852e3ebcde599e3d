"""SigLIP (Zhai 2023, arXiv 2303.15343) and SigLIP 2 at one resolution (Tschannen 2025, arXiv 2502.14786).

Particular: no class token, a learned query pools by attention; a text side that sees all of a text, filled up to its
context, and reads its last place; every pair's logit has a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from craton.checkpoints.families.clip import nested, text_entries
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.families.vision import (
    patch_entries,
    read_pictures,
    read_tower,
    token_entry,
    tower_entries,
    with_bias,
    write_pictures,
    write_tower,
)
from craton.checkpoints.names import Entry, row_parts, same
from craton.models import DualEncoderConfig, EncoderConfig, ModelConfig, VisionConfig
from craton.trunk import LearnedPositions

SIDE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TEXT_DEFAULTS = SIDE_DEFAULTS | {"vocab_size": 32000, "max_position_embeddings": 64}


def read_vision(keys: Keys) -> VisionConfig:
    """The picture side."""
    keys.refuse("vision_use_head", True)
    return VisionConfig(
        **read_pictures(keys, 224, 16),
        trunk=read_tower(keys, 1e-6, "gelu_pytorch_tanh"),
        class_token=False,
        pooling="attention",
    )


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    text = nested(keys, "text_config", TEXT_DEFAULTS)
    context = text.count("max_position_embeddings")
    return DualEncoderConfig(
        vision=read_vision(nested(keys, "vision_config", SIDE_DEFAULTS)),
        text=EncoderConfig(
            vocab=text.count("vocab_size"),
            context=context,
            trunk=read_tower(text, 1e-6, "gelu_pytorch_tanh", positions=LearnedPositions(count=context)),
        ),
        projection=text.get("projection_size", int, text.count("hidden_size")),
        projection_bias=True,
        pad=text.get("pad_token_id", int, 1),
        logit_bias=True,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, DualEncoderConfig)
    text = write_tower(config.text.trunk) | {
        "model_type": "siglip_text_model",
        "vocab_size": config.text.vocab,
        "max_position_embeddings": config.text.context,
        "projection_size": config.projection,
        "pad_token_id": config.pad,
        # Hugging Face's defaults are CLIP's and beyond this vocabulary; no text side reads them.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": text,
        "vision_config": write_vision(config.vision),
    }


def write_vision(config: VisionConfig) -> dict[str, Any]:
    """The inverse of `read_vision`."""
    return write_tower(config.trunk) | write_pictures(config) | {"model_type": "siglip_vision_model"}


def vision_entries(config: VisionConfig, ours: str) -> list[Entry]:
    """Every tensor of the picture side."""
    theirs = "vision_model."
    found = [
        *patch_entries(f"{theirs}embeddings.patch_embedding", f"{ours}patches", config),
        same(f"{theirs}embeddings.position_embedding.weight", f"{ours}positions.weight"),
        *with_bias({f"{theirs}post_layernorm": f"{ours}trunk.final_norm"}),
        *tower_entries(theirs, ours, len(config.trunk.layers)),
    ]
    if config.pooling != "attention":
        return found
    head, pool = f"{theirs}head.", f"{ours}attention_pool."
    for kind in ("weight", "bias"):
        parts = [f"{pool}attention.{name}.{kind}" for name in "qkv"]
        found.append(row_parts(f"{head}attention.in_proj_{kind}", parts, (config.trunk.width,) * 3))
    return [
        *found,
        token_entry(f"{head}probe", f"{pool}query.weight", 1),
        *with_bias(
            {
                f"{head}attention.out_proj": f"{pool}attention.o",
                f"{head}layernorm": f"{pool}norm",
                f"{head}mlp.fc1": f"{pool}feedforward.up",
                f"{head}mlp.fc2": f"{pool}feedforward.down",
            }
        ),
    ]


def _single(theirs: str, ours: str) -> Entry:
    # A number here, a list of one there.
    def load(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0].reshape(())]

    def save(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.atleast_1d(tensors[0])]

    return Entry((theirs,), (ours,), load, save, by_rows=False)


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, DualEncoderConfig)
    return [
        *vision_entries(config.vision, "vision."),
        *text_entries(config.text),
        *with_bias({"text_model.head": "text_projection"}),
        _single("logit_scale", "logits.scale"),
        _single("logit_bias", "logits.bias"),
    ]


SIGLIP = Family(
    name="siglip",
    architectures=("SiglipModel",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    ignored=(r"(text|vision)_model\.embeddings\.position_ids",),
)
