"""The file formats of records: JSON lines, JSON, CSV, Parquet and plain text, each as a stream of numbered objects.

Every reader takes an open binary file and the name to call it by in errors, and yields (line or row, object) with
numbers from 1. What is not as the format says raises FileFormatError with that place.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator
from typing import IO, Any, Final

from craton.data.json_values import JsonWindow, parse_json
from craton.data.lines import UTF16_MARKS, decode, read_lines, too_long
from craton.errors import FileFormatError, UsageError

Numbered = Iterator[tuple[int, dict[str, Any]]]

TABLES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""What holds many records; every other file that is text is one document."""
SNIFFED_BYTES: Final = 8192  # of a file's beginning: text has no zero byte there
PARQUET_ROWS: Final = 256  # rows turned into objects at a time


def read_jsonl(file: IO[bytes], name: str, max_bytes: int) -> Numbered:
    """One JSON object a line; blank lines are passed over."""
    for number, line in read_lines(file, name, max_bytes):
        if line.strip():
            yield number, _object(parse_json(line, f"{name}:{number}"), f"{name}:{number}")


def read_json(file: IO[bytes], name: str, max_bytes: int) -> Numbered:
    """A list of objects, or objects one after another: many data sets of JSON lines are called .json."""
    window = JsonWindow(file, name, max_bytes)
    listed = window.skip("[")
    if listed and window.skip("]"):
        return
    while not window.at_end():
        line, value = window.value()
        yield line, _object(value, f"{name}:{line}")
        if listed and not window.skip(","):
            break
    if listed and not window.skip("]"):
        window.refuse("a comma or the end of the list was expected")
    if not window.at_end():
        window.refuse("the list has ended, but the file has not")


def read_csv(file: IO[bytes], name: str, max_bytes: int, delimiter: str) -> Numbered:
    """Rows under a header, with quotes as RFC 4180 has them; blank lines are passed over."""
    # The limit is the csv module's, for the whole process; `lines` below sets the one that counts.
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
    used = 0

    def lines() -> Iterator[str]:
        nonlocal used
        for _, line in read_lines(file, name, max_bytes):
            used += len(line)
            if used > max_bytes:
                raise too_long("the row", f"{name}:{begin}", max_bytes, "close the quote that was opened in this row")
            yield line

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begin = 1
    try:
        for row in rows:
            if header is None and row:
                header = _header(row, f"{name}:{begin}")
            elif header is not None and row:
                if len(row) != len(header):
                    raise FileFormatError(
                        f"the row has {len(row)} fields, the header {len(header)}",
                        where=f"{name}:{begin}",
                        remedy="put fields that hold the delimiter or a line end in double quotes",
                    )
                yield begin, dict(zip(header, row, strict=True))
            begin, used = rows.line_num + 1, 0
    except csv.Error as error:
        raise FileFormatError(
            f"not {'TSV' if delimiter == chr(9) else 'CSV'}: {error}",
            where=f"{name}:{begin}",
            remedy='write a double quote within a quoted field twice (""), and close every quote',
        ) from None


def read_parquet(file: IO[bytes], name: str) -> Numbered:
    """Rows of a Parquet file. Raises UsageError where pyarrow is not installed."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        arrow_error = importlib.import_module("pyarrow").ArrowException
    except ImportError:
        raise missing_extra("Parquet files", "pyarrow", name) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (arrow_error, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's; those of damaged pages carry no number
        raise FileFormatError(f"not Parquet, or damaged: {error}", where=f"{name}#{number + 1}") from None


def read_document(file: IO[bytes], name: str, max_bytes: int) -> Numbered:
    """The whole file as one text."""
    data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_long("the document", name, max_bytes, "split it, or read it as one document a line (--lines)")
    if b"\0" in data[:SNIFFED_BYTES] and not data.startswith(UTF16_MARKS):
        raise FileFormatError(
            "the file is binary, not text", where=name, remedy=f"give text, or records as {', '.join(TABLES)}"
        )
    text = decode(data, name)
    if text.strip():
        yield 1, {"text": text}


def read_text_lines(file: IO[bytes], name: str, max_bytes: int) -> Numbered:
    """Each line that is not blank as one text, without its line end."""
    for number, line in read_lines(file, name, max_bytes):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


def missing_extra(what: str, package: str, where: str) -> UsageError:
    """The error for a library that only some data needs."""
    return UsageError(f"reading {what} needs {package}", where=where, remedy="pip install 'craton[data]'")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        raise FileFormatError(
            f"a record must be a JSON object, not {kind}", where=where, remedy='write {"text": ...} or the like'
        )
    return value


def _header(row: list[str], where: str) -> list[str]:
    twice = next((name for name in row if row.count(name) > 1), None)
    if twice is not None:
        raise FileFormatError(
            f"the header names {twice!r} twice", where=where, remedy="the first line must name each column"
        )
    return row
