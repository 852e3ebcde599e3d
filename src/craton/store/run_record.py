"""`run.json`: what is known of a run at a glance. It is replaced as a whole, never half."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from craton.checkpoints.disk import replace_file
from craton.errors import StoreError
from craton.store.manifest import Parent, Strict, read_document

Status = Literal["queued", "running", "done", "failed", "interrupted"]

SCHEMA: Final = 1
RECORD_NAME: Final = "run.json"


class Process(Strict):
    """A process that no other is ever mistaken for: its number and when it began (see `process_start`)."""

    pid: int
    start: str | None


class RunRecord(Strict):
    """`run.json`. Times are seconds since 1970.

    process: who runs it, or did last. started: when that process took it up. earlier_seconds: how long those before it
    were at work. total_steps: how many it will take, once that is known. result: what `Run.finish` was told.
    """

    schema_version: Annotated[int, Field(alias="schema")] = SCHEMA
    id: str
    kind: str
    name: str | None
    status: Status
    created: float
    started: float | None = None
    ended: float | None = None
    earlier_seconds: float = 0.0
    process: Process | None = None
    command: tuple[str, ...]
    parents: tuple[Parent, ...] = ()
    total_steps: int | None = None
    result: dict[str, Any] | None = None


def read_record(folder: Path) -> RunRecord:
    """The record of the run in `folder`.

    Raises:
        StoreError: it is missing, damaged, of another run or of a newer Craton.
    """
    remedy = f"remove it: craton runs rm {folder.name}"
    record = read_document(folder / RECORD_NAME, RunRecord, SCHEMA, remedy)
    if record.id != folder.name:
        raise StoreError(f"the record is of run {record.id}, not of its folder", where=str(folder), remedy=remedy)
    return record


def write_record(folder: Path, record: RunRecord) -> None:
    """Put `record` in place of the one in `folder`. Raises StoreError."""
    replace_file(folder / RECORD_NAME, record.model_dump_json(by_alias=True, indent=2).encode() + b"\n")


def this_command() -> tuple[str, ...]:
    """How this process was started, as one would type it: without the place of the program."""
    program = Path(sys.argv[0])
    if program.name in ("craton", "craton.exe", "__main__.py"):
        return ("craton", *sys.argv[1:])
    return ("python", program.name, *sys.argv[1:])
