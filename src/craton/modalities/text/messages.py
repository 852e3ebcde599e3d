"""Conversations as chat templates take them: a list of messages, checked and copied as plain data.

A message is {"role": ..., "content": ...}, where content is text or a list of {"type": "text", "text": ...} parts. An
assistant's message may have `tool_calls` instead of content. All other keys are passed on to the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from craton.errors import UnknownName, UsageError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

# Names that a message's reasoning comes under; templates read the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def check_messages(messages: Any, *, keep_parts: bool) -> list[Message]:
    """A checked copy of the conversation, ready for a template. keep_parts: leave lists of text parts as they are.

    Raises UsageError, naming the message, for anything that is no conversation.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise UsageError(f"messages must be a list of messages, not {type(messages).__name__}", where="messages")
    if not messages:
        raise UsageError("there are no messages", where="messages", remedy="give at least one message")
    return [_check_message(message, f"messages[{i}]", keep_parts) for i, message in enumerate(messages)]


def check_objects(values: Any, name: str) -> list[dict[str, Any]] | None:
    """A copy of a list of JSON objects (tools, documents), or None if there is none."""
    if values is None:
        return None
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
        raise UsageError(f"{name} must be a list of objects, not {type(values).__name__}", where=name)
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise UsageError(f"an object was expected, not {type(value).__name__}", where=f"{name}[{i}]")
    return [plain(value, f"{name}[{i}]") for i, value in enumerate(values)]


def plain(value: Any, where: str) -> Any:
    """A copy made of str, int, float, bool, None, list and dict only: objects with methods stay out of templates."""
    try:
        return _plain(value, where)
    except RecursionError as error:
        raise UsageError("the value is nested too deeply", where=where) from error


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # enums and other subclasses
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UsageError(f"the key {key!r} is not text", where=where)
        return {str.__str__(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise UsageError(f"a {type(value).__name__} cannot be part of a chat", where=where, remedy="give JSON values")


def _check_message(message: Any, where: str, keep_parts: bool) -> Message:
    if not isinstance(message, Mapping):
        raise UsageError(
            f"a message must be an object with role and content, not {type(message).__name__}", where=where
        )
    # APIs send null for what is absent; templates expect absent keys.
    checked: Message = {key: value for key, value in plain(message, where).items() if value is not None}
    role = checked.get("role")
    if not isinstance(role, str):
        raise UsageError("the message has no role", where=where, remedy=f"roles: {', '.join(ROLES)}")
    if role not in ROLES:
        raise UnknownName("role", role, ROLES, where=f"{where}.role")
    if "content" in checked:
        checked["content"] = _check_content(checked["content"], f"{where}.content", keep_parts)
    elif not (role == "assistant" and checked.get("tool_calls")):
        raise UsageError("the message has no content", where=where)
    return _name_reasoning(checked)


def _check_content(content: Any, where: str, keep_parts: bool) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"content must be text or a list of parts, not {type(content).__name__}", where=where)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UsageError(
                f"only text parts can be rendered here, not {kind!r}",
                where=f"{where}[{i}]",
                remedy='write {"type": "text", "text": ...}',
            )
    return content if keep_parts else "".join(part["text"] for part in content)


def _name_reasoning(message: Message) -> Message:
    """Reasoning under every name that templates read it by, as transformers gives it."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
