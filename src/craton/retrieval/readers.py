"""Reading documents: files, folders, patterns and packages, in any common format, as one stream of `Document`.

A file that the user names must be readable, or the error says why. In folders and patterns, what cannot be read is left
out and told: `Reading.skipped` holds the names by reason.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Final

from craton.checkpoints.disk import disk_errors, sha256_of
from craton.data.lines import NotUtf8
from craton.data.records import read_records
from craton.errors import CratonError, FileFormatError, StoreError, UsageError, did_you_mean
from craton.retrieval.documents import Document, MetadataValue
from craton.retrieval.reading.content import (
    MAX_DOCUMENT_BYTES,
    Content,
    Unfit,
    decode,
    is_binary,
    read_bytes,
    too_large,
)
from craton.retrieval.reading.docstrings import PACKAGE_PREFIX, Module, find_modules
from craton.retrieval.reading.docx_text import docx
from craton.retrieval.reading.html_text import html
from craton.retrieval.reading.markdown import markdown
from craton.retrieval.reading.pdf_text import pdf
from craton.retrieval.reading.record_text import record
from craton.retrieval.reading.source_code import python_source

__all__ = ["MAX_DOCUMENT_BYTES", "PACKAGE_PREFIX", "Reading", "SourceFile", "find_sources"]

_EXTENSIONS: Final = {
    "markdown": "md markdown mdown mkd",
    "html": "html htm xhtml",
    "pdf": "pdf",
    "docx": "docx",
    "record": "jsonl ndjson json csv tsv parquet",
    "source": "py pyi js mjs cjs jsx ts tsx c h cc cpp cxx hpp hh java go rs rb php cs swift kt kts scala lua pl r jl "
    "sh bash zsh fish ps1 bat sql toml yaml yml ini cfg css scss vue dart ex exs erl hs clj lisp el vim proto cmake mk",
}
_KINDS: Final = {f".{extension}": kind for kind, extensions in _EXTENSIONS.items() for extension in extensions.split()}
_PACKED: Final = (".gz", ".xz")  # records may be
_SNIFFED: Final = 8192


@dataclass
class Reading:
    """What was found so far. skipped: by reason ("hidden", "binary", "encrypted", ...), the names of the files."""

    files: int = 0
    documents: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        """Note a file that is left out."""
        self.skipped.setdefault(reason, []).append(name)


@dataclass
class SourceFile:
    """A file (or module) that documents come from. kind: that of its documents. path: None for modules in C.

    named: the user asked for this very file, so what is wrong with it is an error; else it is skipped and counted.
    """

    name: str
    path: Path | None
    kind: str
    named: bool = True
    reading: Reading = field(default_factory=Reading, repr=False)
    module: Module | None = field(default=None, repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the file's bytes. Raises StoreError for a file that cannot be read."""
        if self.module is not None:
            return self.module.digest
        assert self.path is not None
        return sha256_of(self.path)

    def documents(self) -> Iterator[Document]:
        """The documents of the file, read anew at each call.

        Raises FileFormatError for a named file that is damaged, no text, empty, encrypted or too large; StoreError
        where the disk refuses; UsageError where a library is missing (whether the file was named or not).
        """
        count = 0
        try:
            for document in self._read():
                count += 1
                self.reading.documents += 1
                yield document
            if not count and self.module is None:
                raise Unfit("empty", "there is no text in the file", where=str(self.path))
        except (FileFormatError, StoreError) as error:
            if self.named:
                raise
            reason = _reason(error)
            if count:  # of many records, some were read before one was damaged: those count
                self.reading.skip(f"{reason} after {count} record{'s' if count > 1 else ''}", self.name)
            else:
                self.reading.files -= 1
                self.reading.skip(reason, self.name)

    def _read(self) -> Iterator[Document]:
        if self.module is not None:
            yield from self.module.documents()
            return
        assert self.path is not None
        if self.kind == "record":
            path = self.path.absolute()
            for found in read_records(path):
                content = record(found.value)
                place = found.origin.removeprefix(str(path))
                if content.text.strip():
                    yield self._document(content, f"{self.name}{place}")
            return
        content = self._content(self.path)
        if content.text.strip():
            yield self._document(content, self.name)

    def _content(self, path: Path) -> Content:
        if self.kind == "pdf":
            return pdf(path)
        if self.kind == "docx":
            return docx(path)
        data = read_bytes(path)
        if self.kind == "html":
            return html(data, str(path))
        text = decode(data, str(path))
        if self.kind == "markdown":
            return markdown(text)
        return python_source(text) if path.suffix.lower() in (".py", ".pyi") else Content(text)

    def _document(self, content: Content, name: str) -> Document:
        path = PurePosixPath(self.name)
        folder = str(path.parent)
        facts: Mapping[str, MetadataValue] = {
            "kind": self.kind,
            "folder": "" if folder == "." else folder,
            "extension": path.suffix.lower().removeprefix("."),
            **content.metadata,  # a table's own columns come before ours
        }
        title = content.title or name.rpartition("/")[2]
        return Document(name, title, content.text, self.kind, content.pages, content.headings, facts)


def find_sources(sources: Sequence[str | Path], *, reading: Reading | None = None) -> Iterator[SourceFile]:
    """The files of all sources, in order, each once; they are read when their documents are asked for.

    A source is a file, a folder (walked in order of the paths), a pattern such as "docs/**/*.md", or "package:NAME" for
    the docstrings of an installed Python package. A file's name is its path from the last part of its source on:
    "guide/setup.pdf" in the folder /home/me/guide; where two would share one, the later gets more of its path.
    reading: is told what is found and what is left out.

    Raises UsageError for a source that is not there or is no pattern, StoreError for a folder that cannot be read.
    """
    reading = reading if reading is not None else Reading()
    names = _Names()
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        if str(source).startswith(PACKAGE_PREFIX):
            for module in find_modules(str(source).removeprefix(PACKAGE_PREFIX)):
                if names.is_new(module.source_name):
                    reading.files += 1
                    yield SourceFile(module.source_name, module.path, "docstring", False, reading, module)
        else:
            yield from _files(str(source), names, reading)


def _files(source: str, names: _Names, reading: Reading) -> Iterator[SourceFile]:
    path = Path(source).expanduser()
    with disk_errors("find the documents", path):
        if path.is_file():
            found, root, named = [path], path.parent, True
        elif path.is_dir():
            root = (path if path.name not in ("", "..") else path.resolve()).parent
            found, named = _walk(path, root, reading), False
            if not path.name:  # "." is the folder where the user is: its name adds nothing
                root = path
        elif path.exists():
            raise UsageError(f"{source!r} is neither a file nor a folder")
        elif glob.has_magic(source):
            (found, root), named = _matching(path, reading), False
        else:
            raise _missing(path)
    for file in found:
        name = names.of(file, root)
        if name is None:
            if not named:
                reading.skip("given twice", _plain(str(file)))
            continue
        kind = _kind(file)
        unfit = None if named else _unfit(file, kind)
        if unfit is None:
            reading.files += 1
            yield SourceFile(name, file, kind, named, reading)
        else:
            reading.skip(unfit, name)


class _Names:
    """Gives each file the shortest name that no other has."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._paths: set[Path] = set()

    def is_new(self, name: str) -> bool:
        """Whether the name was free; it is taken now."""
        free = name not in self._taken
        self._taken.add(name)
        return free

    def of(self, file: Path, root: Path) -> str | None:
        """The name of a file under a root; None for a file that already has one."""
        resolved = file.resolve()
        if resolved in self._paths:
            return None
        self._paths.add(resolved)
        above = list(root.absolute().parts)
        short = file.relative_to(root)
        while not self.is_new(name := _plain(short.as_posix())) and above:
            short = Path(above.pop(), short)
        return name


def _walk(folder: Path, root: Path, reading: Reading) -> list[Path]:
    """The files of a folder in order of their paths. Links to folders are not followed, nor are their loops."""

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        reading.skip("unreadable", _plain(str(error.filename)))

    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(Path(parent, name), root, reading)]
        for name in files:
            path = Path(parent, name)
            if not _is_hidden(path, root, reading) and path.is_file():  # no sockets, no broken links
                found.append(path)
    return sorted(found)


def _is_hidden(path: Path, root: Path, reading: Reading) -> bool:
    if hidden := path.name.startswith("."):
        reading.skip("hidden", _plain(os.path.relpath(path, root)))
    return hidden


def _matching(pattern: Path, reading: Reading) -> tuple[list[Path], Path]:
    # Path.glob rather than the glob module, which follows links and so never ends in a loop of them.
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    root, found = Path(*fixed), []
    try:
        for path in root.glob(str(Path(*pattern.parts[len(fixed) :]))):
            if any(part.startswith(".") for part in path.relative_to(root).parts):
                reading.skip("hidden", _plain(str(path)))
            elif path.is_file():
                found.append(path)
    except ValueError as error:
        raise UsageError(f"{str(pattern)!r} is no pattern: {error}") from None
    if not found:
        raise UsageError(f"no file matches {str(pattern)!r}", remedy="** stands for folders at any depth")
    return sorted(found), root.parent if root.name else root


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        inner = _KINDS.get(Path(path.stem).suffix.lower())
        return "record" if inner == "record" else "text"
    return _KINDS.get(suffix, "text")


def _unfit(path: Path, kind: str) -> str | None:
    """Why a folder's file is passed over before anyone asks for its bytes; None for one that is to be read."""
    try:
        with path.open("rb") as file:
            beginning = file.read(_SNIFFED)
        size = path.stat().st_size
    except OSError:
        return "unreadable"
    if not beginning.strip() and size <= _SNIFFED:
        return "empty"
    if kind in ("pdf", "docx", "record"):
        return None
    if size > MAX_DOCUMENT_BYTES:
        return too_large("", "", MAX_DOCUMENT_BYTES).reason
    return "binary" if is_binary(beginning) else None


def _reason(error: CratonError) -> str:
    if isinstance(error, Unfit):
        return error.reason
    if isinstance(error, NotUtf8):
        return "not UTF-8"
    return "unreadable" if isinstance(error, StoreError) else "damaged"


def _plain(name: str) -> str:
    """A file's name as text: bytes in it that are no UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def _missing(path: Path) -> UsageError:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, siblings)
    if near:
        remedy = f"did you mean {near}?"
    elif path.parent.is_dir():
        remedy = 'check the path; for the docstrings of a Python package write "package:NAME"'
    else:
        remedy = f"the folder {path.parent} does not exist either"
    return UsageError(f"there is no file or folder {str(path)!r}", remedy=remedy)
