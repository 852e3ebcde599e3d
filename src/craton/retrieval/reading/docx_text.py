"""DOCX: paragraphs, headings from styles, tables row by row, by python-docx.

A DOCX is a ZIP archive of XML from anywhere, so nothing reaches the XML parser before it is unpacked under limits: the
sizes in the archive's directory may lie. The parser is given no document types, hence no entities.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from craton.checkpoints.disk import disk_errors
from craton.errors import CratonError
from craton.retrieval.documents import Heading, MetadataValue
from craton.retrieval.reading.content import Content, Unfit, clean, missing_extra, one_line, too_large

MAX_PACKED_BYTES: Final = 1 << 30
MAX_UNPACKED_BYTES: Final = 256 << 20
MAX_ENTRIES: Final = 10_000
MAX_RATIO: Final = 200
"""How much smaller packing may have made a part beyond `RATIO_FREE_BYTES`. Word's XML shrinks to a tenth or so."""
RATIO_FREE_BYTES: Final = 4 << 20

_UNPACKED_AT_A_TIME: Final = 1 << 16
_MAX_TEXT: Final = 64 << 20
# What holds no text: left out, so that a report with a gigabyte of photographs reads as fast as one without.
_MEDIA: Final = ("word/media/", "word/fonts/", "word/embeddings/", "docprops/thumbnail")
_DOCTYPES: Final = tuple("<!DOCTYPE".encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be"))
_W: Final = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_FALLBACK: Final = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_WRITTEN: Final = {f"{_W}tab": "\t", f"{_W}br": "\n", f"{_W}cr": "\n", f"{_W}noBreakHyphen": "-"}
_GONE: Final = (f"{_W}moveFrom", f"{_W}del", f"{_W}pPr", _FALLBACK)


def docx(path: Path) -> Content:
    """The content of a DOCX file. Raises Unfit for what is none or unpacks to too much, UsageError without library."""
    try:
        import docx as library
    except ImportError:
        raise missing_extra("DOCX files", str(path)) from None
    name = str(path)
    with disk_errors(f"read {path.name}", path), path.open("rb") as file:
        if path.stat().st_size > MAX_PACKED_BYTES:
            raise too_large("the DOCX", name, MAX_PACKED_BYTES, "split it")
        if file.read(8) == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":  # OLE: Word's old format, and its encrypted files
            raise Unfit(
                "encrypted",
                "the file is encrypted, or in Word's old format",
                where=name,
                remedy="save it as .docx without a password",
            )
        file.seek(0)
        try:
            document = library.Document(io.BytesIO(_repacked(file, name)))
            return _content(document, name)
        except CratonError:
            raise
        except OSError as error:
            if error.errno:
                raise
            raise _damaged(error, name) from None
        except Exception as error:  # zipfile, lxml and python-docx answer damaged files with errors of any kind
            raise _damaged(error, name) from None


def _repacked(file: Any, name: str) -> bytes:
    """The archive's parts that may hold text, unpacked under the limits, as an archive that hides nothing."""
    new = io.BytesIO()
    left = MAX_UNPACKED_BYTES
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as plain:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES:
            raise _bomb(f"it holds {len(entries)} parts", name)
        parts = {entry.filename: entry for entry in entries}  # of parts of one name, the last counts
        read = [entry for part, entry in parts.items() if not part.lower().startswith(_MEDIA)]
        if sum(entry.file_size for entry in read) > MAX_UNPACKED_BYTES:
            raise _bomb(f"it unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB", name)
        for entry in read:
            if entry.file_size > max(RATIO_FREE_BYTES, MAX_RATIO * entry.compress_size):
                raise _bomb(f"{entry.filename} unpacks to more than {MAX_RATIO} times its size", name)
        for entry in read:
            data = _unpacked(archive, entry, left, name)
            left -= len(data)
            plain.writestr(entry.filename, data)
        for part in parts.keys() - {entry.filename for entry in read}:
            plain.writestr(part, b"")  # the others refer to it
    return new.getvalue()


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, left: int, name: str) -> bytes:
    limit = min(left, max(RATIO_FREE_BYTES, MAX_RATIO * entry.compress_size))
    data = bytearray()
    with archive.open(entry) as member:
        # By pieces: a read without a size unpacks all that follows, whatever the directory says.
        while piece := member.read(_UNPACKED_AT_A_TIME):
            data += piece
            if len(data) > limit:
                raise _bomb(f"{entry.filename} unpacks to more than it says", name)
    if any(declaration in data for declaration in _DOCTYPES):
        raise Unfit(
            "damaged",
            f"{entry.filename} declares a document type, which no word processor writes",
            where=name,
            remedy="open it in a word processor and save it anew",
        )
    return bytes(data)


class _Writer:
    """Lines of the text, and the headings among them."""

    def __init__(self, name: str) -> None:
        self.parts: list[str] = []
        self.headings: list[Heading] = []
        self.length = 0
        self._name = name
        self._in_list = False

    def write(self, text: str, separator: str) -> int:
        """Append a block; returns where it begins."""
        if self.parts:
            text, start = separator + text, self.length + len(separator)
        else:
            start = 0
        self.parts.append(text)
        self.length += len(text)
        if self.length > _MAX_TEXT:
            raise too_large("the text of the DOCX", self._name, _MAX_TEXT, "split it")
        return start

    def paragraph(self, text: str, level: int | None, in_list: bool) -> None:
        if level is not None:
            self.headings.append(Heading(level, one_line(text), self.write(text, "\n\n")))
        else:
            self.write(f"- {text}" if in_list else text, "\n" if in_list and self._in_list else "\n\n")
        self._in_list = in_list

    def table(self, rows: Iterator[str]) -> None:
        separator = "\n\n"
        for row in rows:
            self.write(row, separator)
            separator = "\n"
        self._in_list = False


def _content(document: Any, name: str) -> Content:
    writer = _Writer(name)
    levels = _heading_levels(document)
    title = ""
    for block in _blocks(document.element.body):
        if block.tag == f"{_W}tbl":
            writer.table(_rows(block))
            continue
        text = clean(_text(block)).strip()
        if not text:
            continue
        style = block.find(f"{_W}pPr/{_W}pStyle")
        level = levels.get(style.get(f"{_W}val", "")) if style is not None else None
        writer.paragraph(text, level or None, block.find(f"{_W}pPr/{_W}numPr") is not None or level == 0)
        title = title or (one_line(text) if level else "")
    if not writer.parts:
        raise Unfit("empty", "the document has no text", where=name)
    properties = document.core_properties
    metadata: dict[str, MetadataValue] = {}
    for key in ("title", "author", "subject"):
        if value := one_line(clean(getattr(properties, key, None) or "")):
            metadata[key] = value
    title = str(metadata.get("title", "")) or title
    return Content("".join(writer.parts), title, headings=tuple(writer.headings), metadata=metadata)


def _heading_levels(document: Any) -> dict[str, int]:
    """By the id of a style, the level of the headings that it makes; 0 for styles of lists.

    A style of the user's own counts as the style that it is based on. Word names its own in English in every language.
    """
    parents: dict[str, str] = {}
    levels: dict[str, int] = {}
    for style in document.styles.element.findall(f"{_W}style"):
        identifier, named = style.get(f"{_W}styleId", ""), style.find(f"{_W}name")
        words = (named.get(f"{_W}val", "") if named is not None else "").lower().split()
        if len(words) == 2 and words[0] == "heading" and words[1] in "123456789":
            levels[identifier] = int(words[1])
        elif words == ["title"]:
            levels[identifier] = 1
        elif words[:2] in (["list", "bullet"], ["list", "number"]):
            levels[identifier] = 0
        base = style.find(f"{_W}basedOn")
        if base is not None:
            parents[identifier] = base.get(f"{_W}val", "")
    for identifier in parents:
        ancestor, steps = identifier, 0
        while ancestor not in levels and ancestor in parents and steps < 20:  # bases may go in a circle
            ancestor, steps = parents[ancestor], steps + 1
        if ancestor in levels:
            levels[identifier] = levels[ancestor]
    return levels


def _blocks(parent: Any) -> Iterator[Any]:
    """Paragraphs and tables in order, those in content controls and insertions too, which python-docx passes over."""
    for child in parent:
        if child.tag in (f"{_W}p", f"{_W}tbl"):
            yield child
        elif child.tag in (f"{_W}sdt", f"{_W}sdtContent", f"{_W}ins", f"{_W}customXml", f"{_W}smartTag"):
            yield from _blocks(child)


def _rows(table: Any) -> Iterator[str]:
    """Each row as "a | b". A cell that goes on from the row above is empty."""
    for row in table.iter(f"{_W}tr"):
        if next(row.iterancestors(f"{_W}tbl")) is not table:
            continue  # of a table within a cell, which is part of that cell's text
        cells = [cell for cell in row.iter(f"{_W}tc") if next(cell.iterancestors(f"{_W}tr")) is row]
        texts = [one_line(clean(" ".join(map(_text, _paragraphs(cell))))) for cell in cells]
        if any(texts):
            yield " | ".join(texts)


def _paragraphs(cell: Any) -> Iterator[Any]:
    """All in the cell but those in text boxes, which belong to the paragraphs around them."""
    return (inner for inner in cell.iter(f"{_W}p") if next(inner.iterancestors(f"{_W}p"), None) is None)


def _text(paragraph: Any) -> str:
    """The text of a paragraph as it prints: with insertions and links, without deletions and hidden words."""
    parts: list[str] = []

    def collect(element: Any) -> None:
        for child in element:
            if child.tag in _GONE:
                continue
            if child.tag == f"{_W}t":
                parts.append(child.text or "")
            elif child.tag in _WRITTEN:
                parts.append(_WRITTEN[child.tag])
            elif child.tag == f"{_W}p":  # of a text box
                parts.append("\n")
                collect(child)
            elif child.tag != f"{_W}r" or child.find(f"{_W}rPr/{_W}vanish") is None:
                collect(child)

    collect(paragraph)
    return "".join(parts)


def _bomb(why: str, name: str) -> Unfit:
    return Unfit("too large", f"the DOCX is refused: {why}", where=name, remedy="save it anew, or export its text")


def _damaged(error: Exception, name: str) -> Unfit:
    why = one_line(str(error))[:200] or type(error).__name__
    remedy = "open it in a word processor and save it anew"
    return Unfit("damaged", f"not a DOCX, or damaged: {why}", where=name, remedy=remedy)
