"""Strict JSON: from one string, or value by value from a file that is never held as a whole."""

from __future__ import annotations

import codecs
import json
import re
from typing import IO, Any, Final, NoReturn

from craton.data.lines import bad_utf8, too_long
from craton.errors import FileFormatError

CHUNK_BYTES: Final = 1 << 16
_SPACE: Final = re.compile(r"[ \t\r\n]*")


def parse_json(text: str, where: str) -> Any:
    """One JSON value, without NaN, without a key twice, without half of a surrogate pair. Raises FileFormatError."""
    try:
        value = _DECODER.decode(text)
        _check_encodable(text, value)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"not JSON: {_reason(error)}", where=where) from None
    return value


class JsonWindow:
    """A piece of a JSON file that grows until it holds the next value, and moves on behind it.

    Takes a list of values, or values one after another. Raises FileFormatError with the line.
    """

    def __init__(self, file: IO[bytes], name: str, max_bytes: int) -> None:
        self._file, self._name, self._max_bytes = file, name, max_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._position, self._line, self._read = "", 0, 1, 0
        self._grow()
        self._position = int(self._text.startswith("\ufeff"))

    def at_end(self) -> bool:
        """Whether nothing but white space is left."""
        return self._peek() == ""

    def skip(self, character: str) -> bool:
        """Move behind `character` if it comes next, after white space."""
        found = self._peek() == character
        if found:
            self._position += 1
        return found

    def value(self) -> tuple[int, Any]:
        """The next value, and the line on which it begins."""
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
                _check_encodable(self._text[self._position : end], value)
            except json.JSONDecodeError as error:
                # The value may only be cut off by the window; what is wrong stays so in a longer one.
                if len(self._text) - self._position > self._max_bytes:
                    raise too_long("the object", f"{self._name}:{self._line}", self._max_bytes) from None
                behind = error.pos - self._position
                if not self._grow():
                    self._move(self._position + behind)
                    self.refuse(error.msg)
            except (ValueError, RecursionError) as error:
                self.refuse(_reason(error))
            else:
                line = self._line
                self._move(end)
                return line, value

    def refuse(self, why: str) -> NoReturn:
        """Raise the error for what stands here."""
        raise FileFormatError(f"not JSON: {why}", where=f"{self._name}:{self._line}")

    def _peek(self) -> str:
        while True:
            space = _SPACE.match(self._text, self._position)
            self._move(space.end() if space else self._position)
            if self._position < len(self._text) or not self._grow():
                return self._text[self._position : self._position + 1]

    def _move(self, position: int) -> None:
        self._line += self._text.count("\n", self._position, position)
        self._position = position

    def _grow(self) -> bool:
        # By as much as there is, so that a long value is tried few times.
        rest = self._text[self._position :]
        pending = self._decoder.getstate()[0]
        data = self._file.read(max(CHUNK_BYTES, len(rest)))
        try:
            self._text = rest + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self._line + rest.count("\n") + (pending + data).count(b"\n", 0, error.start)
            position = self._read - len(pending) + error.start
            raise bad_utf8(self._name, line, position, b"" if self._read else data) from None
        self._position = 0
        self._read += len(data)
        return bool(data)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return str(error)


def _check_encodable(text: str, value: Any) -> None:
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half of a surrogate pair, which is no character") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} appears twice in one object")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
