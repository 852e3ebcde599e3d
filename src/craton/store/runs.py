"""Runs on disk: what was asked for, what happened, and where it can go on. Files are the truth; torch is not needed.

`<home>/runs/<ulid>/` holds `run.json` (the record), `config.json` and `provenance.json` (the settings and where each
came from), `environment.json`, `metrics.jsonl` and `events.jsonl` (one object a line, only ever appended to), `log.txt`
and `checkpoints/`. The record is replaced as a whole, so a kill at any moment leaves a readable run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from craton.checkpoints.disk import disk_errors, sync_folder, write_synced
from craton.config import Settings
from craton.config.resolve import DEFAULT
from craton.errors import CratonError, StoreError, UnknownName, UsageError, did_you_mean
from craton.store.environment import environment, process_start
from craton.store.folders import home, make_folder
from craton.store.locks import held
from craton.store.manifest import Parent
from craton.store.publishing import building, discard
from craton.store.run_files import (
    REWIND,
    append_line,
    append_row,
    by_step,
    json_bytes,
    read_last_rows,
    read_object,
    read_rows,
)
from craton.store.run_record import Process, RunRecord, Status, read_record, this_command, write_record
from craton.store.ulid import new_ulid, ulid_seconds

LAST: Final = "last"
LOSSES: Final = ("loss", "held_out/loss")  # the metrics that curves and cards are about
_SHOWN: Final = 5  # of many runs, the newest


class Run:
    """One run, open for reading; who writes holds `lock()`."""

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        self.record = record

    @classmethod
    def create(
        cls,
        kind: str,
        *,
        config: Settings | Mapping[str, Any],
        provenance: Mapping[str, str],
        parents: tuple[Parent, ...] = (),
        name: str | None = None,
    ) -> Run:
        """A new, queued run of `kind` ("pretrain", "finetune" ...) with resolved settings and the origin of each.

        Raises:
            StoreError: no space or no permission.
        """
        command, created = this_command(), _now()
        record = RunRecord(
            id=new_ulid(), kind=kind, name=name, status="queued", created=created, command=command, parents=parents
        )
        values = config.model_dump(mode="json") if isinstance(config, Settings) else config
        final = make_folder(home() / "runs") / record.id
        with building() as folder, disk_errors("create a run", final):
            (folder / "checkpoints").mkdir()
            write_record(folder, record)
            files = {"config": values, "provenance": provenance, "environment": environment()}
            for file, content in files.items():
                write_synced(folder / f"{file}.json", [json_bytes(content)])
            sync_folder(folder)
            os.rename(folder, final)
            sync_folder(final.parent)
        return cls(final, record)

    @classmethod
    def open(cls, text: str) -> Run:
        """The run that a user means: an id, the beginning of one (in any case), a name (its newest run), or "last".

        Raises:
            UnknownName: no such run; the nearest ids and names are suggested.
            UsageError: the beginning of several ids.
            StoreError: its record cannot be read.
        """
        return _load(_folder_of(text))

    # --- what it is ---

    @property
    def id(self) -> str:
        """Its ULID."""
        return self.record.id

    @property
    def kind(self) -> str:
        """The verb that made it."""
        return self.record.kind

    @property
    def name(self) -> str | None:
        """What its user called it."""
        return self.record.name

    @property
    def status(self) -> Status | Literal["lost"]:
        """Its state; "lost" is one that says "running" but whose process is gone."""
        return "lost" if self.record.status == "running" and not self.is_alive() else self.record.status

    @property
    def seconds(self) -> float:
        """How long processes were at work on it; of a lost one, until its last sign of life."""
        record = self.record
        if record.started is None:
            return 0.0
        end = record.ended or (_now() if self.is_alive() else self._last_sign())
        return record.earlier_seconds + max(0.0, end - record.started)

    @property
    def checkpoints_folder(self) -> Path:
        """Where its checkpoints are kept."""
        return self.folder / "checkpoints"

    def is_alive(self) -> bool:
        """Whether a process of this machine is at work on it."""
        process = self.record.process
        if self.record.status != "running" or process is None:
            return False
        return process.start is None or process_start(process.pid) == process.start

    def settings(self) -> dict[str, tuple[Any, str]]:
        """Each resolved setting and its origin, by dotted key."""
        origins = read_object(self.folder / "provenance.json")
        return dict(_leaves(read_object(self.folder / "config.json"), origins, ""))

    def config(self) -> dict[str, Any]:
        """The resolved settings, nested as their model is."""
        return read_object(self.folder / "config.json")

    def environment(self) -> dict[str, Any]:
        """What it was created with: versions, processor, threads."""
        return read_object(self.folder / "environment.json")

    def metrics(self) -> list[dict[str, Any]]:
        """One row for each step, {"step", "time", ...}, by step. Of a step that was logged several times (its training
        and its validation loss; again by a resumed run) later values replace earlier ones."""
        return by_step(read_rows(self.folder / "metrics.jsonl"))

    def last_metrics(self) -> dict[str, Any]:
        """The last step with the newest value of each number, from the end of the file; empty if nothing was logged."""
        newest: dict[str, Any] = {}
        for row in by_step(read_last_rows(self.folder / "metrics.jsonl")):
            newest |= row
        return newest

    def events(self) -> list[dict[str, Any]]:
        """What happened, in order: {"time", "event", ...}."""
        return read_rows(self.folder / "events.jsonl")

    def log_lines(self, count: int) -> list[str]:
        """The last lines of its log."""
        path = self.folder / "log.txt"
        with disk_errors("read the log", path):
            return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:] if path.exists() else []

    # --- what happens to it ---

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one process that runs it: "running" in the block, afterwards what `finish` said. A block that ends
        without a `finish` is done; one that raises is interrupted (KeyboardInterrupt, SystemExit) or failed.

        Raises:
            UsageError: another process runs it.
            StoreError: no permission or no space.
        """
        with _held_alone(self.folder):
            self.record = _load(self.folder).record
            self.refuse_if_alive()  # where the file system has no locks
            self.set_status("running")
            try:
                yield
            except BaseException as error:
                if self.record.status == "running":
                    stopped = isinstance(error, KeyboardInterrupt | SystemExit)
                    status: Status = "interrupted" if stopped else "failed"
                    # A full disk may be what failed; what is raised already says more.
                    with contextlib.suppress(StoreError):
                        self.finish(status, {"error": _in_words(error)})
                raise
            if self.record.status == "running":
                self.finish("done")

    def set_total_steps(self, steps: int) -> None:
        """Say how many steps it will take in all."""
        self._update(total_steps=steps)

    def set_status(self, status: Status) -> None:
        """Change its state, and with "running" take it up with this process. `lock` and `finish` do so on the way."""
        changes: dict[str, Any] = {"ended": None if status in ("queued", "running") else _now()}
        if status == "running":
            changes |= {"process": Process(pid=os.getpid(), start=process_start(os.getpid())), "result": None}
            changes |= {"started": _now(), "earlier_seconds": self.seconds}
        self._update(status=status, **changes)
        self.event(status)

    def finish(self, status: Status, result: Mapping[str, Any] | None = None) -> None:
        """Say how it ended. By convention `result` has "model" (the id of what it published), "metrics" (numbers that
        were measured at the end) and, if it failed, "error"."""
        self._update(status=status, ended=_now(), result=dict(result) if result is not None else None)
        self.event(status)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Note numbers of a step. Numbers that are not finite are kept as null."""
        numbers = {key: value if isinstance(value, int) else float(value) for key, value in values.items()}
        append_row(self.folder / "metrics.jsonl", {"step": step, "time": round(_now(), 3), **numbers})

    def rewind(self, step: int) -> None:
        """Say that it goes on from a checkpoint of `step`: what was logged for later steps no longer counts."""
        append_row(self.folder / "metrics.jsonl", {REWIND: step})

    def event(self, kind: str, **data: Any) -> None:
        """Note that something happened."""
        append_row(self.folder / "events.jsonl", {"time": round(_now(), 3), "event": kind, **data})

    def log(self, text: str) -> None:
        """Add a line, or several, to its log."""
        append_line(self.folder / "log.txt", text.rstrip("\n"))

    def refuse_if_alive(self) -> None:
        """Raise UsageError if another process is at work on it."""
        process = self.record.process
        if process is not None and process.start is not None and process.pid != os.getpid() and self.is_alive():
            raise _busy(self.folder, f"process {process.pid}")

    def _last_sign(self) -> float:
        times = [row.get("time", 0.0) for row in (self.last_metrics(), *self.events()[-1:])]
        return max([self.record.started or 0.0, *times])

    def _update(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        write_record(self.folder, self.record)


def list_runs() -> list[Run]:
    """Every readable run, oldest first. What cannot be read is in `damaged_runs`."""
    return [run for run in _scan() if isinstance(run, Run)]


def damaged_runs() -> list[StoreError]:
    """One error for each run whose record cannot be read."""
    return [run for run in _scan() if isinstance(run, StoreError)]


def remove_run(text: str) -> str:
    """Delete a run (named as for `Run.open`, a damaged one too) with its checkpoints; return its id. What it published
    stays in the store.

    Raises:
        UnknownName, UsageError: no such run, several, or a process is at work on it.
        StoreError: no permission.
    """
    folder = _folder_of(text)
    with contextlib.suppress(StoreError):  # a damaged record says nothing, and a lock may still speak
        _load(folder).refuse_if_alive()

    with _held_alone(folder):
        discard(folder, f"run {folder.name}")
    return folder.name


def _scan() -> Iterator[Run | StoreError]:
    for folder in _folders():
        try:
            yield _load(folder)
        except StoreError as error:
            yield error


def _folders() -> list[Path]:
    folder = home() / "runs"
    with disk_errors("read the runs", folder):
        paths = list(folder.iterdir()) if folder.is_dir() else []
    return sorted(path for path in paths if ulid_seconds(path.name) is not None)


def _folder_of(text: str) -> Path:
    folders = _folders()
    if text == LAST and folders:
        return folders[-1]
    begun = [folder for folder in folders if text and folder.name.startswith(text.upper())]
    if len(begun) == 1:
        return begun[0]
    if begun:
        some = ", ".join(folder.name for folder in begun[-_SHOWN:])
        raise UsageError(f"{len(begun)} runs begin with {text!r}", remedy=f"write more of one: {some}")
    runs = list_runs()
    named = [run.folder for run in runs if run.name == text]
    if named:
        return named[-1]
    names = sorted({run.name for run in runs if run.name})
    ids = [folder.name[: max(len(text), 8)] for folder in folders]  # a typing error in a beginning is near it
    known = {*names, *ids}
    raise UnknownName("run", text, known if did_you_mean(text, known) else {*names[:_SHOWN], *ids[-_SHOWN:]})


@contextlib.contextmanager
def _held_alone(folder: Path) -> Iterator[None]:
    def refuse() -> None:
        raise _busy(folder, "another process")

    with held(folder / "lock", refuse):
        yield


def _busy(folder: Path, worker: str) -> UsageError:
    remedy = "wait until it ends, or stop it with Ctrl-C"
    return UsageError(f"run {folder.name} is at work in {worker}", where=str(folder), remedy=remedy)


def _load(folder: Path) -> Run:
    return Run(folder, read_record(folder))


def _leaves(values: dict[str, Any], origins: dict[str, str], prefix: str) -> Iterator[tuple[str, tuple[Any, str]]]:
    for name, value in values.items():
        key = prefix + name
        if isinstance(value, dict) and key not in origins:
            yield from _leaves(value, origins, f"{key}.")
        else:
            yield key, (value, origins.get(key, DEFAULT))


def _in_words(error: BaseException) -> dict[str, Any]:
    if isinstance(error, CratonError):
        return dict(error.as_dict())
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    return {"code": "fault", "what": what, "where": None, "remedy": None}


def _now() -> float:
    return time.time()
