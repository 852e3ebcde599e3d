"""Everything of a training run that its user may set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from craton.config import Settings

ScheduleName = Literal["wsd", "cosine", "linear", "constant"]
OptimiserName = Literal["adamw", "muon"]
ComputeDType = Literal["auto", "float32", "bfloat16"]


class TrainingSettings(Settings):
    """The loop's settings. Lengths are in steps; a step is one update from `batch` examples."""

    steps: PositiveInt | None = Field(default=None, description="updates to make (none: as many as `epochs` takes)")
    epochs: PositiveFloat = Field(default=1.0, description="passes over the data, where `steps` is not given")
    batch: PositiveInt = Field(
        default=32, description="examples of one update, over all micro-batches and ranks; chosen likewise"
    )
    micro_tokens: PositiveInt = Field(
        default=4096, description="tokens that go through the model at once; changes memory and speed, not the result"
    )
    learning_rate: PositiveFloat = Field(
        default=2e-4, description="the highest learning rate; unless given, chosen by the size or the task"
    )
    schedule: ScheduleName = Field(default="wsd", description="how the learning rate falls after the warm-up")
    warmup: NonNegativeFloat = Field(default=0.03, le=1, description="share of the steps over which it rises from 0")
    decay: NonNegativeFloat = Field(
        default=0.2, le=1, description="wsd: share of the steps over which it falls at last"
    )
    final_rate: NonNegativeFloat = Field(default=0.1, le=1, description="where it ends, as a share of the highest")
    optimiser: OptimiserName = Field(default="adamw", description="muon: for matrices, with AdamW for all else")
    weight_decay: NonNegativeFloat = Field(default=0.1, description="of matrices; never of norms, biases, embeddings")
    beta1: NonNegativeFloat = Field(default=0.9, lt=1, description="AdamW: decay of the gradient's average")
    beta2: NonNegativeFloat = Field(default=0.95, lt=1, description="AdamW: decay of the squared gradient's average")
    clip: NonNegativeFloat = Field(default=1.0, description="longest gradient (0: not clipped)")
    dtype: ComputeDType = Field(default="auto", description="of activations; weights and optimiser state stay float32")
    checkpointing: bool = Field(default=False, description="compute activations again going backwards, for less memory")
    compile: bool = Field(default=False, description="compile each block with torch.compile; needs a C++ compiler")
    seed: NonNegativeInt = Field(default=0, description="of the order of the data, the dropout and fresh weights")
    evaluate_every: NonNegativeInt = Field(default=0, description="steps between evaluations (0: at the end only)")
    save_every: NonNegativeInt = Field(default=0, description="steps between checkpoints (0: about every five minutes)")
    keep_last: PositiveInt = Field(default=2, description="newest checkpoints to keep, beside the best one")
    tensor_parallel: PositiveInt = Field(default=1, description="ranks that share each layer, under torchrun")
    threads: PositiveInt | None = Field(default=None, description="CPU threads (none: what this process may use)")
