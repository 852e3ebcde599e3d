"""Settings from several layers (defaults, a preset, a recipe file, flags), with the origin of each value."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from craton.config.settings import Settings, parse
from craton.errors import FileFormatError, UnknownName, UsageError

FLAGS: Final = "the flags"
"""The name of the layer of the command line: what comes from it is called by its flag ("--learning-rate")."""
DEFAULT: Final = "default"

S = TypeVar("S", bound=Settings)


def read_toml(path: str | Path, what: str = "the recipe") -> dict[str, Any]:
    """The settings in a TOML file; `what` it is, for the words of a refusal.

    Raises:
        UsageError: the file cannot be read.
        FileFormatError: it is not UTF-8 or not TOML; `where` gives the line.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.strerror}", where=str(path)) from None
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FileFormatError(f"{what} is not UTF-8 text", where=f"{path}:{line}") from None
    except ValueError as error:  # TOMLDecodeError, or a number of too many digits
        raise _bad_toml(path, what, str(error), len(raw.rstrip().splitlines())) from None
    except RecursionError:
        raise FileFormatError(f"{what} is nested too deeply", where=str(path)) from None


def resolve(cls: type[S], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[S, dict[str, str]]:
    """Lay `layers` (origin, values) over the defaults of `cls`, later ones on top; nested tables merge key by key.

    Gives the checked settings and, for each dotted key, the origin of its value: "default", the name of the layer
    ("recipe.toml", "--size 30m") or, for the layer `FLAGS`, the flag.

    Raises:
        UnknownName: a key that `cls` does not have, with the nearest known ones and the layer that has it.
        UsageError: a value of the wrong type or out of range, with the layer that set it.
    """
    stack = _Layers(cls)
    for origin, layer in layers:
        stack.add(origin, layer)
    try:
        settings = cls.model_validate(stack.values)
    except ValidationError as error:
        names = [origin for origin, layer in layers if layer]
        where = stack.origin_of(error.errors()[0]["loc"]) or ", ".join(names) or "the defaults"
        parse(cls, stack.values, where=where)  # says it in words
        raise
    return settings, {key: stack.origins.get(key, DEFAULT) for key, _ in leaves(settings)}


def leaves(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of `settings` and their values, in the order of the fields; sections are walked into."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def section_of(annotation: Any) -> type[Settings] | None:
    """The settings class of a field that is a section (`Optimiser` or `Optimiser | None`); None for a plain value."""
    classes = [option for option in options_of(annotation) if isinstance(option, type)]
    return classes[0] if len(classes) == 1 and issubclass(classes[0], Settings) else None


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union without None; of any other annotation, itself. All without their bounds."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    bare = (get_args(option)[0] if get_origin(option) is Annotated else option for option in options)
    return tuple(option for option in bare if option is not type(None))


def flag_of(key: str) -> str:
    """The flag of a dotted key: sections are only headings in the help, so `optimiser.learning_rate` is
    `--learning-rate`."""
    return "--" + key.rpartition(".")[2].replace("_", "-")


class _Layers:
    """What the layers so far come to: `values`, nested as the settings are, and the origin of each by dotted key."""

    def __init__(self, cls: type[Settings]) -> None:
        self.cls = cls
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def add(self, origin: str, layer: Mapping[str, Any]) -> None:
        self._add(self.cls, self.values, layer, origin, "")

    def _add(
        self, cls: type[Settings], values: dict[str, Any], layer: Mapping[str, Any], origin: str, prefix: str
    ) -> None:
        for name, value in layer.items():
            key = prefix + name
            if name not in cls.model_fields:
                raise UnknownName("setting", key, _keys(self.cls), where=origin)
            section = section_of(cls.model_fields[name].annotation)
            if section is not None and isinstance(value, Mapping):
                if not isinstance(values.get(name), dict):  # the section was switched off, or not mentioned yet
                    values[name] = {}
                    self.origins.pop(key, None)
                self._add(section, values[name], value, origin, f"{key}.")
                continue
            for old in [old for old in self.origins if old.startswith(f"{key}.")]:
                del self.origins[old]
            values[name] = value
            self.origins[key] = flag_of(key) if origin == FLAGS else origin

    def origin_of(self, location: tuple[int | str, ...]) -> str | None:
        # An error may lie inside a value (an item of a list), so the longest known beginning of its place counts.
        for end in range(len(location), 0, -1):
            key = ".".join(str(part) for part in location[:end])
            if key in self.origins:
                return self.origins[key]
        return None


def _keys(cls: type[Settings], prefix: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from _keys(section, f"{prefix}{name}.")


def _bad_toml(path: Path, what: str, message: str, last_line: int) -> FileFormatError:
    # Before Python 3.14 the parser says the place only in its message: "... (at line 3, column 5)".
    place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    line = place[1] if place and place[1] else last_line
    reason = message[: place.start()] if place else message
    return FileFormatError(f"{what} is not TOML: {reason}", where=f"{path}:{line}", remedy="see https://toml.io")
