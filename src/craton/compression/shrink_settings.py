"""What `craton shrink` may be told."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from craton.config import Settings

Target = Literal["size", "latency", "quality"]
TARGETS: Final = ("size", "latency", "quality")


class ShrinkSettings(Settings):
    """A ladder of smaller models, measured."""

    target: Target = Field(
        default="size",
        description="what the chosen one is best at: the fewest bytes, the fastest token, or the best answers; "
        "all but the last among those that keep the quality",
    )
    margin: NonNegativeFloat = Field(
        default=0.03, le=1, description="of the quality on the task, the share of all points that may be lost"
    )
    text: tuple[str, ...] = Field(
        default=(), description="text to calibrate with and to recover on (none: the Python library's documentation)"
    )
    minutes: NonNegativeFloat = Field(
        default=5.0, description="distillation of each model that lost layers (0: none are removed)"
    )
    limit: PositiveInt | None = Field(default=None, description="development items to answer at most")
    rounds: PositiveInt = Field(default=3, le=20, description="times that speed is measured, models taking turns")
    seed: NonNegativeInt = Field(default=0, description="of everything that is drawn")
    threads: PositiveInt | None = Field(default=None, description="CPU threads (none: what this process may use)")
    name: str | None = Field(default=None, description="the chosen model's name in the store (none: MODEL-small)")

    @field_validator("text", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value
