"""Flags that several verbs share."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Group, Parameter
from pydantic import Field

from craton.config import parse
from craton.inference.settings import SamplingSettings

DEFAULT_CHAT_MODEL = "smollm2-135m-instruct"
DEFAULT_EMBED_MODEL = "minilm-l6-v2"

Json = Annotated[bool, Parameter(negative="", help="print one JSON document instead of text for people")]
DType = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Parameter(help="number format; auto keeps quantised weights packed and else takes the fastest without loss"),
]
Threads = Annotated[int | None, Parameter(help="CPU threads (default: what this process may use)")]


class SamplingFlags(SamplingSettings):
    """`SamplingSettings` as flags. Token ids come as text from a command line: `--logit-bias.123 -5`."""

    logit_bias: dict[str, float] = Field(  # type: ignore[assignment]
        default_factory=dict, description="added to the logit of a token id, as --logit-bias.ID VALUE"
    )

    def settings(self) -> SamplingSettings:
        """The checked settings."""
        return parse(SamplingSettings, self.model_dump(), where="the flags")


Sampling = Annotated[SamplingFlags, Parameter(name="*", group=Group("Sampling", sort_key=9), negative="")]
DEFAULT_SAMPLING = SamplingFlags()
