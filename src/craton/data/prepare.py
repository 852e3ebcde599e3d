"""Prepare data for pretraining: read, clean, remove duplicates and evaluation data, tokenise, write shards."""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from craton.checkpoints.disk import disk_errors, write_synced
from craton.config import Settings
from craton.data.decontamination import EvaluationOverlap
from craton.data.deduplication import ExactDuplicates, NearDuplicates
from craton.data.document_work import Candidate, Chunk, Result, Task, work_through
from craton.data.documents import clean, digest
from craton.data.forms import texts_of
from craton.data.mixture import exact_shares
from craton.data.records import COMPRESSED, Reading, Record, read_records
from craton.data.schema import KeySettings, Schema, check_schema
from craton.data.shard_building import CHUNK_CHARACTERS, FolderCollector, new_folder, tokenizer_entry
from craton.data.shard_files import ShardsManifest, TokenizerEntry
from craton.data.words import WordHasher
from craton.errors import DataError, UsageError
from craton.modalities.text.tokenizer import Tokenizer

REMOVED_NAME: Final = "removed.jsonl"
PREPARED_SCHEMAS: Final[tuple[Schema, ...]] = ("text", "messages", "prompt")
CHUNK_RECORDS: Final = 1024
SMALL_BYTES: Final = 16 << 20
"""Below this, starting processes takes longer than they save."""
SHOWN: Final = 3  # removals of each reason that a report names

Reason = Literal["empty", "duplicate", "near-duplicate", "in evaluation data"]


class PrepareSettings(Settings):
    """What to prepare, and how."""

    sources: tuple[str, ...] = Field(min_length=1, description="files, folders, patterns, or hf:org/name[:split]")
    weights: tuple[float, ...] | None = Field(
        None, description="a weight for each source: training then draws tokens from them in this proportion"
    )
    dedup: Literal["exact", "minhash", "none"] = Field(
        "exact",
        description="remove documents whose text an earlier one has, but for white space (exact), those that share "
        "80 % of their runs of five words with an earlier one, too (minhash), or no duplicates (none)",
    )
    against: tuple[str, ...] = Field(
        (), description="evaluation data: documents that share 13 words in a row with it are removed"
    )
    holdout: float = Field(0.01, ge=0, le=0.5, description="share of the documents that is kept apart for evaluation")
    context: int | None = Field(
        None, ge=1, description="tokens of a training window: tells how many there are, and refuses data without one"
    )
    workers: int | None = Field(
        None, ge=1, description="processes (default: one for each CPU; for less than 16 MB, this process alone)"
    )
    lines: bool = Field(False, description="text files hold one document a line, and are not one document each")
    text_key: str | None = Field(None, description="the key that holds the text, if it is not `text`")


@dataclass
class Count:
    """Documents and the bytes of their text."""

    documents: int = 0
    bytes: int = 0

    def add(self, text: str) -> None:
        """Count one document."""
        self.documents += 1
        self.bytes += len(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Removal:
    """A document that was left out, why, and the origin of what it repeats."""

    origin: str
    reason: Reason
    like: str | None


@dataclass
class Preparation:
    """What has come of it, or so far. total_bytes: of the sources, where known. tokens: that stay. shown: some removals
    of each kind. skipped_files: in folders, by reason. manifest: of the result, None before the end."""

    folder: Path
    workers: int
    total_bytes: int | None
    read: Count = field(default_factory=Count)
    removed: dict[Reason, Count] = field(default_factory=dict)
    shown: list[Removal] = field(default_factory=list)
    skipped_files: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    manifest: ShardsManifest | None = None


def prepare(
    settings: PrepareSettings,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    name: str = "the model",
    report: Callable[[Preparation], None] = lambda so_far: None,
    on_wait: Callable[[], None] = lambda: None,
) -> Preparation:
    """Make a folder of shards (`craton.data.shard_files`) that appears whole or not at all. Its `removed.jsonl` lists
    what was left out. The shards are the same for any number of workers.

    name: of the tokeniser. report: is told how far it is, after each megabyte or so. on_wait: is called where another
    process is at work on the same folder. With several workers, a program needs the usual `if __name__ == "__main__"`.

    Raises UsageError for wrong settings or a folder that exists, DataError and FileFormatError (with file and line) for
    bad data, StoreError where the disk refuses.
    """
    entry, parts = tokenizer_entry(tokenizer, name), _parts(settings)
    total = _source_bytes(settings.sources)
    workers = settings.workers or (1 if total is not None and total < SMALL_BYTES else _cpus())
    so_far = Preparation(Path(folder), workers, total)
    with new_folder(so_far.folder, on_wait) as unfinished:
        overlap = EvaluationOverlap(read_records(settings.against), WordHasher()) if settings.against else None
        task = Task.of(tokenizer, settings.dedup == "minhash", overlap)
        collector = FolderCollector(unfinished, tokenizer, settings.holdout)
        run = _Run(settings, parts, so_far, collector)
        for chunk, results in work_through(task, run.chunks(), workers):
            run.take(chunk, results)
            report(so_far)
        run.finish(entry, unfinished / REMOVED_NAME)
    return so_far


@dataclass(frozen=True)
class _Part:
    """Sources that belong together: one of a mixture, or all."""

    name: str
    weight: float
    sources: tuple[str, ...]


class _Run:
    """One preparation: what it has seen, and where it puts what stays."""

    def __init__(
        self, settings: PrepareSettings, parts: Sequence[_Part], so_far: Preparation, collector: FolderCollector
    ) -> None:
        self._settings, self._parts, self._so_far, self._collector = settings, parts, so_far, collector
        self._exact = ExactDuplicates() if settings.dedup != "none" else None
        self._near = NearDuplicates()
        self._removed: list[bytes] = []
        self._began = time.monotonic()

    def chunks(self) -> Iterator[Chunk]:
        """The documents that are neither empty nor exact duplicates, some at a time, never of two parts."""
        reading, keys = Reading(skipped=self._so_far.skipped_files), KeySettings(text_key=self._settings.text_key)
        for number, part in enumerate(self._parts):
            for source in part.sources:
                records = read_records(source, lines=self._settings.lines, reading=reading)
                checked = check_schema(records, keys=keys, expected=PREPARED_SCHEMAS)
                chosen = filter(None, (self._candidate(record, checked.schema, number) for record in checked))
                yield from _chunked(chosen, checked.schema)

    def take(self, chunk: Chunk, results: Sequence[Result]) -> None:
        """Put the documents of a chunk where they belong."""
        for candidate, result in zip(chunk[1], results, strict=True):
            self._begin(candidate.part)
            if result.document is None:
                self._remove(candidate.origin, candidate.text, "in evaluation data", result.overlap)
                continue
            like = self._near.add(result.signature, candidate.origin) if result.signature is not None else None
            if like is not None:
                self._remove(candidate.origin, candidate.text, "near-duplicate", like)
            else:
                self._collector.add(result.document, candidate.digest)
        self._so_far.tokens = self._collector.tokens
        self._so_far.seconds = time.monotonic() - self._began

    def finish(self, tokenizer: TokenizerEntry, removed: Path) -> None:
        """Write what is left, the list of what was left out, and the manifest."""
        self._begin(len(self._parts) - 1)
        self._collector.finish()
        for part in self._collector.parts:
            if part.tokens <= (self._settings.context or 0):
                what = (
                    f"{part.tokens} tokens are left, not one window of {self._settings.context} and the token behind it"
                )
                raise DataError(what, where=part.name, remedy="take a smaller context, or more data")
        with disk_errors(f"write {removed.name}", removed):
            write_synced(removed, self._removed)
        prepared = {
            "settings": self._settings.model_dump(mode="json", exclude={"workers"}),
            "read": vars(self._so_far.read),
            "removed": {reason: vars(count) for reason, count in self._so_far.removed.items()},
            "skipped_files": self._so_far.skipped_files,
        }
        self._so_far.manifest = self._collector.write_manifest(tokenizer, prepared)
        self._so_far.tokens = self._collector.tokens
        self._so_far.seconds = time.monotonic() - self._began

    def _candidate(self, record: Record, schema: Schema, part: int) -> Candidate | None:
        is_text = schema == "text"
        given = record.value["text"] if is_text else "\n\n".join(texts_of(record.value))
        self._so_far.read.add(given)
        text = clean(given)
        if not text.strip():
            self._remove(record.origin, given, "empty", None)
            return None
        key = digest(text)
        first = self._exact.add(key, record.origin) if self._exact is not None else None
        if first is not None:
            self._remove(record.origin, given, "duplicate", first)
            return None
        return Candidate(part, record.origin, text, key, None if is_text else record)

    def _begin(self, part: int) -> None:
        for one in self._parts[len(self._collector.parts) : part + 1]:
            self._collector.begin(one.name, one.weight)

    def _remove(self, origin: str, text: str, reason: Reason, like: str | None) -> None:
        count = self._so_far.removed.setdefault(reason, Count())
        if count.documents < SHOWN:
            self._so_far.shown.append(Removal(origin, reason, like))
        count.add(text)
        line = {"origin": origin, "reason": reason, "like": like}
        self._removed.append(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")


def _parts(settings: PrepareSettings) -> list[_Part]:
    sources, weights = settings.sources, settings.weights
    if weights is None:
        return [_Part(sources[0] if len(sources) == 1 else f"{len(sources)} sources", 1.0, sources)]
    if len(weights) != len(sources):
        raise UsageError(
            f"{len(sources)} sources, but {len(weights)} weights", remedy="give one weight for each source"
        )
    exact_shares(1, weights)  # refuses what is no weight
    return [_Part(source, weight, (source,)) for source, weight in zip(sources, weights, strict=True)]


def _chunked(candidates: Iterable[Candidate], schema: Schema) -> Iterator[Chunk]:
    chunk: list[Candidate] = []
    characters = 0
    for candidate in candidates:
        chunk.append(candidate)
        characters += len(candidate.text)
        if characters >= CHUNK_CHARACTERS or len(chunk) == CHUNK_RECORDS:
            yield schema, chunk
            chunk, characters = [], 0
    if chunk:
        yield schema, chunk


def _source_bytes(sources: Sequence[str]) -> int | None:
    """About how many bytes will be read, where that can be told beforehand: not of packed files and the hub's."""
    total = 0
    for source in sources:
        path = Path(source).expanduser()
        paths = path.rglob("*") if path.is_dir() else map(Path, glob.iglob(str(path), recursive=True))
        files = [file for file in paths if file.is_file()]
        if not files or any(file.suffix in (*COMPRESSED, ".parquet") for file in files):
            return None
        total += sum(file.stat().st_size for file in files)
    return total


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
