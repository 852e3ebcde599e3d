"""Flags made from settings: every field of a `Settings` model as an optional flag with its own description.

def pretrain(data: str, *, flags: Flags[PretrainSettings] | None = None) -> None:
    settings, origins = resolve(PretrainSettings, [("recipe.toml", recipe), (FLAGS, given(flags))])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar, Union

from cyclopts import Group, Parameter, Token
from pydantic.fields import FieldInfo

from craton.config import Settings
from craton.config.resolve import flag_of, options_of, section_of

S = TypeVar("S", bound=Settings)


class Flags(Generic[S]):
    """`Flags[S]` as the type of a verb's parameter gives the verb the flags of `S`; what arrives goes to `given`."""

    def __class_getitem__(cls, settings: type[Settings]) -> Any:
        """The type that the command line is read by."""
        return Annotated[flags_of(settings), Parameter(name="*")]


def flags_of(cls: type[Settings]) -> type[Any]:
    """A frozen dataclass with the fields of `cls`, where None means that a flag was not given. Sections are flattened:
    their fields are flags under a heading of their own in the help. Values out of range are left to `resolve`.

    Raises TypeError where two fields would be the same flag.
    """
    return _dataclass_of(cls, {})


def given(flags: Any) -> dict[str, Any]:
    """The flags that were given, nested as the settings are: a layer for `resolve`."""
    if flags is None:
        return {}
    layer: dict[str, Any] = {}
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if dataclasses.is_dataclass(value):
            value = given(value) or None
        if value is not None:
            layer[field.name] = value
    return layer


def _dataclass_of(cls: type[Settings], seen: dict[str, str], prefix: str = "") -> type[Any]:
    fields: list[tuple[str, Any, Any]] = []
    for name, field in cls.model_fields.items():
        section = section_of(field.annotation)
        key = prefix + name
        if section is not None:
            group = Group.create_ordered(name.replace("_", " ").capitalize(), help=field.description or "")
            hint: Any = Annotated[_dataclass_of(section, seen, f"{key}.") | None, Parameter(name="*", group=group)]
        else:
            if seen.setdefault(flag_of(key), key) != key:
                raise TypeError(f"{cls.__name__}: {key} and {seen[flag_of(key)]} are both {flag_of(key)}")
            hint = Annotated[Union[*options_of(field.annotation), None], _parameter(field)]
        fields.append((name, hint, dataclasses.field(default=None)))
    # The module's name matters: what seems to come from `types` is taken for a plain value.
    return dataclasses.make_dataclass(
        f"{cls.__name__}Flags", fields, frozen=True, kw_only=True, namespace={"__module__": __name__}
    )


def _parameter(field: FieldInfo) -> Parameter:
    default = field.get_default(call_default_factory=True)
    numbers = set(options_of(field.annotation)) <= {int, float}
    return Parameter(
        help=field.description,
        show_default=lambda _: _shown(default),
        negative_iterable=(),
        converter=_number if numbers else None,
    )


def _shown(default: Any) -> str | None:
    # As one would type it. What an empty default or None stands for, the description says.
    if isinstance(default, Sequence) and not isinstance(default, str):
        default = " ".join(str(part) for part in default)
    return None if default is None or default == "" or default == {} else str(default)


def _number(annotation: Any, tokens: Sequence[Token]) -> int | float:
    """A number; where a whole one is wanted, also as 1e9, but never 3.5 rounded. "none" is refused and not taken for
    a flag that was not given."""
    text = tokens[0].value
    whole = float not in options_of(annotation)
    try:
        if not whole:
            return float(text)
        return int(text) if "e" not in text.lower() else _whole(float(text))
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a {'whole ' if whole else ''}number") from None


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError
    return int(number)
