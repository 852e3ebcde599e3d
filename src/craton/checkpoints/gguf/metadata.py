"""The typed values of GGUF metadata: what Python's own numbers do not say, how wide they are, said with `u32(7)`."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeAlias

from craton.errors import UsageError

Scalar: TypeAlias = bool | int | float | str
PlainValue: TypeAlias = Scalar | list[Any]


class ValueType(Enum):
    """A metadata type: its id in the file and its `struct` code (a string has none). Arrays hold one of these."""

    U8 = (0, "B")
    I8 = (1, "b")
    U16 = (2, "H")
    I16 = (3, "h")
    U32 = (4, "I")
    I32 = (5, "i")
    F32 = (6, "f")
    BOOL = (7, "?")
    STRING = (8, "")
    U64 = (10, "Q")
    I64 = (11, "q")
    F64 = (12, "d")

    def __init__(self, id: int, code: str) -> None:
        self.id = id
        self.code = code
        self.item_bytes = struct.calcsize(f"<{code}")

    def packing(self, count: int) -> struct.Struct:
        """The little-endian packing of `count` numbers of this type."""
        return struct.Struct(f"<{count}{self.code}")


ARRAY_ID = 9  # the id that stands before (element type, count, elements)
VALUE_TYPE_OF_ID = {type.id: type for type in ValueType}


@dataclass(frozen=True, slots=True)
class TypedValue:
    """A metadata value as the file holds it: one value of `type`, or, where `value` is a list, an array of them."""

    type: ValueType
    value: PlainValue


def _typed(type: ValueType, value: Scalar | Iterable[Scalar]) -> TypedValue:
    """`value`, or every item of it, as `type`. Raises UsageError where an item is of another kind or does not fit."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return TypedValue(type, _as_stored(type, [value])[0])
    return TypedValue(type, _as_stored(type, list(value)))


def _as_stored(type: ValueType, items: list[Scalar]) -> list[Scalar]:
    """The items as a reader of the file will see them: an F32 is rounded here."""
    if type in (ValueType.BOOL, ValueType.STRING):
        expected = bool if type is ValueType.BOOL else str
        for item in items:
            if not isinstance(item, expected):
                raise UsageError(f"{item!r:.80} is not a {expected.__name__}, as a {type.name} value must be")
        return items
    packing = type.packing(len(items))
    try:
        return list(packing.unpack(packing.pack(*items)))
    except (struct.error, OverflowError) as error:
        raise UsageError(f"a value does not fit {type.name}: {error}", remedy="use a wider type") from error


# One for each type; each takes one value or, for an array, an iterable of them: u32(7), f32([0.5, 1.0]), string([]).
u8 = partial(_typed, ValueType.U8)
i8 = partial(_typed, ValueType.I8)
u16 = partial(_typed, ValueType.U16)
i16 = partial(_typed, ValueType.I16)
u32 = partial(_typed, ValueType.U32)
i32 = partial(_typed, ValueType.I32)
u64 = partial(_typed, ValueType.U64)
i64 = partial(_typed, ValueType.I64)
f32 = partial(_typed, ValueType.F32)
f64 = partial(_typed, ValueType.F64)
boolean = partial(_typed, ValueType.BOOL)
string = partial(_typed, ValueType.STRING)


def as_typed(key: str, value: TypedValue | PlainValue) -> TypedValue:
    """`value` with its type, guessed only where there is one answer: a bool, a str, or a list of str that is not empty.

    Raises UsageError for a bare number or any other list: the file needs its width, and a wrong guess is a broken file.
    """
    match value:
        case TypedValue():
            return value
        case bool():
            return boolean(value)
        case str() | [str(), *_]:
            return string(value)
    raise UsageError(
        f"{value!r:.80} says nothing of its type in the file",
        where=f"key {key!r}",
        remedy="wrap it with one of u8 ... i64, f32, f64, boolean, string: u32(7), f32([0.5, 1.0])",
    )
