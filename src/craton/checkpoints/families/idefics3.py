"""Idefics 3 (Laurençon 2024, arXiv 2408.12637) and SmolVLM (Marafioti 2025, arXiv 2504.05299).

Particular: SigLIP without its pooling, squares of patches side by side in one vector, one linear layer, and Llama.
Their vision side also knows padded pictures, by fractional positions; here a picture fills its tile, as those that
`modalities.image.splitting` cuts do, and its positions are then the plain grid's.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.clip import nested
from craton.checkpoints.families.decoder import decoder_entries
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.families.llava import moved, read_text, with_pictures, write_text
from craton.checkpoints.families.siglip import vision_entries
from craton.checkpoints.families.vision import read_pictures, read_tower, write_pictures, write_tower
from craton.checkpoints.names import Entry, same
from craton.models import ImageChatConfig, ModelConfig, VisionConfig

VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
}


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    vision = nested(keys, "vision_config", VISION_DEFAULTS)
    return with_pictures(
        read_text(keys, tied=keys.get("tie_word_embeddings", bool, False)),
        vision=VisionConfig(
            **read_pictures(vision, 224, 32),
            trunk=read_tower(vision, 1e-6, "gelu_pytorch_tanh"),
            class_token=False,
            pooling="mean",
        ),
        image_token=keys.get("image_token_id", int, 128257),
        shuffle=keys.get("scale_factor", int, 2),
        projector="linear",
    )


def _write_config(config: ModelConfig, architecture: str, kind: str) -> dict[str, Any]:
    assert isinstance(config, ImageChatConfig)
    vision = write_tower(config.vision.trunk) | write_pictures(config.vision)
    return {
        "architectures": [architecture],
        "model_type": kind,
        "image_token_id": config.image_token,
        "scale_factor": config.shuffle,
        "tie_word_embeddings": config.tied,
        "vision_config": vision | {"model_type": f"{kind}_vision"},
        "text_config": write_text(config),
    }


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, ImageChatConfig)
    return [
        *moved(vision_entries(config.vision, "vision."), "model."),
        same("model.connector.modality_projection.proj.weight", "projector.up.weight"),
        # The head's name has no prefix.
        *(
            entry if entry.theirs == ("lm_head.weight",) else moved([entry], "model.text_model.", without="model.")[0]
            for entry in decoder_entries(config)
        ),
    ]


def _family(name: str, architecture: str) -> Family:
    return Family(
        name=name,
        architectures=(architecture,),
        read_config=read_config,
        write_config=lambda config: _write_config(config, architecture, name),
        entries=entries,
        ignored=(r"model\.text_model\..*\.rotary_emb\.inv_freq", r"model\.vision_model\.embeddings\.position_ids"),
    )


IDEFICS3 = _family("idefics3", "Idefics3ForConditionalGeneration")
SMOLVLM = _family("smolvlm", "SmolVLMForConditionalGeneration")
