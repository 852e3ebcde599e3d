"""What `craton pretrain-pairs` may be told, and what is usual for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import Field, PositiveInt

from craton.config import Settings
from craton.data.augmentation import AugmentSettings
from craton.training.settings import TrainingSettings


class PairPretrainSettings(Settings):
    """A training run on pictures with captions: from nothing (`size`), from a model of both (`model`), or for a text
    encoder that stays as it is (`text_model`).
    """

    loss: Literal["softmax", "sigmoid"] | None = Field(
        default=None, description="softmax: CLIP's; sigmoid: SigLIP's (none: softmax, or what the model began with)"
    )
    size: str = Field(
        default="2m", description="parameters of a fresh model, both sides together (beside a text model: of pictures)"
    )
    model: str | None = Field(default=None, description="go on with this model of both instead of a fresh one")
    text_model: str | None = Field(
        default=None, description="teach pictures to this text encoder (BERT, MiniLM ...), which stays as it is"
    )
    vision_model: str | None = Field(
        default=None, description="beside a text model: begin with this ViT or DINOv2 instead of a fresh side"
    )
    image_size: PositiveInt = Field(default=64, description="side of a picture in pixels, for a fresh model")
    patch: PositiveInt = Field(default=8, description="side of a patch in pixels, for a fresh model")
    vocab: PositiveInt = Field(default=4096, description="tokens of a fresh model's tokeniser, at most")
    context: int = Field(default=32, ge=3, description="longest caption in tokens, for a fresh model; others are cut")
    evaluation: tuple[str, ...] = Field(default=(), description="held-out pairs, in the form of the training data")
    holdout: float = Field(
        default=0.05, ge=0, le=0.5, description="without evaluation data: share of the pairs kept apart for it"
    )
    name: str | None = Field(default=None, description="the name in the store (none: pairs-LOSS)")
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files into the run's folder")
    augment: AugmentSettings = Field(default=AugmentSettings(), description="How training changes a picture.")
    training: TrainingSettings = Field(default=TrainingSettings(), description="The loop.")


# Where the user says nothing. No mirror: captions say left and right, and letters have a side.
USUAL: Final[Mapping[str, Any]] = {
    "training": {
        "batch": 256, "epochs": 30.0, "learning_rate": 1e-3, "weight_decay": 0.1, "beta2": 0.98,
        "warmup": 0.1, "decay": 0.5, "final_rate": 0.0,
    },
    "augment": {"crop": 0.6, "colour": 0.2},
}  # fmt: skip
