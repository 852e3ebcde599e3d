"""Bounds-checked reading of a hostile GGUF header: every length is held against the file before it is used."""

from __future__ import annotations

import mmap
import struct
from typing import Any, NoReturn

from craton.checkpoints.gguf.metadata import Scalar, ValueType
from craton.errors import FileFormatError

# Limits that no real file comes near (a vocabulary of 262,144 with scores, types and merges is 1.3 million items and
# 20 MB), and that keep what a hostile header can make us allocate to some hundred megabytes.
MAX_HEADER_BYTES = 128 << 20
MAX_ARRAY_ITEMS = 1 << 22  # over all arrays of a file
MAX_NAME_BYTES = 65_535  # the format's own limit for a key

DOWNLOAD_AGAIN = "the file is damaged or incomplete: fetch it again"
_LENGTH = struct.Struct("<Q")


class Cursor:
    """Reads the header from its start. `subject` says what is being read, for the words of a refusal."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self._data = data
        self._path = path
        self._items_left = MAX_ARRAY_ITEMS
        self.subject = "header"
        self.position = 0

    def refuse(self, what: str, *, at: int | None = None, remedy: str = DOWNLOAD_AGAIN) -> NoReturn:
        """Raise the FileFormatError that names the file, the subject and the byte (by default, the current one)."""
        position = self.position if at is None else at
        raise FileFormatError(what, where=f"{self._path}, {self.subject}, byte {position}", remedy=remedy)

    def left(self) -> int:
        """Bytes between here and the end of the file or of the longest header that is read."""
        return min(len(self._data), MAX_HEADER_BYTES) - self.position

    def u32(self) -> int:
        return int(self.scalar(ValueType.U32))

    def u64(self) -> int:
        return int(self.scalar(ValueType.U64))

    def scalar(self, type: ValueType) -> Scalar:
        """One metadata value."""
        if type is ValueType.STRING:
            return self.text("string", MAX_HEADER_BYTES)
        value: Scalar = self._numbers(type, 1)[0]
        return value

    def array(self, type: ValueType, count: int) -> list[Any]:
        """`count` metadata values. A string's bytes that are not UTF-8 come as surrogates (PEP 383), and go back so.

        Byte-level vocabularies hold such tokens; nowhere else in a file are they accepted.
        """
        if count > self._items_left:
            self.refuse(f"an array of {count} items, more than {MAX_ARRAY_ITEMS} items in all")
        self._items_left -= count
        if type is ValueType.STRING:
            return self._strings(count)
        return self._numbers(type, count)

    def text(self, kind: str, limit: int) -> str:
        """A string that must be UTF-8 and at most `limit` bytes."""
        start = self.position
        length = self.u64()
        if length > limit:
            self.refuse(f"a {kind} of {length} bytes, where at most {limit} are allowed", at=start)
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.refuse(f"a {kind} that is not UTF-8: {raw[error.start : error.start + 8]!r}", at=start)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._need(count)
        start = self.position
        self.position = start + count
        return self._data[start : self.position]

    def _need(self, count: int) -> None:
        if count <= self.left():
            return
        if self.position + count <= len(self._data):
            self.refuse(f"a header of more than {MAX_HEADER_BYTES >> 20} MiB")
        self.refuse(f"the file ends too early: {count} bytes should follow, {len(self._data) - self.position} do")

    def _numbers(self, type: ValueType, count: int) -> list[Any]:
        start = self.position
        raw = self.take(count * type.item_bytes)
        if type is ValueType.BOOL and (other := raw.translate(None, b"\x00\x01")):
            self.refuse(f"a boolean of {other[0]}, where 0 and 1 are allowed", at=start)
        return list(type.packing(count).unpack(raw))

    def _strings(self, count: int) -> list[str]:
        self._need(count * _LENGTH.size)
        data, position, end = self._data, self.position, self.position + self.left()
        length_at = _LENGTH.unpack_from
        strings = []
        for _ in range(count):
            start = position + _LENGTH.size
            if start > end:
                self.position = position
                self._need(_LENGTH.size)
            (length,) = length_at(data, position)
            position = start + length
            if position > end:
                self.position = start
                self._need(length)
            strings.append(data[start:position].decode("utf-8", "surrogateescape"))
        self.position = position
        return strings
