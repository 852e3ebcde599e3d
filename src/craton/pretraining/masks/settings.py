"""What `craton pretrain-masks` may be told, and what is usual for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from craton.config import Settings
from craton.training.settings import TrainingSettings


class SceneSettings(Settings):
    """How cut-outs become scenes, each time anew. Of annotated pictures `flip`, `colour` and `channels` hold too."""

    objects: PositiveInt = Field(default=4, description="cut-outs in a scene, at most; later ones cover earlier ones")
    smallest: PositiveFloat = Field(default=0.25, le=1, description="longer side of a cut-out, as a share of the scene")
    largest: PositiveFloat = Field(default=0.8, le=1, description="the same at most")
    plain: float = Field(
        default=0.3, ge=0, le=1, description="share of scenes on a generated background, where there are others"
    )
    flip: bool = Field(default=True, description="half of the cut-outs, backgrounds and pictures are mirrored")
    colour: float = Field(default=0.3, ge=0, le=1, description="how far brightness and contrast may be from 1")
    channels: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of cut-outs, backgrounds and pictures whose red, green and blue change places",
    )


class PromptSettings(Settings):
    """What the model is asked (Kirillov 2023, section 3)."""

    prompts: PositiveInt = Field(default=4, description="prompts for each scene; each thing is asked for in turn")
    boxes: float = Field(default=0.2, ge=0, le=1, description="share of prompts that are boxes; all others are clicks")
    jitter: float = Field(default=0.1, ge=0, le=0.5, description="how far a box may be off, as a share of its sides")
    central: float = Field(default=0.5, ge=0, le=1, description="share of clicks that keep away from a thing's edge")
    shared: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="of a first prompt's loss all guesses have this share, the best one the rest",
    )
    corrections: NonNegativeInt = Field(default=2, description="clicks into what was wrong, each after an answer")


class MaskPretrainSettings(Settings):
    """A training run on masks: from nothing (`size`) or from a segmenter (`model`)."""

    size: str = Field(default="2m", description="parameters of a fresh model, which pick its widths and depth")
    model: str | None = Field(default=None, description="go on with this segmenter instead of a fresh one")
    image_size: PositiveInt = Field(default=96, description="side of a picture in pixels, for a fresh model")
    patch: PositiveInt = Field(default=8, description="side of a patch in pixels, for a fresh model")
    backgrounds: tuple[str, ...] = Field(
        default=(), description="pictures to paste cut-outs on (none: generated ones alone)"
    )
    images: str | None = Field(default=None, description="where the pictures of COCO files lie (none: beside the file)")
    evaluation: tuple[str, ...] = Field(default=(), description="held-out data, in the form of the training data")
    holdout: float = Field(
        default=0.05, ge=0, le=0.5, description="without evaluation data: share of it that is kept apart for that"
    )
    name: str | None = Field(default=None, description="the name in the store (none: masks)")
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files into the run's folder")
    scenes: SceneSettings = Field(default=SceneSettings(), description="How cut-outs become scenes.")
    prompts: PromptSettings = Field(default=PromptSettings(), description="What the model is asked.")
    training: TrainingSettings = Field(default=TrainingSettings(), description="The loop.")


# Where the user says nothing.
USUAL: Final[Mapping[str, Any]] = {
    "training": {
        "batch": 32, "epochs": 60.0, "learning_rate": 1e-3, "weight_decay": 0.05, "beta2": 0.98,
        "warmup": 0.05, "decay": 0.5, "final_rate": 0.0,
    },
}  # fmt: skip
