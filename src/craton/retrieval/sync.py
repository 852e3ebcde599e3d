"""The sync of a collection: which files changed, their passages cut and embedded, each file in one transaction.

It is the half of `collection` that writes, and uses what that keeps to itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from craton.errors import CratonError, DataError, UsageError
from craton.retrieval import lexical
from craton.retrieval.chunking import chunk
from craton.retrieval.documents import Chunk, Document
from craton.retrieval.filters import described, metadata_row
from craton.retrieval.vectors import unit

if TYPE_CHECKING:
    from craton.retrieval.collection import Collection

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
Count = Callable[[str], int]

EMBEDDED_AT_ONCE: Final = 64
"""Texts in one call of the encoder, from as many files as it takes."""
FILES_AT_ONCE: Final = 256
"""Files that are held in memory until they fill such a call."""
HEADING_CHARACTERS: Final = 160
"""How much of a title and headings stands before a passage's text when it is embedded."""

_TIDY_SHARE: Final = 0.05  # of a collection's passages that are new: from here on, the index of words is put in order


class Source(Protocol):
    """What a sync needs to know of a file: `readers.SourceFile`, or anything else that gives documents."""

    @property
    def name(self) -> str:
        """Unique in a collection, and the same from sync to sync."""
        ...

    @property
    def kind(self) -> str:
        """The kind of its documents."""
        ...

    @property
    def digest(self) -> str:
        """Another one whenever its documents are others. Raises CratonError for what cannot be read."""
        ...

    def documents(self) -> Iterable[Document]:
        """Its documents. Raises CratonError for what cannot be read."""
        ...


@dataclass(frozen=True)
class SyncReport:
    """What a sync did, by the names of source files. skipped: each reason with the files that it kept out.

    A file that could not be read is skipped with its old version left as it was, and tried again at the next sync;
    errors has what was wrong with it, by its name. passages: those written. embedded: texts that the encoder was
    given; the vectors of the others were known.
    """

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    skipped: Mapping[str, tuple[str, ...]]
    errors: Mapping[str, CratonError] = field(default_factory=dict)
    passages: int = 0
    embedded: int = 0

    def __str__(self) -> str:
        counts = {name: len(getattr(self, name)) for name in ("added", "changed", "removed", "unchanged")}
        skipped = sum(map(len, self.skipped.values()))
        parts = [f"{count} {name}" for name, count in counts.items()] + ([f"{skipped} skipped"] if skipped else [])
        return f"{', '.join(parts)}; {self.passages} passages written, {self.embedded} texts embedded"


@dataclass(frozen=True)
class _Passage:
    """A chunk and what stands for it in the two indexes."""

    chunk: Chunk
    embedded: str
    digest: bytes

    @staticmethod
    def of(document: Document, one: Chunk) -> _Passage:
        embedded = embedded_text(document, one)
        return _Passage(one, embedded, hashlib.sha256(embedded.encode()).digest()[:16])


@dataclass(frozen=True)
class _Changed:
    """A source file whose documents have been read. kept: names of documents that are as they were."""

    source: Source
    digest: str
    documents: list[tuple[Document, list[_Passage]]]
    kept: frozenset[str]

    def passages(self) -> Iterator[_Passage]:
        return (passage for _, passages in self.documents for passage in passages)


class Sync:
    """One sync. Changed files are read until they give the encoder a full batch; then each is committed by itself."""

    def __init__(self, collection: Collection, embed: Embed, count: Count, on_progress: Callable[[str], None]) -> None:
        self._collection, self._connection = collection, collection._connection
        self._embed, self._count, self._on_progress = embed, count, on_progress
        self._added: list[str] = []
        self._changed: list[str] = []
        self._unchanged: list[str] = []
        self._skipped: dict[str, list[str]] = {}
        self._errors: dict[str, CratonError] = {}
        self._passages = self._embedded = self._done = self._total = 0
        self._pruned: dict[str, int] = {}

    def run(self, sources: Sequence[Source], prune: bool) -> SyncReport:
        known = {
            name: (row, digest) for row, name, digest in self._collection._all("SELECT id, name, digest FROM sources")
        }
        self._total = len(sources)
        given = {source.name for source in sources}
        if prune:
            self._pruned = {name: row for name, (row, _) in known.items() if name not in given}
        removed = sorted(self._pruned)
        waiting: list[_Changed] = []
        passages = 0
        seen: set[str] = set()
        for source in sources:
            self._done += 1
            if source.name in seen:
                self._skip(source.name, DataError("another source has the same name"))
                continue
            seen.add(source.name)
            try:
                digest = source.digest
                if source.name in known and known[source.name][1] == digest:
                    self._unchanged.append(source.name)
                    continue
                waiting.append(self._read(source, digest))
            except CratonError as error:
                self._skip(source.name, error)
                continue
            passages += sum(1 for _ in waiting[-1].passages())
            if passages >= EMBEDDED_AT_ONCE or len(waiting) >= FILES_AT_ONCE:
                self._write_all(waiting, known)
                waiting, passages = [], 0
        self._write_all(waiting, known)
        for name, row in self._pruned.items():
            with self._collection._transaction(f"remove {name}", write=True):
                self._collection._delete_source(row)
        if self._passages > _TIDY_SHARE * self._collection.chunk_count:
            with self._collection._transaction("note what is new", write=True):
                self._collection._set_fact("untidy", "1")
        self._collection._tidy()
        skipped = {reason: tuple(names) for reason, names in self._skipped.items()}
        return SyncReport(
            *(tuple(self._added), tuple(self._changed), tuple(removed), tuple(self._unchanged), skipped),
            errors=self._errors,
            passages=self._passages,
            embedded=self._embedded,
        )

    def _skip(self, name: str, error: CratonError) -> None:
        self._skipped.setdefault(str(getattr(error, "reason", error.what)), []).append(name)
        self._errors.setdefault(name, error)

    def _read(self, source: Source, digest: str) -> _Changed:
        """The documents of a file, those that have changed cut into passages."""
        before = dict(
            self._collection._all(
                """SELECT documents.name, documents.digest FROM documents JOIN sources ON sources.id = source
                WHERE sources.name = ?""",
                source.name,
            )
        )
        names: set[str] = set()
        kept: set[str] = set()
        documents = []
        for document in source.documents():
            if document.name in names:
                raise DataError("two of its documents have the same name")
            names.add(document.name)
            if before.get(document.name) == document.digest:
                kept.add(document.name)
                continue
            cut = chunk(document, self._collection.settings.chunking, self._count)
            documents.append((document, [_Passage.of(document, one) for one in cut]))
        return _Changed(source, digest, documents, frozenset(kept))

    def _write_all(self, waiting: Sequence[_Changed], known: Mapping[str, tuple[int, str]]) -> None:
        vectors = self._vectors(waiting)
        for changed in waiting:
            name = changed.source.name
            try:
                self._write(changed, vectors)
            except DataError as error:
                self._skip(name, error)
                continue
            (self._changed if name in known else self._added).append(name)
            self._passages += sum(1 for _ in changed.passages())

    def _vectors(self, waiting: Sequence[_Changed]) -> dict[bytes, bytes]:
        """The vector of each passage, float16: known ones from the collection, the others from the encoder."""
        texts = {passage.digest: passage.embedded for changed in waiting for passage in changed.passages()}
        vectors: dict[bytes, bytes] = {}
        for digest in texts:
            rows = self._collection._all("SELECT vector FROM chunks WHERE digest = ? LIMIT 1", digest)
            if rows:
                vectors[digest] = rows[0][0]
        new = [digest for digest in texts if digest not in vectors]
        for start in range(0, len(new), EMBEDDED_AT_ONCE):
            batch = new[start : start + EMBEDDED_AT_ONCE]
            vectors |= zip(batch, self._encoded([texts[digest] for digest in batch]), strict=True)
            self._embedded += len(batch)
            self._on_progress(f"{self._done} of {self._total} files, {self._embedded} passages embedded")
        return vectors

    def _encoded(self, texts: Sequence[str]) -> list[bytes]:
        vectors_ND = np.asarray(self._embed(texts), dtype=np.float32)
        if vectors_ND.ndim != 2 or len(vectors_ND) != len(texts):
            raise UsageError(f"the encoder gave vectors of shape {list(vectors_ND.shape)} for {len(texts)} texts")
        width = self._collection.width
        if width is None:
            with self._collection._transaction("note the vectors' width", write=True):
                self._collection._set_fact("width", str(vectors_ND.shape[1]))
        return [vector.tobytes() for vector in unit(vectors_ND, width).astype("<f2")]

    def _write(self, changed: _Changed, vectors: Mapping[bytes, bytes]) -> None:
        """Put one file's new version in place of its old one, in one transaction."""
        source, write = changed.source, self._connection.execute
        with self._collection._transaction(f"write {source.name}", write=True):
            write(
                """INSERT INTO sources (name, kind, digest) VALUES (?, ?, ?)
                ON CONFLICT (name) DO UPDATE SET kind = excluded.kind, digest = excluded.digest""",
                (source.name, source.kind, changed.digest),
            )
            (row,) = write("SELECT id FROM sources WHERE name = ?", (source.name,)).fetchone()
            for document, name in write("SELECT id, name FROM documents WHERE source = ?", (row,)).fetchall():
                if name not in changed.kept:
                    self._collection._delete_document(document)
            for one, passages in changed.documents:
                self._make_room(one.name)
                self._insert(row, one, passages, vectors)

    def _make_room(self, name: str) -> None:
        """A file may have got another name; its documents keep theirs only where the old file goes anyway."""
        other = self._connection.execute(
            "SELECT sources.name FROM documents JOIN sources ON sources.id = source WHERE documents.name = ?", (name,)
        ).fetchone()
        if other is None:
            return
        if other[0] not in self._pruned:
            raise DataError(f"its document {name!r} is there already, from {other[0]}")
        self._collection._delete_source(self._pruned[other[0]])

    def _insert(
        self, source: int, document: Document, passages: Sequence[_Passage], vectors: Mapping[bytes, bytes]
    ) -> None:
        write = self._connection.execute
        pages = json.dumps([(page.number, page.start, page.end) for page in document.pages])
        headings = json.dumps([(heading.level, heading.title, heading.start) for heading in document.headings])
        row = write(
            """INSERT INTO documents (source, name, title, kind, digest, pages, headings, metadata, text)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            (
                *(source, document.name, document.title, document.kind, document.digest, pages, headings),
                *(json.dumps(dict(document.metadata)), document.text),
            ),
        ).lastrowid
        asked = described(document.name, document.title, document.kind, document.metadata)
        self._connection.executemany(
            "INSERT INTO metadata VALUES (?, ?, ?, ?)",
            [(row, key, *metadata_row(value)) for key, value in asked.items()],
        )
        for passage in passages:
            one = passage.chunk
            place = (row, one.start, one.end, one.page, one.heading)
            chunk_row = write(
                """INSERT INTO chunks (document, start, "end", page, heading, digest, vector)
                VALUES (?, ?, ?, ?, ?, ?, ?)""",
                (*place, passage.digest, vectors[passage.digest]),
            ).lastrowid
            write(
                "INSERT INTO words (rowid, terms) VALUES (?, ?)", (chunk_row, lexical.indexed_terms(passage.embedded))
            )


def embedded_text(document: Document, one: Chunk) -> str:
    """What is embedded and indexed for a passage: a line of the document's title and headings, then its text."""
    above = [document.title, *one.heading.split(" > ")] if one.heading else [document.title]
    line = " > ".join(dict.fromkeys(part for part in above if part))[:HEADING_CHARACTERS]
    return f"{line}\n{one.text}" if line else one.text
