"""A conversation on its way into the engine: one form for chat completions, responses and messages alike."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from craton.modalities.text import TEMPLATE_VARIABLES
from craton.serving.errors import ApiError
from craton.serving.models import Served
from craton.serving.parsing import THINK, AnswerParser
from craton.serving.tools import call_grammar, check_shown, template_source, writes_tags

if TYPE_CHECKING:
    from craton.inference.pictures import PromptPicture
    from craton.prompting.answering import Passage

Message = dict[str, Any]

# OpenAI's and Anthropic's, where a request names none.
DEFAULT_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Chat:
    """What is asked. tools: OpenAI's form. tool_choice: "auto", "none", "required"; or, with named_tool, a
    function's name.

    sampling: fields of `SamplingSettings`, max_tokens only if it was given. variables: of the chat template.
    """

    messages: Sequence[Message]
    sampling: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    named_tool: bool = False
    parallel: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A prompt, how to continue it, how to read what comes (a parser for each answer), and the sources that an
    application found. said: the answer, where it was found at once. pictures: whose tokens stand among the ids."""

    ids: list[int]
    sampling: dict[str, Any]
    parsers: tuple[AnswerParser, ...]
    sources: tuple[Passage, ...] = ()
    said: str | None = None
    pictures: tuple[PromptPicture, ...] = ()


def prepare(served: Served, chat: Chat) -> Prepared:
    """Render a conversation and settle its form. Works on tokens and pixels alone, so it may run in any thread.

    Raises ApiError for what this model cannot do, and what rendering raises.
    """
    tokenizer = served.model.tokenizer
    sampling = {"temperature": DEFAULT_TEMPERATURE, **chat.sampling}
    forced = chat.named_tool or chat.tool_choice == "required"
    tools = tuple(chat.tools) if forced or chat.tool_choice == "auto" else ()
    if forced and not tools:
        raise ApiError(400, "there are no tools to choose from", param="tool_choice")
    tags = False
    if tools:
        check_shown(tokenizer, served.id)
        tags = writes_tags(tokenizer)
    if forced:
        sampling["grammar"] = _grammar(chat, tools, sampling, tags=tags)
    _check_variables(served, chat.variables)
    messages = [_for_template(message, tokenizer.chat_template or "") for message in chat.messages]
    prompt = served.model.prompt(messages, tools=list(tools) or None, **chat.variables)
    shaped = any(key in sampling for key in ("json_schema", "regex", "choices", "grammar"))
    thinks = THINK in template_source(tokenizer, tools=bool(tools)) and not shaped
    inside = thinks and prompt.text.rstrip().endswith(THINK)

    def parser() -> AnswerParser:
        return AnswerParser(reasoning=thinks, inside=inside, calls=tags, bare_call=forced and not tags)

    parsers = tuple(parser() for _ in range(sampling.get("n", 1)))
    return Prepared(prompt.ids, sampling, parsers, pictures=prompt.pictures)


def _grammar(chat: Chat, tools: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any], *, tags: bool) -> str:
    if any(key in sampling for key in ("json_schema", "regex", "choices", "grammar")):
        raise ApiError(400, "an answer has one form: a call that must be made, or another", param="tool_choice")
    chosen = [tool for tool in tools if not chat.named_tool or tool["function"]["name"] == chat.tool_choice]
    if not chosen:
        raise ApiError(400, f"there is no tool {chat.tool_choice!r}", param="tool_choice")
    several = chat.parallel and not chat.named_tool
    return call_grammar(chosen, tags=tags, several=several)


def _check_variables(served: Served, variables: Mapping[str, Any]) -> None:
    source = template_source(served.model.tokenizer, tools=True) + (served.model.tokenizer.chat_template or "")
    for name in variables:
        # Read as a variable of its own, not as a part of another name or as a key of something.
        if name not in TEMPLATE_VARIABLES or not re.search(rf"(?<![\w.'\"]){name}\b", source):
            raise ApiError(400, f"the chat template of {served.id} has no variable {name[:64]!r}", param=name[:64])


def _for_template(message: Message, template: str) -> Message:
    """A message as templates know it: arguments as objects, and a system message where developers have no role."""
    message = dict(message)
    if message["role"] == "developer" and "developer" not in template:
        message["role"] = "system"
    if message.get("tool_calls"):
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_object(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return message


def _as_object(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments  # as the model wrote it: an agent that sends it back must not be stuck
    return value if isinstance(value, dict) else arguments
