"""Where data comes from: files, folders, patterns and hub data sets, all as one stream of records.

A record is an object and its origin, "train.jsonl:17", which every later error repeats. Reading is lazy and holds one
record at a time, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import itertools
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from craton.checkpoints.disk import disk_errors
from craton.data import formats
from craton.data.hub import read_hub
from craton.data.lines import MAX_RECORD_BYTES, NotUtf8
from craton.errors import FileFormatError, UsageError, did_you_mean

HUB_PREFIX: Final = "hf:"
COMPRESSED: Final = (".gz", ".xz")


@dataclass(frozen=True, slots=True)
class Record:
    """One object of the data. origin: "path:line", "path#row" for Parquet, "hf:name:split#row"; all count from 1."""

    value: dict[str, Any]
    origin: str


@dataclass
class Reading:
    """What was read so far, and what folders held beside it. skipped: by reason ("hidden", "binary", ...), files."""

    files: int = 0
    records: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count a file that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def read_records(
    source: str | Path | Sequence[str | Path],
    *,
    lines: bool = False,
    max_record_bytes: int = MAX_RECORD_BYTES,
    reading: Reading | None = None,
) -> Iterator[Record]:
    """The records of a source, or of several one after another.

    A source is a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet; any other text is a document), either with .gz or
    .xz behind its name; a folder of such files, read in order of their paths; a pattern such as "src/**/*.py"; or
    "hf:org/name[:split]". lines: text files hold one document a line. reading: is told what was read.

    In folders, hidden, binary and empty files are skipped and counted, and documents that are not UTF-8. Raises
    UsageError for a source that is not there, FileFormatError (with file and line) for what cannot be read as what it
    says it is, a file or source without records included, StoreError where the disk refuses.
    """
    reading = reading if reading is not None else Reading()
    for one in [source] if isinstance(source, (str, Path)) else source:
        before = reading.records
        for record in _read_source(str(one), lines, max_record_bytes, reading):
            reading.records += 1
            yield record
        if reading.records == before:
            skipped = ", ".join(f"{count} {reason}" for reason, count in reading.skipped.items())
            raise FileFormatError(
                "there are no records" + (f" (files skipped: {skipped})" if skipped else ""), where=str(one)
            )


def _read_source(source: str, lines: bool, max_bytes: int, reading: Reading) -> Iterator[Record]:
    if source.startswith(HUB_PREFIX):
        name = source.removeprefix(HUB_PREFIX)
        return (Record(row, f"{source}#{number}") for number, row in read_hub(name))
    path = Path(source).expanduser()
    with disk_errors("find the data", path):
        if path.is_dir():
            return _read_files(_walk(path, reading), lines, max_bytes, reading)
        if path.exists():
            reading.files += 1
            return _read_file(path, lines, max_bytes)
        if not glob.has_magic(source):
            raise _missing(path)
        return _read_files(_matching(path, reading), lines, max_bytes, reading)


def _read_files(paths: Sequence[Path], lines: bool, max_bytes: int, reading: Reading) -> Iterator[Record]:
    for path in paths:
        is_table = _kind(path) in formats.TABLES
        unfit = _unfit(path, is_table)
        if unfit is None:
            reading.files += 1
            try:
                yield from _read_file(path, lines, max_bytes)
            except NotUtf8:
                if is_table or lines:
                    raise
                reading.files -= 1
                unfit = "not UTF-8"
        if unfit is not None:
            reading.skip(unfit)


def _read_file(path: Path, lines: bool, max_bytes: int) -> Iterator[Record]:
    name, kind = str(path), _kind(path)
    with _opened(path) as file:
        if kind == ".parquet":
            for number, row in formats.read_parquet(file, name):
                yield Record(row, f"{name}#{number}")
        else:
            for number, value in _numbered(file, name, kind, lines, max_bytes):
                yield Record(value, f"{name}:{number}")


def _numbered(file: IO[bytes], name: str, kind: str, lines: bool, max_bytes: int) -> formats.Numbered:
    match kind:
        case ".jsonl" | ".ndjson":
            return formats.read_jsonl(file, name, max_bytes)
        case ".json":
            return formats.read_json(file, name, max_bytes)
        case ".csv" | ".tsv":
            return formats.read_csv(file, name, max_bytes, "," if kind == ".csv" else "\t")
    if lines:
        return formats.read_text_lines(file, name, max_bytes)
    return formats.read_document(file, name, max_bytes)


def _walk(folder: Path, reading: Reading) -> list[Path]:
    found: list[Path] = []
    with disk_errors("read the folder", folder):
        for parent, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if name.startswith("."):
                    reading.skip("hidden")
                elif (path := Path(parent, name)).is_file():  # no sockets, no broken links
                    found.append(path)
    return sorted(found)


def _matching(pattern: Path, reading: Reading) -> list[Path]:
    # Path.glob rather than the glob module, which follows links and so never ends in a loop of them.
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    root, found = Path(*fixed), []
    try:
        for path in root.glob(str(Path(*pattern.parts[len(fixed) :]))):
            if any(part.startswith(".") for part in path.relative_to(root).parts):
                reading.skip("hidden")
            elif path.is_file():
                found.append(path)
    except ValueError as error:
        raise UsageError(f"{str(pattern)!r} is no pattern: {error}") from None
    if not found:
        raise UsageError(f"no file matches {str(pattern)!r}", remedy="** stands for folders at any depth")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _unfit(path: Path, is_table: bool) -> str | None:
    """Why a folder's file is passed over: "empty" or "binary"; None for one that is to be read."""
    with _opened(path) as file:
        beginning = file.read(formats.SNIFFED_BYTES)
    if not beginning.strip():
        return "empty"
    return None if is_table or b"\0" not in beginning else "binary"


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, unpacked where its name says that it is packed."""
    suffix = path.suffix.lower()
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    with disk_errors(f"read {path.name}", path):
        try:
            with openers.get(suffix, open)(path, "rb") as file:
                yield file
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            raise FileFormatError(f"not {suffix} data, or cut off: {error}", where=str(path)) from None


def _missing(path: Path) -> UsageError:
    parent = path.parent
    siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = did_you_mean(path.name, siblings)
    if near:
        remedy = f"did you mean {near}?"
    elif parent.is_dir():
        remedy = "check the path"
    else:
        remedy = f"the folder {parent} does not exist either"
    return UsageError(f"there is no file or folder {str(path)!r}", remedy=remedy)
