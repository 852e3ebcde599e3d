"""The base of every configuration object, and the one way to make one from untrusted values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from craton.errors import UnknownName, UsageError


class Settings(BaseModel):
    """A frozen model that forbids unknown keys. Compare and hash by value."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


def parse(cls: type[S], values: Mapping[str, Any], *, where: str) -> S:
    """Make a `cls` from `values`; `where` names their origin (a file and line, a flag) in the error.

    Raises UnknownName for a key that `cls` does not have (with the nearest known ones) and UsageError for a value
    of the wrong type or out of range.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UnknownName("setting", key, cls.model_fields, where=where) from None
        raise UsageError(f"{key or cls.__name__}: {first['msg']} (got {first['input']!r})", where=where) from None
