"""The tables of a collection, and connections to its file whose errors are in words."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from craton.errors import CratonError, FileFormatError, StoreError
from craton.retrieval import lexical

APPLICATION: Final = 0x43524154  # "CRAT", in the file's header
VERSION: Final = 1
BUSY_SECONDS: Final = 30.0

SCHEMA: Final = (
    "CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # The manifest: what was read from where, and the SHA-256 that it had then.
    """CREATE TABLE sources (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, digest TEXT NOT NULL)""",
    """CREATE TABLE documents (
        id INTEGER PRIMARY KEY, source INTEGER NOT NULL REFERENCES sources ON DELETE CASCADE,
        name TEXT NOT NULL UNIQUE, title TEXT NOT NULL, kind TEXT NOT NULL, digest TEXT NOT NULL,
        pages TEXT NOT NULL, headings TEXT NOT NULL, metadata TEXT NOT NULL, text TEXT NOT NULL)""",
    "CREATE INDEX documents_by_source ON documents (source)",
    """CREATE TABLE metadata (
        document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE, key TEXT NOT NULL, text TEXT NOT NULL,
        number REAL, PRIMARY KEY (document, key)) WITHOUT ROWID""",
    "CREATE INDEX metadata_by_key ON metadata (key, text)",
    # An id is never used again and a chunk never changes, so an open search knows what is new by the ids alone.
    # digest: of the text that was embedded. Spans count characters of documents.text, which is stored once.
    """CREATE TABLE chunks (
        id INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
        start INTEGER NOT NULL, "end" INTEGER NOT NULL, page INTEGER, heading TEXT NOT NULL,
        digest BLOB NOT NULL, vector BLOB NOT NULL)""",
    "CREATE INDEX chunks_by_document ON chunks (document)",
    "CREATE INDEX chunks_by_digest ON chunks (digest)",
    lexical.CREATE,
)

_NOT_OURS: Final = "give the path of a collection, or make one here under another name"
_DAMAGED: Final = "the documents are unharmed: delete this file and build the collection again"
_CODES: Final[dict[int, tuple[str, str | None]]] = {
    sqlite3.SQLITE_BUSY: ("another program is writing to it", "wait until it has finished, then try again"),
    sqlite3.SQLITE_LOCKED: ("another program is writing to it", "wait until it has finished, then try again"),
    sqlite3.SQLITE_FULL: ("the disk is full", "free some space on this disk"),
    sqlite3.SQLITE_READONLY: ("it may not be written to", "change its permissions, or copy it to another place"),
    sqlite3.SQLITE_CANTOPEN: ("it cannot be opened", "check its path and the permissions of its folder"),
    sqlite3.SQLITE_PERM: ("it may not be read", "change its permissions"),
    sqlite3.SQLITE_IOERR: ("the disk gave an error", "check the disk, then try again"),
}


@contextlib.contextmanager
def database_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a StoreError, or a FileFormatError if the file is damaged."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _in_words(error, doing, path) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:  # in a value, or in the words of SQLite's error itself
        raise damaged(doing, path) from error


def damaged(doing: str, path: Path) -> FileFormatError:
    """The error for a file whose content cannot be what Craton wrote."""
    return FileFormatError(f"cannot {doing}: the collection is damaged", where=str(path), remedy=_DAMAGED)


def connect(path: Path) -> sqlite3.Connection:
    """A connection to a collection that is there, checked to be one.

    Raises:
        StoreError: it is not there, or cannot be opened.
        FileFormatError: it is no collection, a newer Craton made it, or its end is missing.
    """
    if not path.is_file():
        what = "there is no collection" if not path.exists() else "a collection is a file, and this is none"
        raise StoreError(what, where=str(path), remedy="check the path, or build the collection first")
    _check_file(path)
    with database_errors("open the collection", path):
        connection = _opened(path)
        try:
            _check_version(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def make(path: Path) -> sqlite3.Connection:
    """A connection to a new file with the tables; in a transaction that is still open. Raises sqlite3.Error."""
    connection = _opened(path)
    connection.execute("PRAGMA journal_mode = WAL")  # readers go on while a sync writes
    connection.execute("BEGIN IMMEDIATE")
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    connection.execute(f"PRAGMA user_version = {VERSION}")
    return connection


def _opened(path: Path) -> sqlite3.Connection:
    target, uri = str(path), False
    writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    if path.exists() and not writable and not path.with_name(f"{path.name}-wal").exists():
        # A read-only folder has no place for SQLite's shared memory; nor does anything there change under us.
        target, uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1", True
    connection = sqlite3.connect(
        target, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=uri, cached_statements=256
    )
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten with zeros
    connection.execute("PRAGMA synchronous = NORMAL")  # with a write-ahead log: a power cut never harms the file
    connection.execute("PRAGMA cache_size = -32768")  # KiB
    return connection


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            header = file.read(100)
        size = path.stat().st_size
        log = path.with_name(f"{path.name}-wal")
        unfinished = log.exists() and log.stat().st_size > 0  # pages may still be in the log
    except OSError as error:
        raise StoreError(f"cannot read the collection: {error.strerror}", where=str(path)) from error
    if not header.startswith(b"SQLite format 3\0"):
        raise FileFormatError("this file is no collection", where=str(path), remedy=_NOT_OURS)
    page = int.from_bytes(header[16:18], "big")
    pages = int.from_bytes(header[28:32], "big")
    if not unfinished and size < (65_536 if page == 1 else page) * pages:
        raise FileFormatError("the collection is cut short", where=str(path), remedy=_DAMAGED)


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise FileFormatError("an SQLite file, but no collection", where=str(path), remedy=_NOT_OURS)
    if version > VERSION:
        raise FileFormatError(
            f"a newer Craton made this collection (format {version}; this one reads {VERSION})",
            where=str(path),
            remedy="update Craton, or build the collection again",
        )
    if version < VERSION:
        raise FileFormatError(
            f"an older Craton made this collection (format {version})", where=str(path), remedy="build it again"
        )
    connection.execute("SELECT count(*) FROM facts").fetchone()  # a damaged schema shows itself here


def _in_words(error: sqlite3.DatabaseError, doing: str, path: Path) -> CratonError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of it is detail
    if code not in _CODES:  # SQLITE_CORRUPT, SQLITE_NOTADB, and SQLITE_ERROR for a table that has gone
        return damaged(doing, path)
    what, remedy = _CODES[code]
    return StoreError(f"cannot {doing}: {what}", where=str(path), remedy=remedy)
