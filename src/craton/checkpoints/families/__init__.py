"""One small file per family: its `config.json` and its tensor names, mapped both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from craton.checkpoints.families import (
    bert,
    clip,
    deepseek,
    dinov2,
    dinov3,
    gemma,
    gpt2,
    gpt_neox,
    idefics3,
    llama,
    llava,
    mistral,
    mixtral,
    modernbert,
    olmo2,
    phi3,
    qwen,
    qwen_moe,
    roberta,
    sam,
    siglip,
    smollm3,
    vision_text,
    vit,
    whisper,
)
from craton.checkpoints.families.family import Family
from craton.checkpoints.families.heads import CLASSIFIERS, IMAGE_CLASSIFIERS, classifier_family, masked_lm_family
from craton.errors import CheckpointError, did_you_mean

FAMILIES: tuple[Family, ...] = (
    bert.BERT,
    clip.CLIP,
    deepseek.DEEPSEEK_V2,
    deepseek.DEEPSEEK_V3,
    dinov2.DINOV2,
    dinov2.WITH_REGISTERS,
    dinov3.DINOV3,
    gemma.GEMMA1,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gpt2.GPT2,
    gpt_neox.GPT_NEOX,
    idefics3.IDEFICS3,
    llama.LLAMA,
    llava.LLAVA,
    mistral.MISTRAL,
    mixtral.MIXTRAL,
    modernbert.MODERNBERT,
    olmo2.OLMO2,
    phi3.PHI3,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen_moe.QWEN2_MOE,
    qwen_moe.QWEN3_MOE,
    roberta.ROBERTA,
    roberta.XLM_ROBERTA,
    sam.SAM,
    siglip.SIGLIP,
    smollm3.SMOLLM3,
    idefics3.SMOLVLM,
    vision_text.VISION_TEXT,
    vit.VIT,
    whisper.WHISPER,
)

# A masked language model's files are read as the encoder in them (see `Checkpoint.as_masked_lm`).
BY_ARCHITECTURE = {
    architecture: family
    for family in (*FAMILIES, *CLASSIFIERS.values(), *IMAGE_CLASSIFIERS.values())
    for architecture in family.architectures
}

__all__ = ["BY_ARCHITECTURE", "FAMILIES", "Family", "classifier_family", "family_of", "masked_lm_family"]


def family_of(hf: Mapping[str, Any], where: str) -> Family:
    """The family that a `config.json` names; `architectures` decides, so that a head is never dropped unnoticed."""
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError(
            "the config does not say which architecture this is",
            where=f"{where}: key 'architectures' is {architectures!r}",
            remedy='add "architectures": [NAME] with one of: ' + ", ".join(sorted(BY_ARCHITECTURE)),
        )
    name = architectures[0]
    if name not in BY_ARCHITECTURE and isinstance(hf.get("vision_config"), Mapping):
        raise CheckpointError(
            f"{name} sees images as well as it reads text, which is not supported",
            where=f"{where}: key 'vision_config'",
            remedy="take a model of the same family that is published for text alone",
        )
    if name not in BY_ARCHITECTURE:
        near = did_you_mean(name, BY_ARCHITECTURE)
        raise CheckpointError(
            f"unknown architecture {name!r}" + (f", did you mean {near}?" if near else ""),
            where=f"{where}: key 'architectures'",
            remedy="known architectures: " + ", ".join(sorted(BY_ARCHITECTURE)),
        )
    return BY_ARCHITECTURE[name]
