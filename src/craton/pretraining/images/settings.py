"""What `craton pretrain-images` may be told, and what each objective begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from craton.config import Settings
from craton.data.augmentation import AugmentSettings
from craton.training.settings import TrainingSettings

ImageObjective = Literal["classes", "masked-pixels", "self-distillation"]


class ImagePretrainSettings(Settings):
    """A training run on pictures: from nothing (`size`) or from a model (`model`)."""

    objective: ImageObjective = Field(
        default="classes", description="labels, hidden patches (MAE), or agreement between views (DINO)"
    )
    size: str = Field(default="1m", description="parameters of a fresh model, which pick its width and depth")
    model: str | None = Field(default=None, description="go on with this model instead of a fresh one")
    image_size: PositiveInt = Field(default=64, description="side of a picture in pixels, for a fresh model")
    patch: PositiveInt = Field(default=8, description="side of a patch in pixels, for a fresh model")
    channels: Literal[1, 3] = Field(default=3, description="colours, or 1 for shades of grey; for a fresh model")
    minutes: PositiveFloat | None = Field(
        default=None, description="train about so long on this machine, instead of for a number of epochs"
    )
    evaluation: tuple[str, ...] = Field(default=(), description="held-out pictures, in the form of the training data")
    holdout: float = Field(
        default=0.05, ge=0, le=0.5, description="without evaluation data: share of the pictures kept apart for it"
    )
    label_smoothing: NonNegativeFloat = Field(default=0.1, lt=1, description="classes: share spread over all of them")
    hidden: PositiveFloat = Field(
        default=0.75, lt=1, description="masked-pixels, and self-distillation's student: share of the patches not seen"
    )
    views: int = Field(default=2, ge=2, le=8, description="self-distillation: views of each picture")
    momentum: PositiveFloat = Field(default=0.99, lt=1, description="self-distillation: of the teacher")
    name: str | None = Field(default=None, description="the name in the store (none: images-OBJECTIVE)")
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files into the run's folder")
    augment: AugmentSettings = Field(default=AugmentSettings(), description="How training changes a picture.")
    training: TrainingSettings = Field(default=TrainingSettings(), description="The loop.")


_LOOP: Final[Mapping[str, Any]] = {
    "batch": 256, "epochs": 10.0, "learning_rate": 1e-3, "weight_decay": 0.05, "beta2": 0.99,
    "warmup": 0.05, "decay": 0.5, "final_rate": 0.0,
}  # fmt: skip
# What is usual for an objective where the user says nothing.
USUAL: Final[Mapping[ImageObjective, Mapping[str, Any]]] = {
    "classes": {
        "training": {**_LOOP, "optimiser": "muon", "learning_rate": 3e-3},
        "augment": {"shift": 0.08, "flip": True, "erase": 0.25},
    },
    "masked-pixels": {
        "training": {**_LOOP, "optimiser": "muon", "learning_rate": 3e-3},
        "augment": {"shift": 0.05, "flip": True},
    },
    "self-distillation": {
        "hidden": 0.5,
        "training": {**_LOOP, "optimiser": "muon", "learning_rate": 2e-3},
        "augment": {"crop": 0.6, "flip": True, "colour": 0.2},
    },
}
