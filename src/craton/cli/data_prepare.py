"""`craton data prepare`: write data as tokenised shards for pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from craton.cli.options import Json
from craton.cli.terminal import print_json, size, stderr, stdout
from craton.cli.token_view import harmless, isolated

if TYPE_CHECKING:
    from craton.data.prepare import Preparation
    from craton.data.shard_files import PartEntry
    from craton.modalities.text import Tokenizer


def prepare(
    *sources: Annotated[str, Parameter(help="files, folders, patterns, or hf:org/name[:split]")],
    tokenizer: Annotated[str, Parameter(name=["--tokenizer", "-t"], help="a model, or a folder with a tokenizer.json")],
    out: Annotated[Path, Parameter(name=["--out", "-o"], help="the new folder for the shards")],
    context: Annotated[
        int | None, Parameter(help="tokens of a training window: says how many there are, refuses data without one")
    ] = None,
    workers: Annotated[
        int | None, Parameter(help="processes (default: one for each CPU; below 16 MB of data, this one alone)")
    ] = None,
    dedup: Annotated[
        Literal["exact", "minhash", "none"],
        Parameter(
            help="remove documents with the text of an earlier one, white space aside (exact); also those that share "
            "80 % of their runs of five words with one (minhash)"
        ),
    ] = "exact",
    against: Annotated[
        list[str] | None,
        Parameter(negative="", help="evaluation data: documents that share 13 words in a row with it are removed"),
    ] = None,
    holdout: Annotated[float, Parameter(help="share of the documents that is kept apart for evaluation")] = 0.01,
    weights: Annotated[
        str | None, Parameter(help="0.7,0.3: training draws tokens from the sources in this proportion")
    ] = None,
    text_key: Annotated[str | None, Parameter(help="the key that holds the text, if it is not `text`")] = None,
    lines: Annotated[bool, Parameter(negative="", help="text files hold one document a line")] = False,
    json: Json = False,
) -> None:
    """Read data, remove duplicates and evaluation data, tokenise it and write memory-mapped shards.

    Takes documents, chats and prompts; of these, only answers are learnt. The folder appears when it is complete:
    stopped at any time, nothing is left but the sources."""
    from craton.config import parse
    from craton.data.prepare import PrepareSettings
    from craton.data.prepare import prepare as prepare_data

    flags = {
        "sources": sources,
        "weights": None if weights is None else _numbers(weights),
        "dedup": dedup,
        "against": against or (),
        "holdout": holdout,
        "context": context,
        "workers": workers,
        "lines": lines,
        "text_key": text_key,
    }
    settings = parse(PrepareSettings, flags, where="the flags")
    own = _tokenizer(tokenizer)
    try:
        with _progress() as report:
            done = prepare_data(settings, own, out, name=tokenizer, report=report, on_wait=_say_waiting)
    except KeyboardInterrupt:
        stderr.print("stopped; nothing was written")
        raise
    if json:
        print_json(_json(done, context))
    else:
        _print(done, own, context)


def _numbers(text: str) -> tuple[float, ...]:
    from craton.errors import UsageError

    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"weights are numbers with commas between them, not {text!r}", where="--weights") from None


def _tokenizer(name: str) -> Tokenizer:
    path = Path(name).expanduser()
    if (path / "tokenizer.json").is_file():
        from craton.modalities.text import Tokenizer

        return Tokenizer.from_folder(path)
    from craton import store
    from craton.checkpoints.checkpoint import Checkpoint

    return Checkpoint.open(store.find(name).path).tokenizer()


def _say_waiting() -> None:
    stderr.print("[dim]another process is preparing this folder; waiting for it[/]")


@contextmanager
def _progress() -> Iterator[Callable[[Preparation], None]]:
    """Documents, bytes and their rate, and where the size of the data is known, the time left."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def report(so_far: Preparation) -> None:
            done, rate = so_far.read, so_far.read.bytes / max(so_far.seconds, 1e-3)
            facts = [
                f"{done.documents:,} documents",
                size(done.bytes),
                f"{size(int(rate))}/s",
                f"{so_far.tokens:,} tokens",
            ]
            if so_far.total_bytes is not None and rate:
                # What stands around the texts in JSON is never read as text, so that the end comes somewhat early.
                left = int(max(so_far.total_bytes - done.bytes, 0) / rate)
                facts.append(f"{left // 60}:{left % 60:02} left")
            bar.update(task, description=" · ".join(facts), completed=done.bytes, total=so_far.total_bytes)

        yield report


def _print(done: Preparation, tokenizer: Tokenizer, context: int | None) -> None:
    manifest = done.manifest
    assert manifest is not None
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(overflow="fold")
    for column in ("documents", "text", "tokens", *(("weight", "an epoch reads") if len(manifest.parts) > 1 else ())):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("read", f"{done.read.documents:,}", size(done.read.bytes))
    for reason, count in done.removed.items():
        table.add_row(f"  {reason}", f"−{count.documents:,}", f"−{size(count.bytes)}", style="yellow")
    table.add_row("held out", *(_cells(manifest.heldout) if manifest.heldout else "0"))
    for part, times in zip(manifest.parts, _times(manifest.parts), strict=True):
        mixed = (isolated(escape(harmless(part.name))), f"{part.weight:g}", f"{times:.2f} ×")
        name, *more = mixed if len(manifest.parts) > 1 else ("to train",)
        table.add_row(name, *_cells(part), *more, style="bold")
    stdout.print(table)
    stdout.print()
    for removal in done.shown:
        like = f" [dim]like[/] {_origin(removal.like)}" if removal.like else ""
        stdout.print(f"[yellow]{removal.reason}[/]: {_origin(removal.origin)}{like}", soft_wrap=True)
    for fact in _facts(done, tokenizer, context):
        stdout.print(f"[dim]{escape(fact)}[/]", soft_wrap=True)


def _origin(origin: str) -> str:
    return isolated(escape(harmless(origin)))


def _cells(part: PartEntry) -> tuple[str, str, str]:
    return f"{part.documents:,}", size(part.bytes), f"{part.tokens:,}"


def _times(parts: tuple[PartEntry, ...]) -> list[float]:
    """How often an epoch reads each part of a mixture."""
    from craton.data.mixture import exact_shares

    drawn = exact_shares(sum(part.tokens for part in parts), [part.weight for part in parts])
    return [tokens / part.tokens for part, tokens in zip(parts, drawn, strict=True)]


def _facts(done: Preparation, tokenizer: Tokenizer, context: int | None) -> Iterator[str]:
    manifest = done.manifest
    assert manifest is not None
    parts = [*manifest.parts, *([manifest.heldout] if manifest.heldout else [])]
    files = [file for part in parts for shard in part.shards for file in shard.files]
    end = tokenizer.backend.id_to_token(manifest.tokenizer.end_id)
    tokens, nbytes = sum(part.tokens for part in parts), sum(part.bytes for part in parts)
    if done.removed:
        yield f"every document that was left out: {done.folder / 'removed.jsonl'}"
    if done.skipped_files:
        yield "files skipped: " + ", ".join(f"{count:,} {why}" for why, count in done.skipped_files.items())
    yield f"{nbytes / tokens:.2f} bytes per token · a document ends in {end} · ids as {manifest.dtype}"
    if context is not None:
        yield f"{_windows(manifest.parts, context):,} windows of {context:,} tokens"
    rate, processes = size(int(done.read.bytes / max(done.seconds, 1e-3))), "es" if done.workers > 1 else ""
    yield f"{done.seconds:.1f} s, {rate}/s with {done.workers} process{processes}"
    yield f"{size(sum(file.size for file in files))} in {sum(len(part.shards) for part in parts)} shards: {done.folder}"


def _windows(parts: tuple[PartEntry, ...], context: int) -> int:
    return sum((part.tokens - 1) // context for part in parts)


def _json(done: Preparation, context: int | None) -> dict[str, Any]:
    manifest = done.manifest
    assert manifest is not None
    return {
        "folder": str(done.folder),
        "seconds": round(done.seconds, 3),
        "workers": done.workers,
        **manifest.prepared,
        "parts": [part.model_dump(exclude={"shards"}) for part in manifest.parts],
        "heldout": manifest.heldout.model_dump(exclude={"shards"}) if manifest.heldout else None,
        "tokenizer": manifest.tokenizer.model_dump(),
        "windows": None if context is None else _windows(manifest.parts, context),
    }
