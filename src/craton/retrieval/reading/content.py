"""What every reader makes, and what they share: bounded reading, the text of bytes, refusals that folders can count."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from craton.checkpoints.disk import disk_errors
from craton.data.lines import MAX_RECORD_BYTES, NotUtf8, bad_utf8
from craton.errors import FileFormatError, UsageError
from craton.retrieval.documents import Heading, MetadataValue, Page

MAX_DOCUMENT_BYTES: Final = MAX_RECORD_BYTES
"""The longest document that is read as one text."""

_SPLIT: Final = "split it, or convert it to JSON lines or CSV, which may be of any size"
_UTF32_MARKS: Final = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_LINE_END: Final = re.compile(r"\r\n?")
_UNFIT: Final = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Content:
    """What is in a file. title: as the file itself says, or "". Spans count characters of `text`."""

    text: str
    title: str = ""
    pages: tuple[Page, ...] = ()
    headings: tuple[Heading, ...] = ()
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


class Unfit(FileFormatError):
    """A file without a text that can be read. reason: the word under which folders count it, "encrypted"."""

    def __init__(self, reason: str, what: str, *, where: str, remedy: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.reason = reason


def too_large(what: str, where: str, limit: int, remedy: str = _SPLIT) -> Unfit:
    """The error for what is beyond a limit in bytes."""
    return Unfit("too large", f"{what} is larger than {limit / (1 << 20):g} MiB", where=where, remedy=remedy)


def read_bytes(path: Path, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The bytes of a file, of which no more than `limit` are ever held. Raises Unfit, StoreError."""
    with disk_errors(f"read {path.name}", path), path.open("rb") as file:
        if path.stat().st_size > limit:  # without reading what may be a sparse terabyte
            raise too_large("the document", str(path), limit)
        data = file.read(limit + 1)
    if len(data) > limit:  # it grew, or is no plain file
        raise too_large("the document", str(path), limit)
    return data


def decode(data: bytes, name: str) -> str:
    """The text of UTF-8, or of UTF-16 that begins with its mark; line ends become LF. Raises Unfit, NotUtf8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not data.startswith(_UTF32_MARKS):
        return clean(decode_as(data, "utf-16", name))
    if is_binary(data):
        raise Unfit(
            "binary",
            "the file is binary, not text",
            where=name,
            remedy="convert it to text, Markdown, HTML, PDF or DOCX",
        )
    try:
        return clean(data.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise bad_utf8(name, 1 + data.count(b"\n", 0, error.start), error.start, data) from None


def decode_as(data: bytes, encoding: str, name: str) -> str:
    """The text of bytes in an encoding that the file itself names. Raises NotUtf8."""
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        place = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else "its encoding"
        raise NotUtf8(
            f"the file says that it is {encoding}, but {place} is not",
            where=name,
            remedy=f"convert the file: iconv -f ITS-ENCODING -t UTF-8 {name} > NEW-FILE",
        ) from None


def is_binary(beginning: bytes) -> bool:
    """Whether the beginning of a file cannot be text: it has zero bytes, and no mark of UTF-16."""
    sniffed = beginning[:8192]
    return b"\0" in sniffed and (
        sniffed.startswith(_UTF32_MARKS) or not sniffed.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    )


def clean(text: str) -> str:
    """The text with LF for every line end, and U+FFFD for what no file and no database takes: NUL, half surrogates."""
    return _UNFIT.sub("\ufffd", _LINE_END.sub("\n", text))


def one_line(text: str) -> str:
    """A title on one line."""
    return " ".join(text.split())


def missing_extra(what: str, where: str) -> UsageError:
    """The error for a library that only some documents need."""
    return UsageError(f"reading {what} needs a library", where=where, remedy="pip install 'craton[retrieve]'")
