"""One form for each schema: what may be written in several ways is written in one, and is of the right type.

text        {"text": str}
prompt      {"prompt": str, "completion": str}, or both lists of messages
messages    {"messages": list, "tools": list or None}
preference  {"prompt", "chosen", "rejected"}: str, or all three lists of messages, the answers without the prompt
binary      as prompt, with {"label": bool}
labelled    {"text": str, "label": str}
pairs       {"anchor": str, "positive": str, "negatives": list of str}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from craton.errors import DataError

Value = dict[str, Any]
Messages = list[Mapping[str, Any]]

_EXAMPLE: Final = 'a message is {"role": "user", "content": "..."}'
_SPEAKERS: Final = (("prompt", "user"), ("completion", "assistant"))
_TRUTH: Final = {"true": True, "false": False, "1": True, "0": False, "True": True, "False": False}


def text_form(value: Value, where: str) -> Value:
    """{"text"}"""
    return {"text": _text(value, "text", where)}


def prompt_form(value: Value, where: str) -> Value:
    """{"prompt", "completion"}"""
    if isinstance(value["prompt"], str) and isinstance(value["completion"], str):
        return {"prompt": value["prompt"], "completion": value["completion"]}
    prompt, completion = (_as_messages(value, key, role, where) for key, role in _SPEAKERS)
    return {"prompt": prompt, "completion": completion}


def messages_form(value: Value, where: str) -> Value:
    """{"messages", "tools"}; tools may be a string that holds JSON, as tables must have them."""
    tools = value.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise DataError("tools is a string that holds no JSON", where=where) from None
    return {"messages": _messages(value, "messages", where), "tools": tools or None}


def preference_form(value: Value, where: str) -> Value:
    """{"prompt", "chosen", "rejected"}"""
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    if all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    chosen, rejected = _messages(value, "chosen", where), _messages(value, "rejected", where)
    if prompt is None:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = chosen[:shared]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    else:
        prompt = _messages(value, "prompt", where)
    if not prompt:
        raise DataError(
            "chosen and rejected share no prompt", where=where, remedy="give the prompt, as text or as messages"
        )
    if all(answer[: len(prompt)] == prompt for answer in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def binary_form(value: Value, where: str) -> Value:
    """{"prompt", "completion", "label"}; tables write the label as text or a number."""
    label = _TRUTH.get(str(value["label"]))
    if label is None:
        raise DataError(f"label must be true or false, not {value['label']!r}", where=where)
    return {**prompt_form(value, where), "label": label}


def labelled_form(value: Value, where: str) -> Value:
    """{"text", "label"}"""
    label = value["label"]
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise DataError(f"label must be a name or a whole number, not {label!r}", where=where)
    return {"text": _text(value, "text", where), "label": str(label)}


def pairs_form(value: Value, where: str) -> Value:
    """{"anchor", "positive", "negatives"}"""
    negatives = value.get("negatives") or value.get("negative") or []
    negatives = [negatives] if isinstance(negatives, str) else negatives
    if not isinstance(negatives, list) or not all(isinstance(text, str) for text in negatives):
        raise DataError("negatives must be texts", where=where)
    return {
        "anchor": _text(value, "anchor", where),
        "positive": _text(value, "positive", where),
        "negatives": negatives,
    }


FORMS: Final[Mapping[str, Callable[[Value, str], Value]]] = {
    "text": text_form,
    "prompt": prompt_form,
    "messages": messages_form,
    "preference": preference_form,
    "binary": binary_form,
    "labelled": labelled_form,
    "pairs": pairs_form,
}


def texts_of(value: Value) -> Iterator[str]:
    """What people or models have written in a record that has its form: the texts, and the contents of messages."""
    for key, part in value.items():
        if key in ("tools", "label"):
            continue
        for item in part if isinstance(part, list) else [part]:
            content = item.get("content") if isinstance(item, Mapping) else item
            pieces = content if isinstance(content, list) else [content]
            for piece in pieces:
                text = piece.get("text") if isinstance(piece, Mapping) else piece
                if isinstance(text, str):
                    yield text


def _text(value: Value, key: str, where: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"{key} must be text, not {_kind(text)}", where=where)
    return text


def _messages(value: Value, key: str, where: str) -> Messages:
    messages = value[key]
    if not isinstance(messages, list):
        raise DataError(f"{key} must be a list of messages, not {_kind(messages)}", where=where, remedy=_EXAMPLE)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(
                f"a message must be an object, not {_kind(message)}", where=f"{where}, {key}[{i}]", remedy=_EXAMPLE
            )
    return messages


def _as_messages(value: Value, key: str, role: str, where: str) -> Messages:
    # Where one part is a list of messages, text in the other is one message.
    if isinstance(value[key], str):
        return [{"role": role, "content": value[key]}]
    return _messages(value, key, where)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", type(None): "null", str: "text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
