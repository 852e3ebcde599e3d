"""Other people's names for the same records, where they mean only one thing: Alpaca's, ShareGPT's, and a few pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from craton.errors import DataError, UnknownName

Value = dict[str, Any]

SHAREGPT_ROLES: Final = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"} | {
    role: role for role in ("system", "tool")
}


class Alias(NamedTuple):
    """keys: what a record must have. absent: what would give it another meaning. note: the decision, for people."""

    keys: tuple[str, ...]
    absent: tuple[str, ...]
    note: str
    convert: Callable[[Value, str], Value]


def find_alias(value: Mapping[str, Any]) -> Alias | None:
    """The alias that the record's keys are, if any."""
    fits = (a for a in ALIASES if all(k in value for k in a.keys) and not any(k in value for k in a.absent))
    return next(fits, None)


def _instruction(value: Value, where: str) -> Value:
    answer = value["output"] if "output" in value else value["response"]
    parts = [value["instruction"], value.get("input") or value.get("context")]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise DataError("instruction and input must be text", where=where)
    return {"prompt": "\n\n".join(part for part in parts if part), "completion": answer}


def _conversations(value: Value, where: str) -> Value:
    turns = value["conversations"]
    if isinstance(turns, list) and all(isinstance(turn, Mapping) and "from" in turn for turn in turns):
        turns = [_turn(turn, f"{where}, conversations[{i}]") for i, turn in enumerate(turns)]
    if isinstance(value.get("system"), str) and value["system"]:
        turns = [{"role": "system", "content": value["system"]}, *turns]
    return {"messages": turns, "tools": value.get("tools")}


def _turn(turn: Mapping[str, Any], where: str) -> Value:
    if turn["from"] not in SHAREGPT_ROLES:
        raise UnknownName("speaker", str(turn["from"]), SHAREGPT_ROLES, where=where)
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}


def _renamed(prompt: str, completion: str) -> Callable[[Value, str], Value]:
    return lambda value, where: {"prompt": value[prompt], "completion": value[completion]}


ALIASES: Final = (
    Alias(("conversations",), (), "conversations (ShareGPT) read as messages", _conversations),
    Alias(
        ("instruction", "output"), ("response",), "instruction, input, output read as prompt, completion", _instruction
    ),
    Alias(
        ("instruction", "response"),
        ("output",),
        "instruction, context, response read as prompt, completion",
        _instruction,
    ),
    Alias(("prompt", "response"), (), "prompt, response read as prompt, completion", _renamed("prompt", "response")),
    Alias(
        ("question", "answer"),
        ("context", "passage", "choices", "options"),
        "question, answer read as prompt, completion",
        _renamed("question", "answer"),
    ),
)
