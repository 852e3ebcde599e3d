"""Any encoder of pictures beside any encoder of texts, as transformers' `VisionTextDualEncoderModel`: here a ViT or a
DINOv2 beside a BERT (LiT, Zhai 2022, arXiv 2111.07991).

Particular: each side's published pooler, and a projection without bias behind it. A ViT and a BERT have one here
whatever their own files hold: a dense layer and tanh over the first token.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families import bert, dinov2, vit
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.families.llava import moved
from craton.checkpoints.names import Entry, same
from craton.errors import CheckpointError
from craton.models import DualEncoderConfig, EncoderConfig, ModelConfig, VisionConfig

# Hugging Face's, of what files leave out.
SIDE_DEFAULTS: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_DEFAULTS = SIDE_DEFAULTS | {"vocab_size": 30522, "intermediate_size": 3072, "max_position_embeddings": 512}
VISION_DEFAULTS = SIDE_DEFAULTS | {"intermediate_size": 3072}
VISIONS = {family.name: family for family in (vit.VIT, dinov2.DINOV2, dinov2.WITH_REGISTERS)}
TEXT, VISION = "text_model.", "vision_model."  # before the names of a side's tensors


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    text, vision = _side(keys, "text_config", TEXT), _side(keys, "vision_config", VISION)
    text.refuse("model_type", "bert")
    kind = vision.get("model_type", str, "vit")
    if kind not in VISIONS:
        raise CheckpointError(
            f"pictures seen by a model of type {kind!r} beside a text encoder are not supported",
            where=f"{vision.where}: key 'model_type'",
            remedy=f"supported: {', '.join(VISIONS)}",
        )
    projection = keys.get("projection_dim", int, 512)
    sees = VISIONS[kind].read_config(vision.defaulting(**VISION_DEFAULTS))
    assert isinstance(sees, VisionConfig)
    reads = bert.read_config(text.defaulting(**TEXT_DEFAULTS))
    return DualEncoderConfig(
        vision=published_vision(sees, projection), text=published_text(reads), projection=projection
    )


def published_vision(config: VisionConfig, projection: int) -> VisionConfig:
    """How a ViT or DINOv2 is read in such files, and taken to `projection` numbers."""
    pooling = "cls" if config.trunk.layers[0].layer_scale else "pooler"
    return config.model_copy(update={"pooling": pooling, "projection": projection})


def published_text(config: EncoderConfig) -> EncoderConfig:
    """How a BERT is read in such files."""
    return config.model_copy(update={"pooler": True})


def _side(keys: Keys, key: str, prefix: str) -> Keys:
    tensors = frozenset(name.removeprefix(prefix) for name in keys.tensors if name.startswith(prefix))
    return Keys(keys.get(key, dict, {}), f"{keys.where}: key {key!r}", tensors)


def _vision_family(config: VisionConfig) -> Family:
    if config.registers:
        return dinov2.WITH_REGISTERS
    return dinov2.DINOV2 if config.trunk.layers[0].layer_scale else vit.VIT


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, DualEncoderConfig)
    vision = config.vision.model_copy(update={"projection": 0})
    return {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "projection_dim": config.projection,
        "text_config": bert.write_config(config.text),
        "vision_config": _vision_family(vision).write_config(vision),
    }


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, DualEncoderConfig)
    return [
        *moved(_vision_family(config.vision).entries(config.vision), VISION, "vision."),
        *moved(bert.entries(config.text), TEXT, "text."),
        same("visual_projection.weight", "vision.projection.weight"),
        same("text_projection.weight", "text_projection.weight"),
        same("logit_scale", "logits.scale"),
    ]


VISION_TEXT = Family(
    name="vision_text",
    architectures=("VisionTextDualEncoderModel",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    ignored=(r"text_model\.embeddings\.position_ids",),
)
