"""What `craton finetune` may be told, and what each task begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from craton.config import Settings
from craton.data.augmentation import AugmentSettings
from craton.finetuning.adapters import LoraSettings
from craton.training.settings import TrainingSettings

KIND: Final = "finetune"  # of run

Task = Literal["sft", "classify", "embed", "dpo", "orpo", "kto"]
Method = Literal["full", "lora", "dora", "qlora"]


class ObjectiveSettings(Settings):
    """What single objectives can be told."""

    beta: PositiveFloat = Field(default=0.1, description="dpo, kto: how closely the policy is held to its reference")
    label_smoothing: NonNegativeFloat = Field(
        default=0.0, lt=0.5, description="dpo: share of the pairs that may be the wrong way round"
    )
    odds_weight: NonNegativeFloat = Field(default=0.1, description="orpo: weight of the odds ratio")
    temperature: PositiveFloat = Field(default=0.05, description="embed: of the similarities")


# What is usual for few pictures of things that may stand anywhere in them and look either way.
_AUGMENT: Final = AugmentSettings(crop=0.6, flip=True, colour=0.2)


class FinetuneSettings(Settings):
    """A fine-tuning run."""

    task: Task = Field(
        default="sft", description="answers (sft), classes, text vectors, or preferences (dpo, orpo, kto)"
    )
    method: Method = Field(
        default="lora", description="all weights (full), an adapter (lora, dora), or one on 4-bit weights (qlora)"
    )
    quantization: Literal["nf4", "nf4-double", "int4", "int4-minmax", "blocks"] = Field(
        default="nf4", description="qlora: form of the frozen weights; blocks: as a GGUF file has them"
    )
    evaluation: tuple[str, ...] = Field(default=(), description="held-out data, in the form of the training data")
    holdout: float = Field(
        default=0.05, ge=0, le=0.5, description="without evaluation data: share of the examples kept apart for it"
    )
    shots: PositiveInt | None = Field(
        default=None, description="classify: train on only so many examples of each class"
    )
    max_tokens: PositiveInt | None = Field(default=None, description="longest sequence (none: the model's context)")
    overlong: Literal["drop", "truncate", "split"] = Field(
        default="drop", description="what becomes of longer ones; each case is counted"
    )
    template: bool = Field(default=False, description="put prompt and completion into the model's chat template")
    text_key: str | None = Field(default=None, description="the key that holds the text, if it is not `text`")
    label_key: str | None = Field(default=None, description="the key that holds the label, if it is not `label`")
    name: str | None = Field(default=None, description="the name in the store (none: MODEL-TASK)")
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files into the run's folder")
    lora: LoraSettings = Field(default=LoraSettings(), description="The adapter (lora, dora, qlora).")
    objective: ObjectiveSettings = Field(default=ObjectiveSettings(), description="What single tasks can be told.")
    augment: AugmentSettings = Field(default=_AUGMENT, description="How training changes a picture; texts stay.")
    training: TrainingSettings = Field(default=TrainingSettings(), description="The loop.")


# What is usual for a task where the user says nothing; learning rates for adapters, see `usual`.
_USUAL: Final[Mapping[Task, Mapping[str, Any]]] = {
    "sft": {"learning_rate": 2e-4, "batch": 16, "epochs": 2.0},
    "classify": {"learning_rate": 1e-3, "batch": 32, "epochs": 4.0, "beta2": 0.99, "weight_decay": 0.01},
    "embed": {"learning_rate": 2e-4, "batch": 64, "epochs": 2.0, "weight_decay": 0.01},
    "dpo": {"learning_rate": 2e-5, "batch": 16, "epochs": 1.0, "warmup": 0.1, "weight_decay": 0.0},
    "orpo": {"learning_rate": 5e-5, "batch": 16, "epochs": 2.0, "warmup": 0.1, "weight_decay": 0.0},
    "kto": {"learning_rate": 2e-5, "batch": 32, "epochs": 1.0, "warmup": 0.1, "weight_decay": 0.0},
}
# An adapter wants about ten times the rate of all weights (Schulman 2025, "LoRA without regret").
_FULL_SHARE: Final = 0.1


def usual(task: Task, method: Method) -> dict[str, Any]:
    """The layer of settings beneath what the user says: `resolve` lays a recipe and the flags over it."""
    training = dict(_USUAL[task])
    if method == "full":
        training["learning_rate"] *= _FULL_SHARE
    return {"training": training}
