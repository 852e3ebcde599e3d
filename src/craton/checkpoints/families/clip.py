"""CLIP (Radford 2021, arXiv 2103.00020): OpenAI's, OpenCLIP's in Hugging Face's layout, and the like.

Particular: a norm before the first layer of the picture side; a causal text side whose last token, the end of the
text, stands for it; x * sigmoid(1.702 x) for GELU in OpenAI's.
"""

from __future__ import annotations

from typing import Any

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
from craton.checkpoints.names import Entry, same
from craton.models import DualEncoderConfig, EncoderConfig, ModelConfig, VisionConfig
from craton.trunk import LearnedPositions

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def nested(keys: Keys, key: str, defaults: dict[str, Any]) -> Keys:
    """The keys of one side, which files shorten to those that differ from the family's defaults."""
    inner = Keys(keys.get(key, dict, {}), f"{keys.where}: key {key!r}", keys.tensors)
    return inner.defaulting(**defaults)


def read_vision(keys: Keys, projection: int) -> VisionConfig:
    """The picture side."""
    return VisionConfig(
        **read_pictures(keys, 224, 32),
        trunk=read_tower(keys, 1e-5, "quick_gelu", input_norm=True),
        patch_bias=False,
        projection=projection,
    )


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    text, projection = nested(keys, "text_config", TEXT_DEFAULTS), keys.get("projection_dim", int, 512)
    context = text.count("max_position_embeddings")
    return DualEncoderConfig(
        vision=read_vision(nested(keys, "vision_config", VISION_DEFAULTS), projection),
        text=EncoderConfig(
            vocab=text.count("vocab_size"),
            context=context,
            trunk=read_tower(text, 1e-5, "quick_gelu", mask="causal", positions=LearnedPositions(count=context)),
        ),
        projection=projection,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, DualEncoderConfig)
    text = write_tower(config.text.trunk) | {
        "model_type": "clip_text_model",
        "vocab_size": config.text.vocab,
        "max_position_embeddings": config.text.context,
        "projection_dim": config.projection,
        # The end of a text is its last token; so it is found where several stand for padding.
        "eos_token_id": config.text.vocab - 1,
        "bos_token_id": config.text.vocab - 2,
        "pad_token_id": 1,
    }
    vision = write_tower(config.vision.trunk) | write_pictures(config.vision)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection,
        "text_config": text,
        "vision_config": vision | {"model_type": "clip_vision_model", "projection_dim": config.projection},
    }


def vision_entries(config: VisionConfig, ours: str) -> list[Entry]:
    """Every tensor of the picture side but its projection."""
    theirs = "vision_model."
    return [
        *patch_entries(f"{theirs}embeddings.patch_embedding", f"{ours}patches", config),
        token_entry(f"{theirs}embeddings.class_embedding", f"{ours}extra.weight", -1),
        same(f"{theirs}embeddings.position_embedding.weight", f"{ours}positions.weight"),
        *with_bias(
            {f"{theirs}pre_layrnorm": f"{ours}trunk.input_norm", f"{theirs}post_layernorm": f"{ours}trunk.final_norm"}
        ),
        *tower_entries(theirs, ours, len(config.trunk.layers)),
    ]


def text_entries(config: EncoderConfig) -> list[Entry]:
    """Every tensor of the text side but its projection."""
    theirs, ours = "text_model.", "text."
    return [
        same(f"{theirs}embeddings.token_embedding.weight", f"{ours}embedding.weight"),
        same(f"{theirs}embeddings.position_embedding.weight", f"{ours}trunk.positions.weight"),
        *with_bias({f"{theirs}final_layer_norm": f"{ours}trunk.final_norm"}),
        *tower_entries(theirs, ours, len(config.trunk.layers)),
    ]


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, DualEncoderConfig)
    return [
        *vision_entries(config.vision, "vision."),
        *text_entries(config.text),
        same("visual_projection.weight", "vision.projection.weight"),
        same("text_projection.weight", "text_projection.weight"),
        same("logit_scale", "logits.scale"),
    ]


CLIP = Family(
    name="clip",
    architectures=("CLIPModel",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    ignored=(r"(text|vision)_model\.embeddings\.position_ids",),
)
