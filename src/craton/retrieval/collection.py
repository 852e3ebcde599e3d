"""A collection: documents in one SQLite file, found by words and by meaning, in step with the files they came from.

The file holds the documents' text, their passages as spans of it, an FTS5 index of their words, their vectors as
float16, and a manifest of the source files with what they contained. `sync` compares that manifest with the files as
they are now. Each source file changes in one transaction, so a search, or a process after a crash, finds the old
version of a file or the new one, never a part of either. What is removed is overwritten in the file, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from craton.checkpoints.disk import disk_errors, sync_folder
from craton.config import Settings
from craton.config.resolve import leaves
from craton.errors import FileFormatError, StoreError, UnknownName
from craton.retrieval import lexical, schema_sql
from craton.retrieval.chunking import ChunkSettings
from craton.retrieval.documents import Chunk, Document, Heading, MetadataValue, Page
from craton.retrieval.filters import Filter
from craton.retrieval.fusion import Fusion, Run
from craton.retrieval.schema_sql import database_errors
from craton.retrieval.search import POOL, Hit, Rerank, Searcher, StoreMaker, default_fusion
from craton.retrieval.sync import Count, Embed, Source, Sync, SyncReport
from craton.store.locks import held

_NEAR_NAMES: Final = 10_000  # among more names than these, a nearest one is not looked for


class CollectionSettings(Settings):
    """What decides how passages are cut and embedded. Another value of any of these needs the collection made anew."""

    encoder: str = Field(description="the model that embeds passages and questions")
    encoder_digest: str = Field("", description="what tells its weights from another model's of the same name")
    chunking: ChunkSettings = Field(default_factory=ChunkSettings, description="how documents are cut into passages")


@dataclass(frozen=True)
class DocumentFacts:
    """A document of the listing. source: the file that it came from. characters: of its text."""

    name: str
    title: str
    kind: str
    source: str
    characters: int
    chunks: int
    metadata: Mapping[str, MetadataValue]


@dataclass(frozen=True)
class SourceFacts:
    """A source file of the manifest. digest: of its content when it was read."""

    name: str
    kind: str
    digest: str
    documents: int


class Collection:
    """An open collection. Close it, or use it in a `with`; searches from several threads wait for each other."""

    def __init__(self, path: Path, connection: sqlite3.Connection, make_store: StoreMaker | None = None) -> None:
        self.path = path
        self._connection = connection
        self._searcher = Searcher(connection, make_store)
        self._mutex = threading.RLock()
        self.settings: CollectionSettings = self._stored_settings()

    @classmethod
    def create(cls, path: str | Path, settings: CollectionSettings) -> Collection:
        """Make an empty collection and open it.

        Raises:
            StoreError: something is there already, or the file cannot be written.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        with disk_errors(f"create the folder {path.parent.name}", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        with held(_lock_of(path), lambda: None):
            if path.exists():
                raise StoreError(
                    "there is something of this name already", where=str(path), remedy="open it, or choose another name"
                )
            try:
                with database_errors("create the collection", path), contextlib.closing(schema_sql.make(part)) as new:
                    new.execute("INSERT INTO facts VALUES ('settings', ?)", (settings.model_dump_json(),))
                    new.execute("COMMIT")
                with disk_errors("create the collection", path):
                    os.replace(part, path)
                    sync_folder(path.parent)
            finally:
                for suffix in ("", "-wal", "-shm"):
                    part.with_name(part.name + suffix).unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, make_store: StoreMaker | None = None) -> Collection:
        """Open a collection. make_store: another place to search the vectors in, made for their width (`qdrant.py`).

        Raises:
            StoreError: there is none, or it cannot be opened.
            FileFormatError: the file is no collection, is damaged, or a newer Craton made it.
        """
        path = Path(path)
        connection = schema_sql.connect(path)
        try:
            return cls(path, connection, make_store)
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and give up what is in memory."""
        with self._mutex:
            self._searcher.close()
            self._connection.close()

    # What is there.

    @property
    def document_count(self) -> int:
        """How many documents there are."""
        return self._number("SELECT count(*) FROM documents")

    @property
    def chunk_count(self) -> int:
        """How many passages there are."""
        return self._number("SELECT count(*) FROM chunks")

    @property
    def width(self) -> int | None:
        """The dimensions of the vectors; None before the first."""
        value = self._fact("width")
        return int(value) if value else None

    @property
    def fusion(self) -> Fusion | None:
        """The fusion that was tuned for this collection; None before that."""
        value = self._fact("fusion")
        return self._checked(Fusion, value) if value else None

    def set_fusion(self, fusion: Fusion | None) -> None:
        """Keep a fusion for every search from now on; None forgets it."""
        with self._transaction("keep the fusion", write=True):
            self._set_fact("fusion", fusion.model_dump_json() if fusion else None)

    def filter_keys(self) -> frozenset[str]:
        """The keys that filters may name."""
        with self._transaction("list the filters' keys"):
            return self._searcher.keys()

    def documents(self) -> list[DocumentFacts]:
        """All documents, by name, without their text."""
        rows = self._all(
            """SELECT documents.name, title, documents.kind, sources.name, length(text),
                (SELECT count(*) FROM chunks WHERE document = documents.id), metadata
            FROM documents JOIN sources ON sources.id = source ORDER BY documents.name"""
        )
        with database_errors("read the documents", self.path):
            return [
                DocumentFacts(name, title, kind, source, characters, chunks, json.loads(metadata))
                for name, title, kind, source, characters, chunks, metadata in rows
            ]

    def sources(self) -> list[SourceFacts]:
        """The manifest: every source file, by name."""
        rows = self._all(
            """SELECT name, kind, digest, (SELECT count(*) FROM documents WHERE source = sources.id)
            FROM sources ORDER BY name"""
        )
        return [SourceFacts(*row) for row in rows]

    def document(self, name: str) -> Document:
        """A document as it was read. Raises UnknownName."""
        rows = self._all("SELECT title, text, kind, pages, headings, metadata FROM documents WHERE name = ?", name)
        if not rows:
            near = self._all("SELECT name FROM documents LIMIT ?", _NEAR_NAMES)
            raise UnknownName("document", name, (known for (known,) in near) if len(near) < _NEAR_NAMES else ())
        title, text, kind, pages, headings, metadata = rows[0]
        with database_errors(f"read {name}", self.path):
            return Document(
                *(name, title, text, kind),
                pages=tuple(Page(*page) for page in json.loads(pages)),
                headings=tuple(Heading(*heading) for heading in json.loads(headings)),
                metadata=json.loads(metadata),
            )

    def chunks(self, name: str) -> list[Chunk]:
        """The passages of a document, in its order. Raises UnknownName."""
        text = self.document(name).text
        rows = self._all(
            """SELECT start, "end", heading, page FROM chunks
            WHERE document = (SELECT id FROM documents WHERE name = ?) ORDER BY start, id""",
            name,
        )
        return [Chunk(start, end, text[start:end], heading, page) for start, end, heading, page in rows]

    @property
    def origins(self) -> tuple[str, ...]:
        """What was asked to be in it: files, folders and patterns, as they were named."""
        return tuple(json.loads(self._fact("origins") or "[]"))

    def add_origins(self, names: Iterable[str]) -> None:
        """Remember what was asked to be in it, for the next update."""
        with self._writer(lambda doing: None), self._transaction("remember the sources", write=True):
            self._set_fact("origins", json.dumps(list(dict.fromkeys([*self.origins, *names]))))

    # Searching.

    def search(
        self,
        query: str,
        vector: NDArray[np.float32] | None,
        *,
        k: int = 10,
        where: Filter | None = None,
        fusion: Fusion | None = None,
        mmr: float | None = None,
        rerank: Rerank | None = None,
    ) -> list[Hit]:
        """The k passages that fit a question best, best first; equals by document and place.

        vector: of the question, [D], by the collection's encoder; without one, words alone are searched. where: what
        must hold of the documents, applied before scoring. fusion: else the tuned one, else vectors alone. rerank:
        scores the texts of the best 50 anew. mmr: the weight of relevance against variety (0 to 1) in choosing the k.

        Raises:
            UnknownName: the filter names a key that no document has.
            UsageError: a vector of another width, or a number out of its range.
        """
        with self._transaction("search the collection"):
            chosen = fusion or default_fusion(self.fusion, vector)
            return self._searcher.search(query, vector, k=k, where=where, fusion=chosen, mmr=mmr, rerank=rerank)

    def run(self, query: str, vector: NDArray[np.float32], *, depth: int = POOL, where: Filter | None = None) -> Run:
        """What both searches find for a question of a development split, for `tune_fusion`; documents by name."""
        with self._transaction("search the collection"):
            return self._searcher.run(query, vector, depth=depth, where=where)

    # Changing.

    def sync(
        self,
        sources: Iterable[Source],
        embed: Embed,
        count: Count,
        *,
        prune: bool = True,
        on_progress: Callable[[str], None] = lambda doing: None,
    ) -> SyncReport:
        """Make the collection hold what the source files hold now.

        Only files whose digest has changed are read, and of their passages only those with new text are embedded.
        A second sync at the same time waits for the first. prune: what came from files that are not among `sources`
        is removed. embed: [B, D], float32. count: the tokens of a text, for cutting. on_progress: is told in words.

        Raises:
            UsageError: the encoder's vectors have another width than the collection's.
            StoreError: the file cannot be written (a full disk, no permission); what was committed stays.
        """
        with self._writer(on_progress):
            return Sync(self, embed, count, on_progress).run(list(sources), prune)

    def remove(self, names: Iterable[str]) -> None:
        """Remove all that came from these source files. Raises UnknownName, before anything is removed."""
        names = list(dict.fromkeys(names))
        with self._writer(lambda doing: None):
            with self._transaction("remove documents", write=True):
                known = dict(self._connection.execute("SELECT name, id FROM sources"))
                for name in names:
                    if name not in known:
                        raise UnknownName("source file", name, known if len(known) < _NEAR_NAMES else ())
                for name in names:
                    self._delete_source(known[name])
            self._tidy()

    def differences(self, settings: CollectionSettings) -> list[str]:
        """What `settings` would change, in words; if there is anything, `reset` must come before the next sync."""
        now = dict(leaves(self.settings))
        return [f"{key}: {now[key]!r} -> {value!r}" for key, value in leaves(settings) if value != now[key]]

    def reset(self, settings: CollectionSettings) -> None:
        """Empty the collection, its tuned fusion included, and give it other settings; the next sync fills it anew."""
        with self._writer(lambda doing: None):
            with self._transaction("reset the collection", write=True):
                self._connection.execute("DELETE FROM sources")
                self._connection.execute("DROP TABLE words")  # faster than a mark for every word that is gone
                self._connection.execute(lexical.CREATE)
                for key, value in (("settings", settings.model_dump_json()), ("width", None), ("fusion", None)):
                    self._set_fact(key, value)
            self.settings = settings
            self._tidy()

    # Transactions and rows, for this module alone.

    @contextlib.contextmanager
    def _writer(self, on_progress: Callable[[str], None]) -> Iterator[None]:
        """Be the only one that changes the collection, for longer than a transaction."""
        with held(_lock_of(self.path), lambda: on_progress("waiting: another program changes this collection")):
            stored = self._stored_settings()
            if stored != self.settings:
                raise StoreError(
                    "the collection was given other settings by another program", remedy="open it again, then sync"
                )
            yield

    @contextlib.contextmanager
    def _transaction(self, doing: str, *, write: bool = False) -> Iterator[None]:
        with self._mutex, database_errors(doing, self.path):
            if self._connection.in_transaction:  # one in another is a part of it
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()  # which is nothing, where SQLite has already done it
                raise
            finally:
                self._searcher.writes += write

    def _all(self, sql: str, *parameters: object) -> list[Any]:
        with self._mutex, database_errors("read the collection", self.path):
            return self._connection.execute(sql, parameters).fetchall()

    def _number(self, sql: str) -> int:
        return int(self._all(sql)[0][0])

    def _fact(self, key: str) -> str | None:
        rows = self._all("SELECT value FROM facts WHERE key = ?", key)
        return rows[0][0] if rows else None

    def _set_fact(self, key: str, value: str | None) -> None:
        if value is None:
            self._connection.execute("DELETE FROM facts WHERE key = ?", (key,))
        else:
            self._connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def _stored_settings(self) -> CollectionSettings:
        return self._checked(CollectionSettings, self._fact("settings") or "")

    def _checked(self, cls: type[Any], text: str) -> Any:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise FileFormatError(
                f"the collection's {cls.__name__} cannot be read: {error.errors()[0]['msg']}",
                where=str(self.path),
                remedy="delete this file and build the collection again",
            ) from None

    def _delete_source(self, source: int) -> None:
        rows = self._connection.execute("SELECT id FROM documents WHERE source = ?", (source,)).fetchall()
        for (document,) in rows:
            self._delete_document(document)
        self._connection.execute("DELETE FROM sources WHERE id = ?", (source,))

    def _delete_document(self, document: int) -> None:
        self._connection.execute(
            "DELETE FROM words WHERE rowid IN (SELECT id FROM chunks WHERE document = ?)", (document,)
        )
        self._connection.execute("DELETE FROM documents WHERE id = ?", (document,))  # and its chunks and metadata
        self._set_fact("untidy", "1")

    def _tidy(self) -> None:
        """Take what is deleted out of the file: FTS5 keeps its words until segments merge, the log until it is cut."""
        if self._fact("untidy"):
            with self._transaction("remove deleted words", write=True):
                self._connection.execute("INSERT INTO words (words) VALUES ('optimize')")
                self._set_fact("untidy", None)
        with self._mutex, database_errors("empty the write-ahead log", self.path):
            # A search that is running keeps it from being emptied; then the next one does it, or the last to close.
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
