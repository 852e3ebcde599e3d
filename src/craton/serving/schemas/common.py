"""What request bodies share: strictness, sampling, and the names of forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from craton.errors import did_you_mean
from craton.serving.errors import ApiError


class Body(BaseModel):
    """Frozen, without unknown fields; numbers are numbers, and finite."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


Name = Annotated[str, Field(min_length=1, max_length=256)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(ge=0, le=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Stops = Stop | Annotated[list[Stop], Field(max_length=16)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
JsonObject = dict[str, Any]


class StreamOptions(Body):
    """What a stream brings beside its text."""

    include_usage: bool = False


class SamplingFields(Body):
    """How tokens are chosen, by OpenAI's names, with Craton's further ones."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    guided_json: JsonObject | None = None
    guided_regex: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    guided_choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)] | None = (
        None
    )
    guided_grammar: Annotated[str, Field(min_length=1, max_length=65536)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingSettings` that these set."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return sampling_values(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=None if self.logit_bias is None else {int(i): bias for i, bias in self.logit_bias.items()},
            seed=None if self.seed is None else self.seed % 2**63,
            stop=stop or None,
            n=self.n,
            json_schema=self.guided_json,
            regex=self.guided_regex,
            choices=None if self.guided_choice is None else tuple(self.guided_choice),
            grammar=self.guided_grammar,
        )


B = TypeVar("B", bound=Body)


def sampling_values(**values: Any) -> dict[str, Any]:
    """Only what is set; a nucleus of nothing is the likeliest token."""
    given = {key: value for key, value in values.items() if value is not None}
    if given.get("top_p") == 0:
        given["top_p"] = 1e-9
    return given


def read_body(cls: type[B], raw: bytes) -> B:
    """A checked body. Raises ApiError 400 that names the field."""
    try:
        return cls.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(cls, error) from None


def read_values(cls: type[B], values: Mapping[str, Any]) -> B:
    """A checked body of a form's values, in which numbers are written as texts. Raises ApiError 400 that names the
    field."""
    try:
        return cls.model_validate(values, strict=False)
    except ValidationError as error:
        raise _refusal(cls, error) from None


def _refusal(cls: type[Body], error: ValidationError) -> ApiError:
    # In a union the branch that got furthest says most of what was meant.
    first = max(error.errors(include_url=False, include_input=False), key=lambda found: len(found["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if not first["loc"]:
        return ApiError(400, f"the body must be a JSON object: {first['msg']}", code="invalid_body")
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = did_you_mean(str(first["loc"][-1]), cls.model_fields) if len(first["loc"]) == 1 else None
        hint = f": did you mean {near}?" if near else ""
        return ApiError(
            400, f"the field {field[:200]!r} is not supported{hint}", param=field[:200], code="unsupported_field"
        )
    return ApiError(400, f"{field[:200]}: {first['msg'][:500]}", param=field[:200], code="invalid_value")
