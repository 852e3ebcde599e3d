"""What `craton pretrain` may be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from craton.config import Settings
from craton.training.settings import TrainingSettings


class ShapeSettings(Settings):
    """Sizes that the dial does not choose."""

    width: PositiveInt | None = Field(default=None, description="size of the residual stream")
    layers: PositiveInt | None = Field(default=None, description="number of blocks")
    heads: PositiveInt | None = Field(default=None, description="query heads of each layer; they share the width")
    kv_heads: PositiveInt | None = Field(default=None, description="key-value heads, which the query heads share")
    hidden: PositiveInt | None = Field(default=None, description="inner size of the feed-forward")


class PretrainSettings(Settings):
    """A pretraining run: from nothing (`size`) or from a model (`model`)."""

    size: str = Field(
        default="30m", description="the one dial: parameters of a fresh model; picks shape, batch, rate and tokens"
    )
    model: str | None = Field(default=None, description="go on with this model instead of a fresh one")
    objective: Literal["next-token", "masked-token"] = Field(
        default="next-token", description="masked-token trains an encoder"
    )
    experts: NonNegativeInt = Field(default=0, description="feed-forwards of a mixture of experts (0: dense)")
    tokenizer: str | None = Field(
        default=None, description="a model or a folder whose tokeniser is used (none: one is trained on the data)"
    )
    vocab: str = Field(default="8k", description="tokens of a tokeniser that is trained on the data")
    context: PositiveInt = Field(default=512, description="tokens of a training window, and the fresh model's context")
    minutes: PositiveFloat | None = Field(
        default=None, description="train about so long on this machine, instead of by a number of tokens"
    )
    tokens: PositiveInt | None = Field(default=None, description="train on so many tokens (none: 20 a parameter)")
    holdout: float = Field(default=0.01, ge=0, le=0.5, description="share of the documents kept apart for evaluation")
    name: str | None = Field(default=None, description="the name in the store (none: pretrained-SIZE)")
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files into the run's folder")
    shape: ShapeSettings = Field(
        default=ShapeSettings(), description="Sizes of a fresh model, where the dial shall not choose."
    )
    training: TrainingSettings = Field(default=TrainingSettings(), description="The loop.")
