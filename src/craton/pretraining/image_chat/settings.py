"""What `craton pretrain-chat` may be told, and what is usual for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import Field, PositiveInt

from craton.config import Settings
from craton.training.settings import TrainingSettings


class ChatPretrainSettings(Settings):
    """A training run of the projector between a vision tower and a language model, both of which stay as they are."""

    vision: str | None = Field(
        default=None, description="the CLIP or SigLIP whose picture side becomes the vision tower"
    )
    language: str | None = Field(default=None, description="the language model, a Llama or a Mistral made for chat")
    question: str = Field(
        default="What is this?", description="what a user asks of a picture that has a caption (empty: nothing)"
    )
    evaluation: tuple[str, ...] = Field(default=(), description="held-out data, in the form of the training data")
    holdout: float = Field(
        default=0.05, ge=0, le=0.5, description="without evaluation data: share of the records kept apart for it"
    )
    max_tokens: PositiveInt | None = Field(
        default=None, description="longest conversation, pictures included (none: the model's context); others are left"
    )
    name: str | None = Field(default=None, description="the name in the store (none: LANGUAGE-sees)")
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files into the run's folder")
    training: TrainingSettings = Field(default=TrainingSettings(), description="The loop.")


# Where the user says nothing: LLaVA's first stage (Liu 2023, arXiv 2310.03744, table 9), with smaller batches.
USUAL: Final[Mapping[str, Any]] = {
    "training": {"batch": 32, "epochs": 1.0, "learning_rate": 1e-3, "weight_decay": 0.0, "schedule": "cosine"}
}
