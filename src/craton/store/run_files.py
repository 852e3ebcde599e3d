"""The files of a run: JSON, and JSON lines that only grow, where a kill costs at most the line being written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from craton.checkpoints.disk import disk_errors
from craton.errors import StoreError

TAIL_BYTES: Final = 1 << 16
REWIND: Final = "rewind"


def append_line(path: Path, line: str) -> None:
    """Add one line to `path`, made if it is not there, by one write; a torn line before it is ended first.

    Raises:
        StoreError: no space or no permission; a part of the line may be there, and readers skip it.
    """
    with disk_errors(f"write {path.name}", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            torn = False
            if os.lseek(descriptor, 0, os.SEEK_END):
                os.lseek(descriptor, -1, os.SEEK_END)
                torn = os.read(descriptor, 1) != b"\n"
            rest = memoryview((("\n" if torn else "") + line + "\n").encode())
            while rest:  # only a full disk writes less than all, and then the next write says so
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add `row` as one line of strict JSON: NaN and infinity, which JSON does not have, become null."""
    append_line(path, json.dumps(_finite(row), ensure_ascii=False))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file in the order they were written; none if it is not there. Torn lines are skipped.

    Raises:
        StoreError: it cannot be read.
    """
    with disk_errors(f"read {path.name}", path):
        return list(_rows(path.read_bytes().split(b"\n"))) if path.exists() else []


def read_last_rows(path: Path) -> list[dict[str, Any]]:
    """The rows in the last `TAIL_BYTES` of a file, whatever its size."""
    with disk_errors(f"read {path.name}", path):
        if not path.exists():
            return []
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    return list(_rows(lines[1:] if size > TAIL_BYTES else lines))


def by_step(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of metrics as one for each step, in order. Later values replace earlier ones of the same step, and a
    {"rewind": n} ends what was logged for steps after n."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        if isinstance(row.get(REWIND), int):
            steps = {step: kept for step, kept in steps.items() if step <= row[REWIND]}
        elif isinstance(row.get("step"), int):
            steps[row["step"]] = steps.get(row["step"], {}) | dict(row)
    return [steps[step] for step in sorted(steps)]


def json_bytes(value: Any) -> bytes:
    """A JSON document that people can read."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        StoreError: it is missing, cannot be read or is damaged.
    """
    with disk_errors(f"read {path.name}", path):
        raw = path.read_bytes()
    try:
        return dict(json.loads(raw))
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{path.name} is damaged: {error}", where=str(path)) from None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # empty, or torn by a kill or a full disk
        if isinstance(row, dict):
            yield row
