"""Prompt files: what a model is told, with variables, examples, reasoning and the form of the answer.

TOML, or Markdown whose front matter (between two lines `+++`) is TOML and whose body is the template:

    +++
    system = "You sort customer questions."
    [examples]
    count = 4
    choose = "similar"
    +++
    {{ input }}

Variables are `input`, the fields of a record, `choices`, and `passages` (a list of texts) or `context` (the same,
numbered). They are filled in by Jinja in its sandbox; a variable that does not exist is an error, not an empty string.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from craton.config import Settings, parse
from craton.config.resolve import read_toml
from craton.errors import FileFormatError, UsageError

FRONT: Final = "+++"
SUFFIXES: Final = (".toml", ".md", ".markdown")

Choose = Literal["random", "similar", "diverse"]
Scoring = Literal["generate", "likelihood", "calibrated"]


class ExampleSettings(Settings):
    """Which training examples a prompt shows."""

    count: NonNegativeInt = Field(default=0, le=256, description="how many examples to show")
    choose: Choose = Field(
        default="random",
        description="the same ones for all questions, drawn at random or spread widely (diverse), or those nearest to "
        "the question (similar)",
    )
    seed: NonNegativeInt = Field(default=0, description="of the draw")
    passages: bool = Field(
        default=False, description="show each example with the best passage for it, where passages are shown at all"
    )


class AnswerSettings(Settings):
    """The form of an answer, enforced while it is written, and how it is chosen."""

    choices: tuple[str, ...] = Field(default=(), description="the answer is one of these (none: the task's classes)")
    regex: str | None = Field(default=None, description="the answer matches this regular expression")
    json_schema: dict[str, Any] | None = Field(default=None, description="the answer is JSON of this JSON Schema")
    scoring: Scoring = Field(
        default="generate",
        description="write the answer, or take the choice that the model gives the highest log-likelihood, as it is or "
        "calibrated by what the model thinks of it without a question (Zhao et al. 2021)",
    )
    max_tokens: PositiveInt = Field(default=48, description="longest answer")
    stop: tuple[str, ...] = Field(default=("\n",), description="strings that end the answer")

    @model_validator(mode="after")
    def _one_form(self) -> AnswerSettings:
        if sum(map(bool, (self.choices, self.regex, self.json_schema))) > 1:
            raise ValueError("an answer has one form: choices, regex or json_schema")
        if self.scoring != "generate" and (self.regex or self.json_schema):
            raise ValueError("only choices can be scored; regex and json_schema are generated")
        return self


class Prompt(Settings):
    """A prompt: everything that decides what the model reads and how its answer is taken."""

    system: str | None = Field(default=None, description="the system message, a template too")
    template: str = Field(default="{{ input }}", description="the user's message")
    examples: ExampleSettings = Field(default=ExampleSettings(), description="Examples that the prompt shows.")
    answer: AnswerSettings = Field(default=AnswerSettings(), description="The form of the answer.")
    form: Literal["chat", "text"] = Field(
        default="chat",
        description="ask by the model's chat template, or as one plain text, which small models often follow better",
    )
    reasoning: bool = Field(default=False, description="let the model think step by step, then answer in the form")
    reasoning_tokens: PositiveInt = Field(default=128, description="longest reasoning")
    samples: PositiveInt = Field(
        default=1, le=64, description="answers to draw, of which the most frequent counts (self-consistency)"
    )
    temperature: float = Field(default=0.7, gt=0, le=10, description="of the draws, where samples is more than 1")

    @field_validator("system", "template")
    @classmethod
    def _is_template(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                _ENVIRONMENT.parse(text)
            except TemplateSyntaxError as error:
                raise ValueError(f"line {error.lineno} of the template: {error.message}") from None
        return text

    @model_validator(mode="after")
    def _one_draw(self) -> Prompt:
        if self.samples > 1 and self.answer.scoring != "generate":
            raise ValueError("only generated answers can be drawn several times")
        return self

    @property
    def variables(self) -> frozenset[str]:
        """The names that its templates ask for."""
        texts = [text for text in (self.system, self.template) if text]
        return frozenset().union(*(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)) for text in texts))

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all its settings."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def messages(
        self,
        variables: Mapping[str, Any],
        examples: Sequence[tuple[Mapping[str, Any], str]] = (),
    ) -> list[dict[str, str]]:
        """The conversation that asks: examples (variables, answer) as earlier turns, then the question.

        Raises UsageError for a variable that is not there and for a template that fails.
        """
        turns = [{"role": "system", "content": self._fill(self.system, variables)}] if self.system else []
        for values, answer in examples:
            turns.append({"role": "user", "content": self._fill(self.template, values)})
            turns.append({"role": "assistant", "content": answer})
        return [*turns, {"role": "user", "content": self._fill(self.template, variables)}]

    def _fill(self, text: str, variables: Mapping[str, Any]) -> str:
        passages = list(variables.get("passages", ()))
        context = "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, 1))
        try:
            return _ENVIRONMENT.from_string(text).render({**variables, "passages": passages, "context": context})
        except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            known = ", ".join(sorted({*variables, "passages", "context"}))
            raise UsageError(
                f"the prompt cannot be filled in: {error}", where=text[:80], remedy=f"it may use: {known}"
            ) from None


def read_prompt(path: str | Path) -> Prompt:
    """The prompt in a TOML or Markdown file.

    Raises UsageError for a file that is not there or a wrong setting, FileFormatError for one that is damaged.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"a prompt is a .toml or .md file, not {path.name!r}", where=str(path))
    if path.suffix.lower() == ".toml":
        return parse(Prompt, read_toml(path, "the prompt"), where=str(path))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"the prompt cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise FileFormatError("the prompt is not UTF-8 text", where=str(path)) from None
    text = text.replace("\r\n", "\n")
    front = re.match(rf"{re.escape(FRONT)}\n(.*?\n)?{re.escape(FRONT)}\n", text, re.DOTALL)
    try:
        table = tomllib.loads(front[1] or "") if front else {}
    except tomllib.TOMLDecodeError as error:
        raise FileFormatError(f"the front matter is not TOML: {error}", where=str(path)) from None
    if "template" in table:
        raise UsageError("the template of a Markdown prompt is its body", where=str(path))
    body = text[front.end() :] if front else text
    return parse(Prompt, table | {"template": body.strip("\n")}, where=str(path))


def prompt_toml(prompt: Prompt) -> str:
    """The prompt as a TOML file that `read_prompt` reads; settings with their default values are left out."""
    lines, tables = [], []
    for key, value in prompt.model_dump(mode="json", exclude_defaults=True).items():
        if isinstance(value, dict):
            tables.append(f"\n[{key}]")
            tables += [f"{inner} = {_toml(one)}" for inner, one in value.items() if one is not None]
        else:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    # JSON's strings, numbers and booleans are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


_ENVIRONMENT: Final = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=False
)
