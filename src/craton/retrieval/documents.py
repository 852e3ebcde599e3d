"""What a document is once it is read: one text, and where in it pages and headings begin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

MetadataValue = str | int | float | bool


@dataclass(frozen=True)
class Page:
    """A page of a paginated document: its number as a reader counts, and its characters [start, end) of the text."""

    number: int
    start: int
    end: int


@dataclass(frozen=True)
class Heading:
    """A heading: its level (1 is the highest), its words, and where its line begins in the text."""

    level: int
    title: str
    start: int


@dataclass(frozen=True)
class Document:
    """One document. Every span that is ever quoted counts characters of `text`.

    name: unique in a collection: "guide/setup.pdf", "faq.csv:17" (line 17), "package:shutil#shutil.rmtree".
    kind: "text", "markdown", "html", "pdf", "docx", "record", "source" or "docstring".
    metadata: what filters may ask for; readers put at least {"kind", "folder", "extension"} where they apply.
    """

    name: str
    title: str
    text: str
    kind: str
    pages: tuple[Page, ...] = ()
    headings: tuple[Heading, ...] = ()
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of everything that a search can find or show."""
        pages = [(page.number, page.start, page.end) for page in self.pages]
        headings = [(heading.level, heading.title, heading.start) for heading in self.headings]
        facts = [self.name, self.title, self.kind, pages, headings, sorted(self.metadata.items())]
        return hashlib.sha256(json.dumps([*facts, self.text]).encode()).hexdigest()

    def page_of(self, start: int) -> int | None:
        """The number of the page that the character at `start` stands on; None for a text without pages."""
        return next((page.number for page in reversed(self.pages) if page.start <= start), None)


@dataclass(frozen=True)
class Chunk:
    """A passage: `text` is exactly document.text[start:end]. heading: the titles above it, "Setup > Linux"."""

    start: int
    end: int
    text: str
    heading: str = ""
    page: int | None = None


@dataclass(frozen=True)
class OneDocument:
    """A document that comes from no file, as a source."""

    document: Document

    @property
    def name(self) -> str:
        """The document's name."""
        return self.document.name

    @property
    def kind(self) -> str:
        """The document's kind."""
        return self.document.kind

    @property
    def digest(self) -> str:
        """The document's digest."""
        return self.document.digest

    def documents(self) -> Iterator[Document]:
        """The document."""
        yield self.document
