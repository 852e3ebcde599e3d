"""Lines of UTF-8 text from files that may hold anything: bounded, counted, and refused with the line and the byte."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO, Final

from craton.errors import FileFormatError

MAX_RECORD_BYTES: Final = 64 << 20
"""The longest line, row or document that is read; what is longer is most likely no such thing, and is refused."""

UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class NotUtf8(FileFormatError):
    """Bytes that are no UTF-8 text."""


def read_lines(file: IO[bytes], name: str, max_bytes: int) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, from 1, and their line ends; a byte order mark is left out.

    Only LF ends a line: a JSON string may hold U+2028 and its like. Raises FileFormatError for a line that is longer
    than `max_bytes` or no UTF-8.
    """
    number, offset = 0, 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            raise too_long("the line", f"{name}:{number}", max_bytes)
        yield number, decode(line, name, number, offset)
        offset += len(line)


def decode(data: bytes, name: str, line: int = 1, offset: int = 0) -> str:
    """The text of `data`, which begins at byte `offset` and line `line` of the file. Raises FileFormatError."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise bad_utf8(name, line, offset + error.start, b"" if offset else data) from None
    return text if offset else text.removeprefix("\ufeff")


def bad_utf8(name: str, line: int, position: int, beginning: bytes) -> NotUtf8:
    """The error for a byte at `position` of the file that is no UTF-8. beginning: of the file, where it is at hand."""
    if beginning.startswith(UTF16_MARKS):
        what, encoding = "the file is UTF-16, not UTF-8", "UTF-16"
    else:
        what, encoding = f"byte {position} of the file is no UTF-8", "ITS-ENCODING"
    return NotUtf8(
        what, where=f"{name}:{line}", remedy=f"convert the file: iconv -f {encoding} -t UTF-8 {name} > NEW-FILE"
    )


def too_long(what: str, where: str, max_bytes: int, remedy: str = "split it into several records") -> FileFormatError:
    """The error for a record beyond the limit."""
    return FileFormatError(f"{what} is longer than {max_bytes / (1 << 20):g} MiB", where=where, remedy=remedy)
