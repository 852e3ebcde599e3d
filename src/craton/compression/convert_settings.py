"""What `craton convert` may be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from craton.config import Settings
from craton.errors import UsageError

Scaling = Literal["yarn", "linear", "llama3"]


class ConvertSettings(Settings):
    """Another form of attention, of positions or of feed-forwards. At least one of context, window and experts."""

    context: PositiveInt | None = Field(default=None, description="stretch rotary positions to a context of so many")
    scaling: Scaling = Field(
        default="yarn",
        description="with context: yarn (arXiv 2309.00071), linear (2306.15595), llama3 (long wavelengths only)",
    )
    window: PositiveInt | None = Field(default=None, description="attention sees so many tokens back, its own included")
    full_every: PositiveInt | None = Field(
        default=None, description="with window: every so many-th layer still sees everything"
    )
    experts: PositiveInt | None = Field(
        default=None, description="copy each feed-forward into so many experts with a router (arXiv 2212.05055)"
    )
    per_token: PositiveInt = Field(default=2, description="with experts: how many of them each token goes to")
    seed: NonNegativeInt = Field(default=0, description="with experts: of the router's first weights")

    def check(self) -> None:
        """Raises UsageError for settings that convert nothing or contradict each other."""
        if self.context is None and self.window is None and self.experts is None:
            raise UsageError("nothing to convert", remedy="say --context N, --window W or --experts N")
        if self.full_every is not None and self.window is None:
            raise UsageError("--full-every says which layers have no window", remedy="say --window W as well")
        if self.experts is not None and self.per_token > self.experts:
            raise UsageError(f"a token cannot go to {self.per_token} of {self.experts} experts")
