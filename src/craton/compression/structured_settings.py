"""What structured pruning may be told."""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from craton.config import Settings


class StructuredSettings(Settings):
    """What is taken out of a model, as whole parts: what stays is a smaller dense model of the same family."""

    layers: PositiveInt | None = Field(default=None, description="how many layers to remove")
    heads: float | None = Field(
        default=None, gt=0, lt=1, description="share of the key-value heads to remove, each with its query heads"
    )
    channels: float | None = Field(default=None, gt=0, lt=1, description="share of the feed-forward's channels")
    vocab: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="text files: of the vocabulary only what these use stays"
    )

    @model_validator(mode="after")
    def _something(self) -> StructuredSettings:
        if self.layers is None and self.heads is None and self.channels is None and self.vocab is None:
            raise ValueError("nothing to remove: say how many layers, heads or channels, or which texts' vocabulary")
        return self
