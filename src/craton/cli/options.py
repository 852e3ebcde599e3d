"""Flags that several verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from pydantic import Field

from craton.config import parse
from craton.errors import UsageError
from craton.inference.settings import SamplingSettings

DEFAULT_CHAT_MODEL = "smollm2-135m-instruct"
DEFAULT_EMBED_MODEL = "minilm-l6-v2"
DEFAULT_SPEECH_MODEL = "whisper-tiny.en"

Json = Annotated[bool, Parameter(negative="", help="print one JSON document instead of text for people")]
DType = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Parameter(help="number format; auto keeps quantised weights packed and else takes the fastest without loss"),
]
Threads = Annotated[int | None, Parameter(help="CPU threads (default: what this process may use)")]


Speculate = Annotated[
    str,
    Parameter(
        help="guess ahead and check several tokens in one pass, for the same text: ngram (from the text itself), a "
        "smaller model of the same tokenizer, or off"
    ),
]
Activations = Annotated[
    Literal["auto", "exact", "int8"],
    Parameter(
        help="what packed weights are multiplied with: inputs of about 15 bits (exact) or of 8 (int8: faster); auto: "
        "int8 where the model's file asks for it"
    ),
]
KV = Annotated[
    Literal["auto", "int8"],
    Parameter(name="--kv", help="how keys and values are kept: as computed (auto), or in 8 bits for half the memory"),
]
StreamWindow = Annotated[
    int | None,
    Parameter(help="write on without end in constant memory: see the text's first tokens and so many of its last"),
]
Sinks = Annotated[int, Parameter(help="how many of the first tokens a stream window keeps")]


class SamplingFlags(SamplingSettings):
    """`SamplingSettings` as flags. Token ids come as text from a command line: `--logit-bias.123 -5`."""

    logit_bias: dict[str, float] = Field(  # type: ignore[assignment]
        default_factory=dict, description="added to the logit of a token id, as --logit-bias.ID VALUE"
    )

    json_schema: str | None = Field(  # type: ignore[assignment]
        None, description="the answer is JSON that follows this JSON Schema, given as text or as a file"
    )

    def settings(self) -> SamplingSettings:
        """The checked settings."""
        values = self.model_dump()
        if self.json_schema is not None:
            values["json_schema"] = _schema(self.json_schema)
        return parse(SamplingSettings, values, where="the flags")


def _schema(text: str) -> Any:
    where = "--json-schema"
    if not text.lstrip().startswith("{"):
        path = Path(text).expanduser()
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the JSON Schema cannot be read: {error}", where=where) from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}", where=where) from None


Sampling = Annotated[SamplingFlags, Parameter(name="*", group=Group("Sampling", sort_key=9), negative="")]
DEFAULT_SAMPLING = SamplingFlags()
