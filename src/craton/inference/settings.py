"""The settings of one generation. Free of torch, so that a command line can describe them without loading it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from craton.config import Settings

Activations = Literal["auto", "exact", "int8"]
KV = Literal["auto", "int8"]


class EngineSettings(Settings):
    """How a model writes, whatever it is asked. Speculation changes the time and not the text."""

    speculate: str = Field(
        "ngram",
        description="guess ahead and check several tokens in one pass, for the same text: from the text itself "
        "(ngram), by a smaller model of the same tokenizer (its name), or off",
    )
    stream_window: int | None = Field(
        None, ge=8, description="write on without end: see the text's first tokens and this many of its last ones"
    )
    activations: Activations = Field(
        "auto",
        description="what packed weights are multiplied with: inputs of about 15 bits (exact) or of 8 (int8: faster, a "
        "little less exact); auto: int8 where the model's file asks for it",
    )
    kv: KV = Field(
        "auto",
        description="how keys and values are kept: as the model computes, float16 in the native step (auto), or in 8 "
        "bits with a scale for each token and head (int8): half the memory of a context, or less",
    )
    sinks: int = Field(4, ge=0, description="how many of the first tokens a stream window keeps")
    slots: int = Field(8, ge=1, description="answers that are written at once")
    cache_bytes: int | None = Field(
        None, ge=1 << 20, description="memory for keys and values (none: a quarter of the machine's)"
    )


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

    json_schema: dict[str, Any] | None = Field(None, description="the answer is JSON that follows this schema")
    regex: str | None = Field(None, description="the answer matches this regular expression as a whole")
    choices: tuple[str, ...] = Field((), description="the answer is one of these strings")
    grammar: str | None = Field(None, description="the answer follows this Lark grammar")

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty stop string would stop at once")
        return stop

    @field_validator("choices")
    @classmethod
    def _no_empty_choice(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        if "" in choices:
            raise ValueError("an empty choice is no answer")
        return choices

    @model_validator(mode="after")
    def _one_form(self) -> SamplingSettings:
        forms = {
            "json_schema": self.json_schema is not None,
            "regex": self.regex is not None,
            "choices": bool(self.choices),
            "grammar": self.grammar is not None,
        }
        given = [name for name, is_given in forms.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"an answer has one form, not {' and '.join(given)}")
        return self

    def __hash__(self) -> int:
        return id(self)  # some fields are dicts; settings are never used as values of a set
