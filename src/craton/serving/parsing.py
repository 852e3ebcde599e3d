"""From what a model writes to what it means: reasoning, text and calls of functions, as the text comes.

The formats are those of Qwen and Hermes: `<think>...</think>` before an answer, and
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>` for each call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Said:
    """A piece of an answer. call: a whole call, `text` its name and `arguments` its JSON."""

    kind: Literal["content", "reasoning", "call"]
    text: str
    arguments: str = ""


class AnswerParser:
    """Takes text and gives what it says. Text that may be the beginning of a tag is held until that is known.

    reasoning: the model writes `<think>`; inside: the prompt ended with one. calls: the model may call functions.
    bare_call: the whole answer is one call, or a list of calls, in JSON without tags.
    """

    def __init__(
        self, *, reasoning: bool = False, inside: bool = False, calls: bool = False, bare_call: bool = False
    ) -> None:
        self._reasoning, self._calls, self._bare = reasoning, calls, bare_call
        self._mode: Literal["content", "reasoning", "call"] = "reasoning" if inside else "content"
        self._held, self._space = "", ""
        self._begun = False  # whether text came before: reasoning stands only at the beginning
        self._trim = inside  # white space behind a tag is not part of the text

    def push(self, text: str) -> list[Said]:
        """What this text completes."""
        self._held += text
        if self._bare:
            return []
        said: list[Said] = []
        while self._advance(said):
            pass
        return said

    def finish(self) -> list[Said]:
        """What is left at the end. A call that is not one is text, as the model wrote it."""
        held, self._held = self._held, ""
        if self._bare:
            return [_read_call(held) or Said("content", held)] if held else []
        if self._mode == "call":
            return [_read_call(held) or Said("content", self._space + CALL + held)]
        held = self._trimmed(held)
        return [Said(self._mode, held)] if held else []

    def _advance(self, said: list[Said]) -> bool:
        """One step; False where more text is needed."""
        if self._mode == "call":
            return self._advance_call(said)
        tags = self._tags()
        at, tag = min(((self._held.find(tag), tag) for tag in tags if tag in self._held), default=(-1, ""))
        if tag:
            end, rest = at, at + len(tag)
        else:
            end = rest = len(self._held) - max((_overlap(self._held, tag) for tag in tags), default=0)
        # White space before a tag belongs to the tag, and whether one comes is not yet known.
        text = self._held[:end].rstrip() if tags else self._held[:end]
        self._space = self._held[len(text) : end]
        self._say(text, said)
        if not tag:
            self._held = self._held[len(text) :]
            return False
        self._held = self._held[rest:]
        self._mode = {THINK: "reasoning", THINK_END: "content", CALL: "call"}[tag]  # type: ignore[assignment]
        self._begun, self._trim = True, True
        return True

    def _advance_call(self, said: list[Said]) -> bool:
        inside, found, rest = self._held.partition(CALL_END)
        if not found:
            return False
        call = _read_call(inside)
        said.append(call or Said("content", self._space + CALL + inside + CALL_END))
        self._mode, self._held, self._trim = "content", rest, call is not None
        return True

    def _tags(self) -> list[str]:
        if self._mode == "reasoning":
            return [THINK_END]
        head = self._held.lstrip()[: len(THINK)]
        thinks = self._reasoning and not self._begun and THINK.startswith(head)
        return ([THINK] if thinks else []) + ([CALL] if self._calls else [])

    def _say(self, text: str, said: list[Said]) -> None:
        text = self._trimmed(text)
        if text:
            said.append(Said(self._mode, text))
            self._begun = self._begun or bool(text.strip())

    def _trimmed(self, text: str) -> str:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        return text


def _read_call(text: str) -> Said | None:
    try:
        call: Any = json.loads(text)
        name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict | str):
        return None
    return Said("call", name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, tag: str) -> int:
    # The longest end of `text` that is a beginning of `tag`.
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
