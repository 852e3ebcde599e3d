"""`craton index`: documents made searchable, and kept up to date."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.markup import escape

from craton.cli.options import DEFAULT_EMBED_MODEL, Json, Threads
from craton.cli.terminal import print_json, size, status, stderr, stdout
from craton.errors import CratonError, UsageError

if TYPE_CHECKING:
    from craton.retrieval.index import Index
    from craton.retrieval.readers import Reading
    from craton.retrieval.sync import SyncReport

DEFAULT_INDEX = "docs"

IndexName = Annotated[str, Parameter(name=["--index", "-i"], help="the index's name")]
Where = Annotated[
    tuple[str, ...],
    Parameter(
        help='only documents of which this holds: "kind=pdf", "folder=guide/*", "year>=2020"', negative_iterable=()
    ),
]
Docs = Annotated[str, Parameter(help="files, folders, patterns, or package:NAME for a Python package's docstrings")]

index = App(name="index", help="Index documents for questions: add, update, tune, show and remove.")


@index.command
def add(
    *docs: Docs,
    index: IndexName = DEFAULT_INDEX,
    encoder: Annotated[str, Parameter(help="the model that embeds the passages")] = DEFAULT_EMBED_MODEL,
    size: Annotated[int, Parameter(help="longest passage, in tokens")] = 200,
    overlap: Annotated[int, Parameter(help="tokens that neighbouring passages share")] = 32,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Add documents to an index, which is made if it is not there. What is in it already and unchanged is not read."""
    from craton.retrieval.chunking import ChunkSettings
    from craton.retrieval.collection import CollectionSettings
    from craton.retrieval.index import create_index

    if not docs:
        raise UsageError("no documents to add", remedy="name files, folders or package:NAME")
    settings = CollectionSettings(encoder=encoder, chunking=ChunkSettings(size=size, overlap=overlap))
    with create_index(index, settings, threads) as opened:
        differs = opened.collection.differences(settings)
        if differs and opened.collection.document_count:
            raise UsageError(
                f"the index {index!r} was made with other settings: {'; '.join(differs)}",
                remedy=f"craton index rm --index {index}, then add anew; or leave these flags out",
            )
        opened.collection.add_origins(absolute(docs))
        _synced(opened, tuple(absolute(docs)), prune=False, json=json)


@index.command
def update(*, index: IndexName = DEFAULT_INDEX, threads: Threads = None, json: Json = False) -> None:
    """Read again what was added: changed files are embedded anew, files that are gone are forgotten."""
    from craton.retrieval.index import open_index

    with open_index(index, threads) as opened:
        _synced(opened, opened.collection.origins, prune=True, json=json)


@index.command
def tune(
    name: Annotated[str, Parameter(help="the index's name")],
    questions: Annotated[
        str, Parameter(help="JSON lines or CSV with a question and, as gold, the document that answers it; a task file")
    ],
    /,
    *,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Choose how words and vectors are fused in an index's search, by questions whose documents are known. What does
    best on some of them is kept, and its recall shown on the others, which are of other documents."""
    from craton.retrieval.index import open_index
    from craton.retrieval.tuning import RECALL_AT, read_questions
    from craton.retrieval.tuning import tune as choose

    asked = read_questions(questions)
    with open_index(name, threads) as opened, status(quiet=json) as say:
        found = choose(opened, asked, say)
    if json:
        print_json({"index": opened.name, **found.as_dict()})
        return
    stdout.print(
        f"[bold]{escape(opened.name)}[/]: {escape(str(found.chosen.fusion))}, before {escape(str(found.replaced))}"
    )
    stdout.print(
        f"  [dim]chosen by {found.chosen.questions} questions: {escape(found.chosen.reason)}[/]", soft_wrap=True
    )
    gain = found.gain
    stdout.print(
        f"recall@{RECALL_AT} on {gain.n} other questions: {found.before.value:.1%} before, {found.after.value:.1%} "
        f"after ({gain.value:+.1%}, 95 %: {gain.low:+.1%} to {gain.high:+.1%})",
        soft_wrap=True,
    )
    if found.left_out:
        stderr.print(f"  [yellow]left out:[/] {found.left_out} questions about what is not in the index")


@index.command
def rm(
    *docs: Annotated[str, Parameter(help="source files as `craton index show` lists them; none: the whole index")],
    index: IndexName = DEFAULT_INDEX,
    json: Json = False,
) -> None:
    """Remove documents from an index, or the index. The files themselves are never touched."""
    from craton.retrieval.index import open_index, remove_index

    if not docs:
        remove_index(index)
    else:
        with open_index(index) as opened:
            opened.collection.remove(docs)
    if json:
        print_json({"index": index, "removed": list(docs) or "all"})
        return
    stderr.print(f"removed {escape(', '.join(docs)) or f'the index [bold]{escape(index)}[/]'}")


@index.command
def show(
    *,
    index: Annotated[str | None, Parameter(name=["--index", "-i"], help="the index's name (none: list all)")] = None,
    json: Json = False,
) -> None:
    """Show an index, or list all."""
    from rich.table import Table

    from craton.retrieval.index import list_indexes, open_index

    names = list_indexes() if index is None else [index]
    facts = []
    for name in names:
        with open_index(name) as opened:
            facts.append(_facts(opened, index is not None))
    if json:
        print_json({"indexes": facts})
        return
    if not facts:
        stderr.print("There is no index. [dim]Make one with: craton index add DOCS[/]")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("index", "documents", "passages", "size", "encoder", "fusion"):
        table.add_column(column)
    for one in facts:
        cells = [one["index"], f"{one['documents']:,}", f"{one['passages']:,}", size(one["bytes"])]
        table.add_row(*cells, one["encoder"], one["fusion"])
    stdout.print(table)
    for source in facts[0].get("sources", ()):
        stdout.print(f"  {escape(source['name'])}  [dim]{source['kind']}[/]", soft_wrap=True)


def absolute(docs: tuple[str, ...]) -> list[str]:
    """The same, to be found from any folder."""
    return [doc if doc.startswith("package:") else os.path.abspath(os.path.expanduser(doc)) for doc in docs]


def _facts(opened: Index, sources: bool) -> dict[str, Any]:
    collection = opened.collection
    facts: dict[str, Any] = {
        "index": opened.name,
        "documents": collection.document_count,
        "passages": collection.chunk_count,
        "bytes": collection.path.stat().st_size,
        "encoder": collection.settings.encoder,
        "fusion": str(collection.fusion or "dense alone"),
        "added": list(collection.origins),
    }
    if sources:
        facts["sources"] = [{"name": one.name, "kind": one.kind} for one in collection.sources()]
    return facts


def _synced(opened: Index, docs: tuple[str, ...], *, prune: bool, json: bool) -> None:
    with status(quiet=json) as say:
        report, reading = opened.sync(docs, prune=prune, on_progress=say)
    named = _failed(report, docs)
    if json:
        print_json(
            {
                "index": opened.name,
                **{
                    key: getattr(report, key)
                    for key in ("added", "changed", "removed", "unchanged", "passages", "embedded")
                },
                "skipped": {**reading.skipped, **{reason: list(names) for reason, names in report.skipped.items()}},
                "documents": opened.collection.document_count,
            }
        )
    else:
        _tell(opened, report, reading)
    if named is not None:
        raise named


def _tell(opened: Index, report: SyncReport, reading: Reading) -> None:
    total = f"{opened.collection.document_count:,} documents, {opened.collection.chunk_count:,} passages"
    stderr.print(f"[bold]{escape(opened.name)}[/]: {escape(str(report))}; now {total}")
    for reason, names in reading.skipped.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        stderr.print(f"  [yellow]skipped, {escape(reason)}:[/] {escape(shown)}")


def _failed(report: SyncReport, docs: tuple[str, ...]) -> CratonError | None:
    """The first error of a file that the user named himself; the good files are in the index all the same."""
    errors = getattr(report, "errors", {})
    return next((error for error in errors.values() if isinstance(error, CratonError)), None)
