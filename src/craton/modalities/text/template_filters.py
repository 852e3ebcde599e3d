"""The filters, tests, functions and methods that a chat template may use, each charged for its work.

They are Jinja's own, plus what Hugging Face templates expect (`raise_exception`, `strftime_now`, a `tojson` that leaves
<, > and & alone). Those that can make much out of little are bounded before they run. Filters for web pages and log
files, and those that are not deterministic, are left out.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NoReturn

import jinja2
from jinja2.filters import (
    FILTERS,
    do_batch,
    do_center,
    do_format,
    do_indent,
    do_replace,
    do_round,
    sync_do_join,
    sync_do_slice,
)
from jinja2.tests import TESTS
from jinja2.utils import Namespace

from craton.errors import TemplateError
from craton.modalities.text import template_limits as limits

Function = Callable[..., Any]

_LEFT_OUT = {"filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"}
_FREE_FILTERS = {"attr", "count", "d", "default", "first", "last", "length"}
_SHALLOW_FILTERS = {"items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"}
_SORTING_FILTERS = {"dictsort", "groupby", "max", "min", "sort", "unique"}
_COMPARING_TESTS = {
    *("eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<="),
    *("gt", ">", "greaterthan", "ge", ">=", "in", "upper", "lower"),
}

_STRING_METHODS = {
    *("capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "index", "isalnum", "isalpha"),
    *("isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle"),
    *("isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind"),
    *("rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase"),
    *("title", "upper", "zfill"),
}
_METHODS: dict[type, set[str]] = {
    str: _STRING_METHODS,
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
}


class TemplateNamespace(Namespace):
    """`namespace()`: Jinja's, but names that begin with an underscore are refused and its repr shows no contents."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is the first of args, so that `namespace(self=...)` works as it does in Jinja.
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def template_filters() -> dict[str, Function]:
    """name -> filter."""
    special = {
        "batch": _batch,
        "center": _center,
        "format": _format,
        "indent": _indent,
        "int": _int,
        "join": _join,
        "replace": _replace,
        "round": _round,
        "slice": _slice,
        "sum": _sum,
        "tojson": _tojson,
    }
    return {name: _charged_filter(name, special.get(name, f)) for name, f in FILTERS.items() if name not in _LEFT_OUT}


def template_tests() -> dict[str, Function]:
    """name -> test."""
    tests: Mapping[str, Any] = TESTS
    return {name: _charged(f, limits.weight if name in _COMPARING_TESTS else _nothing) for name, f in tests.items()}


def template_globals() -> dict[str, Any]:
    """name -> function or class, beside Jinja's own `range`, `cycler` and `joiner`."""
    return {
        "dict": _dict,
        "namespace": TemplateNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }


def check_method(function: Any, args: tuple[Any, ...]) -> None:
    """Charges a method of a built-in value before it is called; TemplateError for one that no template needs."""
    owner = getattr(function, "__self__", None)
    if not isinstance(function, (types.BuiltinMethodType, types.MethodType)) or isinstance(owner, types.ModuleType):
        return
    kinds = [kind for kind in (str, dict, list, tuple, int, float, bytes) if isinstance(owner, kind)]
    if not kinds:
        return
    name = function.__name__
    if name not in _METHODS.get(kinds[0], set()):
        raise TemplateError(f"the chat template may not call .{name}() of a {kinds[0].__name__}", where="chat template")
    limits.charge(sum(map(limits.weight, args)) + (limits.weight(owner) if kinds[0] is not dict else 0))
    if isinstance(owner, str):
        limits.charge(_string_growth(owner, name, args))


def concat(parts: list[Any]) -> str:
    """The `~` operator."""
    limits.charge(sum(map(limits.weight, parts)))
    return "".join(map(str, parts))


def _string_growth(text: str, name: str, args: tuple[Any, ...]) -> int:
    """Characters that a string method can make beyond those of its arguments."""
    if name in {"center", "ljust", "rjust", "zfill"}:
        return _count(args[:1])
    if name == "expandtabs":
        return text.count("\t") * _count(args[:1] or (8,))
    if name == "replace" and len(args) >= 2:
        return text.count(str(args[0])) * len(str(args[1]))
    if name == "join" and args:
        return len(text) * limits.length(args[0])
    return 0


def _charged_filter(name: str, function: Function) -> Function:
    if name in _FREE_FILTERS:
        return _charged(function, _nothing)
    if name in _SHALLOW_FILTERS:
        return _charged(function, limits.length)
    if name in _SORTING_FILTERS:
        return _charged(function, _sorting)
    return _charged(function, limits.weight)


def _charged(function: Function, cost: Callable[[Any], int]) -> Function:
    """The function, charged for its arguments and for its result."""
    own = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja's context, which is not the template's data

    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        limits.charge(2 * limits.STEP + sum(map(cost, args[own:])) + sum(map(cost, kwargs.values())))
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            # Done now, within the allowance, instead of whenever it is read.
            items = list(islice(result, limits.current().work_left + 1))
            limits.charge(len(items))
            return iter(items)
        limits.charge(limits.length(result))
        return result

    return charged


def _nothing(value: Any) -> int:
    return 0


def _sorting(value: Any) -> int:
    weight = limits.weight(value)
    return weight * weight.bit_length()


def _count(values: tuple[Any, ...]) -> int:
    return sum(max(int(value), 0) for value in values if isinstance(value, (int, float)))


def _batch(value: Any, linecount: int, fill_with: Any = None) -> Iterator[Any]:
    limits.charge(_count((linecount,)))
    return do_batch(value, linecount, fill_with)


def _slice(value: Any, slices: int, fill_with: Any = None) -> Iterator[Any]:
    limits.charge(_count((slices,)))
    return sync_do_slice(value, slices, fill_with)


def _center(value: str, width: int = 80) -> str:
    limits.charge(_count((width,)))
    return do_center(value, width)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    limits.check_printf(str(value))
    return do_format(value, *args, **kwargs)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    limits.charge((str(s).count("\n") + 1) * (len(width) if isinstance(width, str) else _count((width,))))
    return do_indent(s, width, first, blank)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    if isinstance(value, str) and len(value) > 1000:
        raise TemplateError("the chat template reads an absurdly long number", where="chat template")
    return FILTERS["int"](value, default, base)


@jinja2.pass_eval_context
def _join(eval_context: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    items = list(value)
    limits.charge(limits.weight(items) + len(items) * len(str(d)))
    return sync_do_join(eval_context, items, d, attribute)


@jinja2.pass_eval_context
def _replace(eval_context: Any, s: str, old: str, new: str, count: int | None = None) -> str:
    limits.charge(str(s).count(str(old)) * len(str(new)))
    return do_replace(eval_context, s, old, new, count)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 20:
        raise TemplateError("the chat template rounds to an absurd precision", where="chat template")
    return do_round(value, precision, method)


@jinja2.pass_environment
def _sum(environment: Any, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise TemplateError("the chat template sums up something other than numbers", where="chat template")
    return FILTERS["sum"](environment, iterable, attribute, start)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as in Hugging Face templates: readable characters stay as they are."""
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for width in (indent, *(separators or ())):
        if width is not None:
            limits.charge(len(width) if isinstance(width, str) else _count((width,)))
    chunks = []
    for chunk in encoder.iterencode(x):
        limits.charge(len(chunk))
        chunks.append(chunk)
    return "".join(chunks)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    limits.charge(limits.weight(args) + limits.weight(kwargs))
    return dict(*args, **kwargs)


def _raise_exception(message: Any = "") -> NoReturn:
    raise TemplateError(
        f"the chat template refuses these messages: {message}",
        where="messages",
        remedy="the model expects another order or kind of messages",
    )


def _strftime_now(format: str) -> str:
    if len(format) > 200:
        raise TemplateError("the chat template asks for an absurdly long date", where="chat template")
    return limits.current().now.strftime(format)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a chat template may not store the name {name!r} in a namespace", where="chat template")
