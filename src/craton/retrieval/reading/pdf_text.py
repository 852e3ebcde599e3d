"""PDF: the text layer page by page, by pypdf. Words broken at line ends stay broken, so that spans match the text."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from craton.checkpoints.disk import disk_errors
from craton.errors import CratonError
from craton.retrieval.documents import Heading, MetadataValue, Page
from craton.retrieval.reading.content import (
    MAX_DOCUMENT_BYTES,
    Content,
    Unfit,
    clean,
    missing_extra,
    one_line,
    too_large,
)

if TYPE_CHECKING:
    from pypdf import PdfReader

MAX_PDF_BYTES: Final = 1 << 30
"""The largest PDF file: images make them large, and they are not read."""

_BETWEEN_PAGES: Final = "\n\n"
_MAX_BOOKMARKS: Final = 5000
_TAIL_BLANKS: Final = re.compile(r"[ \t]+$", re.M)


def pdf(path: Path) -> Content:
    """The content of a PDF. Its headings are the bookmarks whose words stand on the page that they lead to.

    Raises Unfit for a file that is damaged, needs a password or has no text layer; UsageError without pypdf.
    """
    try:
        import pypdf
    except ImportError:
        raise missing_extra("PDF files", str(path)) from None
    name = str(path)
    with disk_errors(f"read {path.name}", path), path.open("rb") as file:
        if path.stat().st_size > MAX_PDF_BYTES:
            raise too_large("the PDF", name, MAX_PDF_BYTES, "split it")
        _check_beginning(file, name)
        try:
            with _quiet():
                return _content(pypdf.PdfReader(file), name)
        except CratonError:
            raise
        except pypdf.errors.DependencyError as error:
            raise Unfit(
                "encrypted", f"the PDF is encrypted: {error}", where=name, remedy="pip install cryptography"
            ) from None
        except OSError as error:
            if error.errno:
                raise  # the disk's
            raise _damaged(error, name) from None
        except Exception as error:  # pypdf's manual: "broken PDF files might cause other exceptions", and they do
            raise _damaged(error, name) from None


def _content(reader: PdfReader, name: str) -> Content:
    # The reader tries the empty password itself; what it opens is only protected against changes.
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unfit(
            "encrypted",
            "the PDF needs a password",
            where=name,
            remedy="save it without one: qpdf --password=PASSWORD --decrypt IN.pdf OUT.pdf",
        )
    parts: list[str] = []
    pages: list[Page] = []
    length = 0
    for number, page in enumerate(reader.pages, 1):
        text = _TAIL_BLANKS.sub("", clean(page.extract_text())).strip("\n")
        if parts:
            parts.append(_BETWEEN_PAGES)
            length += len(_BETWEEN_PAGES)
        pages.append(Page(number, length, length + len(text)))
        parts.append(text)
        length += len(text)
        if length > MAX_DOCUMENT_BYTES:
            raise too_large("the text of the PDF", name, MAX_DOCUMENT_BYTES, "split it")
    if not pages:
        raise Unfit("empty", "the PDF has no pages", where=name)
    whole = "".join(parts)
    if not whole.strip():
        raise Unfit(
            "no text layer",
            f"the PDF has no text layer: its {len(pages)} page{'s are' if len(pages) > 1 else ' is'} images or empty",
            where=name,
            remedy="recognise its text first: ocrmypdf IN.pdf OUT.pdf",
        )
    title, metadata = _information(reader)
    headings: tuple[Heading, ...] = ()
    with contextlib.suppress(Exception):  # a damaged outline costs the headings, not the text
        headings = tuple(_headings(reader, whole, pages))
    return Content(whole, title, tuple(pages), headings, metadata)


def _information(reader: PdfReader) -> tuple[str, dict[str, MetadataValue]]:
    """Title and author, as far as the file gives them."""
    found: dict[str, MetadataValue] = {"pages": len(reader.pages)}
    with contextlib.suppress(Exception):  # as above
        information = reader.metadata
        for key in ("title", "author", "subject"):
            value = getattr(information, key, None)
            if isinstance(value, str) and (line := one_line(clean(value))):
                found[key] = line
    return str(found.get("title", "")), found


def _headings(reader: PdfReader, text: str, pages: list[Page]) -> list[Heading]:
    """The bookmarks that can be found, where each begins; of those of one place, the highest."""
    found: dict[int, Heading] = {}
    for level, bookmark in itertools.islice(_bookmarks(reader.outline, 1), _MAX_BOOKMARKS):
        number = reader.get_destination_page_number(bookmark)
        words = clean(bookmark.title or "").split()
        if number is None or not 0 <= number < len(pages) or not words:
            continue
        page = pages[number]
        # "1.2 Setup" may stand there as "1.2  Setup" or on two lines; it begins a line.
        pattern = r"^[ \t]*" + r"\s+".join(map(re.escape, words[:40]))
        match = re.compile(pattern, re.M | re.I).search(text, page.start, page.end)
        if match and match.start() not in found:
            found[match.start()] = Heading(level, " ".join(words), match.start())
    return [found[start] for start in sorted(found)]


def _bookmarks(outline: Any, level: int) -> Iterator[tuple[int, Any]]:
    # pypdf gives a bookmark's children as a list behind it.
    for entry in outline:
        if isinstance(entry, list):
            yield from _bookmarks(entry, level + 1)
        else:
            yield level, entry


def _check_beginning(file: IO[bytes], name: str) -> None:
    # Readers accept up to a kilobyte of noise before it. Without it, pypdf would search the whole file for objects.
    if b"%PDF-" not in file.read(1024):
        raise Unfit("damaged", "the file does not begin as a PDF does", where=name, remedy="save it anew as PDF")
    file.seek(0)


def _damaged(error: Exception, name: str) -> Unfit:
    why = one_line(str(error))[:200] or type(error).__name__
    return Unfit(
        "damaged",
        f"the PDF is damaged: {why}",
        where=name,
        remedy="repair it (qpdf IN.pdf OUT.pdf) or print it to a new PDF",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep pypdf's remarks on every oddity of a file from the terminal."""
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
