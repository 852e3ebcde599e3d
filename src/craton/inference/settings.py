"""The settings of one generation. Free of torch, so that a command line can describe them without loading it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from craton.config import Settings


class SamplingSettings(Settings):
    """How tokens are chosen and when to stop. The defaults are greedy and so give the same text each time."""

    temperature: float = Field(0.0, ge=0, le=100, description="0 takes the likeliest token; higher is more random")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens (0: all)")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that together reach p")
    min_p: float = Field(0.0, ge=0, le=1, description="keep tokens at least min_p times as likely as the likeliest")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="divides the logits of tokens already in the text")
    presence_penalty: float = Field(0.0, ge=-100, le=100, description="subtracted once a token was generated")
    frequency_penalty: float = Field(0.0, ge=-100, le=100, description="subtracted for each time it was generated")
    logit_bias: dict[int, float] = Field(default_factory=dict, description="added to the logits of these token ids")
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same seed gives the same text; none: a new one")
    max_tokens: int | None = Field(
        None, ge=1, description="the longest answer in tokens (none: what the context holds)"
    )
    stop: Annotated[tuple[str, ...], Field(max_length=16)] = Field((), description="strings that end the answer")
    n: int = Field(1, ge=1, le=128, description="how many answers")
    logprobs: int | None = Field(
        None, ge=0, le=100, description="log-probabilities of the chosen token and of this many others"
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty stop string would stop at once")
        return stop

    def __hash__(self) -> int:
        return id(self)  # logit_bias is a dict; settings are never used as values of a set
