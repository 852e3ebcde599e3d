"""What `craton distill` may be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from craton.config import Settings
from craton.training.settings import TrainingSettings

DistillLoss = Literal["forward", "reverse", "skew"]
# The layer of settings beneath what the user says.
USUAL: Final[Mapping[str, Any]] = {"training": {"batch": 8, "learning_rate": 3e-4}}


class DistillSettings(Settings):
    """A distillation: a student learns what a teacher thinks of every next token."""

    loss: DistillLoss = Field(
        default="forward",
        description="divergence from the teacher p to the student q: KL(p,q), KL(q,p), or KL(p, s p + (1-s) q)",
    )
    skew: float = Field(default=0.1, gt=0, lt=1, description="skew: s, the teacher's share of the mixture")
    alpha: float = Field(
        default=0.9, ge=0, le=1, description="weight of the divergence; the rest is the next token's cross-entropy"
    )
    temperature: PositiveFloat = Field(
        default=1.0, description="divides both models' logits before they are compared: higher shows more of the tail"
    )
    top_k: PositiveInt = Field(
        default=64, description="the teacher's likeliest tokens that are kept of each position; the others are one sum"
    )
    hidden: NonNegativeFloat = Field(
        default=0.0, description="weight of matching hidden states, layer by layer; keeps the teacher in memory"
    )
    on_policy: float = Field(
        default=0.0, ge=0, le=1, description="share of the examples that the student writes on itself; likewise"
    )
    on_policy_every: PositiveInt = Field(default=16, description="steps for which one round of its writing serves")
    bridge: Literal["text"] | None = Field(
        default=None, description="text: the teacher writes and the student reads it, with a tokeniser of its own"
    )
    context: PositiveInt = Field(default=512, description="tokens of a window of plain text")
    max_tokens: PositiveInt | None = Field(
        default=None, description="chats: longest conversation (none: the model's context)"
    )
    overlong: Literal["drop", "truncate", "split"] = Field(
        default="drop", description="chats: what becomes of longer ones"
    )
    minutes: PositiveFloat | None = Field(
        default=None, description="train about so long on this machine, the teacher's reading included"
    )
    holdout: float = Field(default=0.02, ge=0, le=0.5, description="share of the data kept apart for evaluation")
    name: str | None = Field(default=None, description="the name in the store (none: STUDENT-distilled)")
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files into the run's folder")
    training: TrainingSettings = Field(default=TrainingSettings(**USUAL["training"]), description="The loop.")
