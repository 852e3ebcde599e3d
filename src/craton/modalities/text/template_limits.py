"""How much work one rendering of a chat template may do, without a thread or a process to kill.

Templates come with checkpoints, so they are foreign code. The sandbox keeps them from reaching anything; this module
keeps them from running on: every loop pass, call, filter and copied character is charged to an allowance that depends
only on the size of the input, and an allowance that is used up ends the rendering. The same input gives the same
verdict on every machine.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from craton.errors import TemplateError

# One unit is about one character copied. Interpreted work costs more: a step (a loop pass, a call), an item looked at.
STEP = 64
_ITEM = 32
# A hostile template ends within about a second. Templates in use take under 1 % for a short conversation and about 6 %
# for hundreds of long messages.
_BASE_WORK = 16_000_000
_WORK_PER_CHARACTER = 64
_WORK_PER_ITEM = 256 * STEP
_MAX_CALL_DEPTH = 50
_MAX_INTEGER_BITS = 4096

_NO_ITEMS: dict[str, Any] = {}
_SEQUENCES: tuple[type[Any], ...] = (
    list,
    tuple,
    type(_NO_ITEMS.keys()),
    type(_NO_ITEMS.values()),
    type(_NO_ITEMS.items()),
)
_SIZED: tuple[type[Any], ...] = (str, dict, range, *_SEQUENCES)


@dataclass
class Rendering:
    """The state of one rendering. marks: characters put around generation blocks, if these are to be found again."""

    work_left: int
    now: datetime.datetime
    marks: tuple[str, str] | None
    call_depth: int = 0


_current: ContextVar[Rendering] = ContextVar("rendering")


@contextmanager
def rendering(
    inputs: Any, *, now: datetime.datetime | None = None, marks: tuple[str, str] | None = None
) -> Iterator[None]:
    """Opens the allowance for a rendering of `inputs` (plain data)."""
    token = _current.set(Rendering(_BASE_WORK + _input_allowance(inputs), now or datetime.datetime.now(), marks))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Rendering:
    return _current.get()


def charge(units: int) -> None:
    """Takes `units` off the allowance; TemplateError when it is used up."""
    state = _current.get()
    state.work_left -= units
    if state.work_left < 0:
        raise TemplateError(
            "the chat template does too much work for these messages",
            where="chat template",
            remedy="it loops or copies far more than templates do; use the template of the model's own repository",
        )


def step() -> bool:
    """One pass of a loop. True, so that it can stand in a condition."""
    charge(STEP)
    return True


def enter_call() -> None:
    """The beginning of a call of a macro, function or method, which may call others in turn."""
    charge(4 * STEP)
    state = _current.get()
    state.call_depth += 1
    if state.call_depth > _MAX_CALL_DEPTH:
        raise TemplateError(
            f"macros of the chat template call each other more than {_MAX_CALL_DEPTH} levels deep",
            where="chat template",
        )


def leave_call() -> None:
    """The end of a call, whether it succeeded or not."""
    _current.get().call_depth -= 1


def length(value: Any) -> int:
    """Characters or items of the value itself; 1 for anything that has no size."""
    return len(value) if isinstance(value, _SIZED) else 1


def weight(value: Any) -> int:
    """Units of all that is reachable from the value, shared parts once for each way there (as text they repeat).

    Stops counting soon after what is left of the allowance, because lists of lists can stand for endless text.
    """
    if isinstance(value, str):
        return len(value)
    total, enough = 0, _current.get().work_left
    stack = [value]
    while stack and total <= enough:
        item = stack.pop()
        total += len(item) if isinstance(item, str) else _ITEM * length(item)
        _extend(stack, item)
    return total


def check_integer(value: Any) -> None:
    """Numbers may not grow without bound: arithmetic on them, and writing them out, takes longer than linear time."""
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        raise TemplateError("the chat template computes with absurdly large numbers", where="chat template")


def check_printf(text: str) -> None:
    """Refuses a % format whose widths or precisions make text out of nothing."""
    for part in text.split("%")[1:]:
        spec = part.partition(")")[2] if part.startswith("(") else part
        digits = spec[: len(spec) - len(spec.lstrip("#0- +.*123456789hlL"))]
        _check_widths(digits)


def check_format_spec(spec: str) -> None:
    """Refuses a str.format specification with absurd widths, or one that takes them from a value."""
    _check_widths(spec.replace("{", "*"))


def _check_widths(spec: str) -> None:
    numbers = "".join(c if c.isdigit() else " " for c in spec).split()
    if "*" in spec or any(len(number) > 3 for number in numbers):
        raise TemplateError(f"the chat template asks for text of an absurd width ({spec!r})", where="chat template")


def _input_allowance(inputs: Any) -> int:
    allowance = 0
    stack = [inputs]
    while stack:
        item = stack.pop()
        allowance += _WORK_PER_ITEM
        if isinstance(item, str):
            allowance += _WORK_PER_CHARACTER * len(item)
        _extend(stack, item)
    return allowance


def _extend(stack: list[Any], item: Any) -> None:
    """Puts the parts of a container on the stack."""
    if isinstance(item, _SEQUENCES):
        stack.extend(item)
    elif isinstance(item, dict):
        stack.extend(item.keys())
        stack.extend(item.values())
