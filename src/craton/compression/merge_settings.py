"""What `craton merge` of several models may be told."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, NonNegativeInt

from craton.config import Settings
from craton.errors import UsageError

MergeMethod = Literal["linear", "slerp", "ties", "dare", "dare-ties"]
# These combine the models' changes of a base.
TASK_METHODS: Final[tuple[MergeMethod, ...]] = ("ties", "dare", "dare-ties")


class MergeSettings(Settings):
    """How weights become one. With `base`, linear adds the weighted changes to it (task arithmetic, arXiv 2212.04089);
    without, it averages the weights (model soups, arXiv 2203.05482)."""

    method: MergeMethod = Field(default="linear", description="how the weights become one")
    weights: tuple[float, ...] | None = Field(
        default=None, description="a weight for each model, brought to a sum of 1 (none: all the same)"
    )
    density: float = Field(
        default=0.5, gt=0, le=1, description="ties: share of each change that is kept, the largest; dare: at random"
    )
    base: str | None = Field(default=None, description="the model that all of them were trained from")
    seed: NonNegativeInt = Field(default=0, description="dare: of what is dropped")

    def shares(self, models: int) -> tuple[float, ...]:
        """Each model's weight, in sum 1.

        Raises UsageError for settings that make no merge of so many models.
        """
        if models < 2:
            raise UsageError("one model is no merge", remedy="name two models or more")
        if self.method == "slerp" and models != 2:
            raise UsageError(f"slerp goes between two models, not {models}", remedy="--method linear takes any number")
        if self.method == "slerp" and self.base is not None:
            raise UsageError("slerp goes between two models and has no base", remedy="leave out --base")
        if self.method in TASK_METHODS and self.base is None:
            raise UsageError(
                f"{self.method} combines what the models changed, and needs what they changed it from",
                remedy="name it: --base MODEL; without one, --method linear averages",
            )
        weights = self.weights or (1.0,) * models
        if len(weights) != models:
            raise UsageError(f"{len(weights)} weights for {models} models", remedy="give each model one: --weights A,B")
        total = sum(weights)
        if any(weight < 0 for weight in weights) or not 0 < total < float("inf"):
            raise UsageError(f"weights must be 0 or more, and not all 0: {', '.join(f'{w:g}' for w in weights)}")
        return tuple(weight / total for weight in weights)
