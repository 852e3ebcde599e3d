"""What `craton prompt optimize` may be told."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from craton.config import Settings


class OptimizeSettings(Settings):
    """A search for a better prompt."""

    trials: PositiveInt = Field(default=12, description="candidates to try")
    token_budget: PositiveInt | None = Field(default=None, description="tokens to read and write at most")
    minutes: float | None = Field(default=None, gt=0, description="time to take at most")
    proposals: NonNegativeInt = Field(default=2, description="instructions to let the model propose itself")
    shots: tuple[NonNegativeInt, ...] = Field(default=(0, 4, 8), description="numbers of examples to try")
    reasoning: bool = Field(default=False, description="also try step-by-step reasoning, which costs many tokens")
    seed: NonNegativeInt = Field(default=0, description="of the candidates, their examples and the order of the items")
