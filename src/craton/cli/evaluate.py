"""`craton eval`: models measured on tasks."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape

from craton.cli.options import DEFAULT_EMBED_MODEL, KV, DType, Json, Sinks, Threads
from craton.cli.terminal import load_model, print_json, size, status, stderr, stdout
from craton.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from craton.evaluation.intervals import Estimate
    from craton.evaluation.items import Item
    from craton.evaluation.long_context import LongContext
    from craton.evaluation.report import Evaluation
    from craton.evaluation.runner import Row
    from craton.evaluation.tasks import Task
    from craton.prompting.answering import PromptedModel

HARNESS_PREFIX = "harness:"
DRAW_SEED = 0


def evaluate(
    model: Annotated[str, Parameter(help="a name or a path; also an adapter or an application")],
    /,
    *tasks: Annotated[str, Parameter(help="task or data files; .txt: how well it is foretold; harness:NAME; stdlib")],
    baseline: Annotated[str | None, Parameter(help="another model, to compare with on the same items")] = None,
    prompt: Annotated[str | None, Parameter(help="a prompt file or a stored prompt (none: by the task)")] = None,
    limit: Annotated[
        int | None,
        Parameter(help="answer so many items, drawn with a fixed seed; of texts and harness tasks the first"),
    ] = None,
    report: Annotated[Path | None, Parameter(help="write an HTML report here")] = None,
    include: Annotated[Path | None, Parameter(help="a folder with more tasks of lm-evaluation-harness")] = None,
    long_context: Annotated[
        bool,
        Parameter(negative="", help="find a planted fact in long texts; of a .txt file, perplexity by position too"),
    ] = False,
    lengths: Annotated[str | None, Parameter(help="with long-context: lengths of the texts, as 512,1024")] = None,
    stream_window: Annotated[
        int | None, Parameter(help="with long-context: also read the file through a stream window of so many tokens")
    ] = None,
    sinks: Sinks = 4,
    dtype: DType = "auto",
    threads: Threads = None,
    kv: KV = "auto",
    json: Json = False,
) -> None:
    """Measure a model: quality with 95 % intervals over source documents, slices, calibration, latency, of an
    application what it retrieved and whether that proves its answers; and, with a baseline, a paired test."""
    from craton.checkpoints.disk import replace_file
    from craton.evaluation.report import report as html

    if limit is not None and limit < 1:
        raise UsageError(
            f"a limit of {limit}: at least one item has to be answered",
            where="--limit",
            remedy="give a number above 0, or leave it out to answer all items",
        )
    if long_context:
        _long_context(model, tasks, lengths, limit, stream_window, sinks, dtype, threads, kv, json)
        return
    if not tasks:
        raise UsageError("no task to measure", remedy="name task files: craton eval MODEL TASK...")
    if report is not None:
        _check_writable(report)
    found: list[Evaluation] = []
    with status(quiet=json) as say:
        for task in tasks:
            found += _measured(model, task, baseline, prompt, limit, include, dtype, threads, kv, say)
    if json:
        print_json({"evaluations": [one.as_dict() for one in found], "report": str(report) if report else None})
    else:
        for one in found:
            _show(one)
    if report is not None:  # last, so that a disk that is full by now takes no figure away
        replace_file(report, html(found).encode())
        if not json:
            stderr.print(f"report: {escape(str(report))}")


def _check_writable(report: Path) -> None:
    """Refuse a report that cannot be written before anything is measured for it."""
    folder, remedy = report.absolute().parent, "choose another place"
    if not folder.is_dir():
        raise UsageError("there is no such folder for the report", where=str(folder), remedy=f"make it, or {remedy}")
    if report.is_dir():
        raise UsageError("the report is a folder", where=str(report), remedy="name a file")
    if not os.access(folder, os.W_OK):
        raise UsageError("the report's folder cannot be written to", where=str(folder), remedy=remedy)


def _measured(
    model: str,
    name: str,
    baseline: str | None,
    prompt: str | None,
    limit: int | None,
    include: Path | None,
    dtype: str,
    threads: int | None,
    kv: str,
    say: Callable[[str], None],
) -> list[Evaluation]:
    from craton.compare.study import find_task
    from craton.evaluation.paired import paired_difference
    from craton.evaluation.perplexity import text_figures
    from craton.evaluation.report import Evaluation
    from craton.evaluation.tasks import sample

    if name.startswith(HARNESS_PREFIX):
        return _harness(model, name.removeprefix(HARNESS_PREFIX), limit, include, dtype, threads, kv)
    if name.endswith(".txt"):
        loaded = load_model(model, dtype=dtype, threads=threads, kv=kv, quiet=True)
        figures = text_figures(loaded, Path(name), limit=limit, on_progress=say)
        note = "the intervals resample windows of this one text, and do not tell how other texts differ"
        return [Evaluation(Path(name).name, model, figures, "bits_per_byte", notes=(note,))]
    task = find_task(name)
    items = task.test.open()
    if limit is not None and limit < len(items):
        drawn = f"{limit:,} of {len(items):,} test items, drawn with seed {DRAW_SEED}"
        task = replace(task, decisions=(*task.decisions, drawn))
        items = tuple(sample(items, limit, DRAW_SEED))
    one = _answered(model, task, items, prompt, dtype, threads, kv, say)
    if baseline is None:
        return [one]
    other = _answered(baseline, task, items, prompt, dtype, threads, kv, say)
    groups = [row.group for row in one.rows]
    difference = paired_difference([r.score for r in other.rows], [r.score for r in one.rows], groups, score=True)
    return [replace(one, difference=difference, baseline=baseline), other]


def _answered(
    model: str,
    task: Task,
    items: Sequence[Item],
    prompt: str | None,
    dtype: str,
    threads: int | None,
    kv: str,
    say: Callable[[str], None],
) -> Evaluation:
    from craton.compare.application import is_application, open_application
    from craton.evaluation.report import Evaluation
    from craton.evaluation.runner import evaluate as run
    from craton.evaluation.runner import slices, summary
    from craton.prompting.answering import PromptedModel
    from craton.prompting.defaults import default_prompt
    from craton.prompting.examples import ExamplePool
    from craton.prompting.stored import load_prompt
    from craton.retrieval.index import Encoder

    if is_application(model):
        answerer = open_application(model, dtype=dtype, threads=threads).prompted  # type: ignore[arg-type]
    else:
        chosen = load_prompt(prompt) if prompt else default_prompt(task.kind, task.instruction)
        loaded = load_model(model, dtype=dtype, threads=threads, kv=kv, quiet=True)
        pool = ExamplePool(task.train, Encoder(DEFAULT_EMBED_MODEL, threads)) if chosen.examples.count else None
        answerer = PromptedModel(loaded, chosen, choices=task.choices, pool=pool)
    answerer(items[0])  # what is loaded at the first question is no part of its time
    rows = run(
        items, answerer, task.metric, on_progress=lambda done, total: say(f"{model} on {task.name}: {done} of {total}")
    )
    figures = summary(rows, task.metric, kind=task.kind)
    if task.kind == "answer":  # a class is no sentence that a passage could prove
        say(f"{model} on {task.name}: looking for what proves the answers")
        proven = _faithfulness(answerer, items, rows)
        if proven is not None:
            figures["faithfulness"] = proven
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    notes = (*task.decisions, f"peak memory of the whole program: {size(peak)}")
    return Evaluation(
        task.name, model, figures, task.metric, slices(rows, items, task.slices), tuple(rows), notes=notes
    )


def _faithfulness(prompted: PromptedModel, items: Sequence[Item], rows: Sequence[Row]) -> Estimate | None:
    """What share of the answers' sentences the passages prove; None for a model that was shown none."""
    from craton.evaluation.faithfulness import faithfulness
    from craton.retrieval.quotes import Source, cite

    by_id = {item.id: item for item in items}

    def proven(row: Row) -> list[bool]:
        # The passages are found once more, as a row keeps only their names; this is no part of an answer's time.
        _, passages = prompted.read(by_id[row.id])
        sources = [Source(passage.name, 0, len(passage.text), passage.text) for passage in passages]
        return [sentence.quote is not None for sentence in cite(row.answer, row.input, sources)]

    return faithfulness(rows, proven)


def _harness(
    model: str, task: str, limit: int | None, include: Path | None, dtype: str, threads: int | None, kv: str
) -> list[Evaluation]:
    from craton.evaluation.harness import run_harness
    from craton.evaluation.intervals import Estimate
    from craton.evaluation.report import Evaluation

    loaded = load_model(model, dtype=dtype, threads=threads, kv=kv, quiet=True)
    results = run_harness(loaded, [task], limit=limit, include_path=include)
    notes: tuple[str, ...] = ("by lm-evaluation-harness",)
    if limit is not None:
        notes += (f"at most the first {limit:,} items of a task, as the harness takes them",)
    found = []
    for name, metrics in results.items():
        figures = {}
        for metric, one in metrics.items():
            value, error, n = one["value"], one["stderr"], one["n"]
            width = 1.96 * error if error is not None else float("inf")
            figures[metric] = Estimate(value, value - width, value + width, n, n, "harness")
        if figures:  # a group of tasks may have none of its own
            found.append(Evaluation(name, model, figures, next(iter(figures)), notes=notes))
    return found


def _long_context(
    model: str,
    texts: Sequence[str],
    lengths: str | None,
    limit: int | None,
    stream_window: int | None,
    sinks: int,
    dtype: str,
    threads: int | None,
    kv: str,
    json: bool,
) -> None:
    from craton.evaluation.long_context import measure
    from craton.inference.streaming import StreamWindow

    if len(texts) > 1:
        raise UsageError("one text is read by position", remedy="name one .txt file, or none")
    try:
        asked = [int(part) for part in lengths.split(",")] if lengths is not None else None
    except ValueError:
        raise UsageError(f"{lengths!r} is no list of lengths", where="--lengths", remedy="as in 512,1024") from None
    stream = StreamWindow(stream_window, sinks) if stream_window is not None else None
    loaded = load_model(model, dtype=dtype, threads=threads, kv=kv, quiet=True)
    with status(quiet=json) as say:
        found = measure(
            loaded, Path(texts[0]) if texts else None, lengths=asked, limit=limit, stream=stream, on_progress=say
        )
    if json:
        print_json(found.as_dict())
    else:
        _show_long_context(found)


def _show_long_context(found: LongContext) -> None:
    from rich.table import Table

    stdout.print(f"[bold]{escape(found.model)}[/]: a fact planted in a text (rank 1 is best, 5.5 is chance)")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("tokens", "depth", "found", "mean rank", "trials"):
        table.add_column(column, justify="right")
    for cell in found.needle:
        row = (f"{cell.length:,}", f"{cell.depth:.0%}", f"{cell.found:.0%}", f"{cell.rank:.1f}", str(cell.trials))
        table.add_row(*row)
    stdout.print(table)
    for title, bins in (("its window", found.positions), ("the text, read through the stream window", found.streamed)):
        if bins:
            stdout.print(f"\nperplexity of {escape(str(found.text))} by position in {title}")
            table = Table(box=None, pad_edge=False, header_style="dim")
            for column in ("tokens", "perplexity", "n"):
                table.add_column(column, justify="right")
            for one in bins:
                table.add_row(f"{one.first:,} to {one.last - 1:,}", f"{one.perplexity:.1f}", f"{one.tokens:,}")
            stdout.print(table)


def _show(one: Evaluation) -> None:
    from rich.table import Table

    from craton.evaluation.report import figure_text

    stdout.print(f"\n[bold]{escape(one.model)}[/] on [bold]{escape(one.task)}[/]")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("figure")
    for column in ("value", "95 % interval", "n"):
        table.add_column(column, justify="right")
    for name, figure in one.figures.items():
        table.add_row(name.replace("_", " "), *figure_text(name, figure), f"{figure.n:,}")
    stdout.print(table)
    for name, values in one.slices.items():
        line = ", ".join(f"{value} {figure_text(one.metric, e)[0]} (n = {e.n})" for value, e in values.items())
        stdout.print(f"  [dim]by {escape(name)}: {escape(line)}[/]", soft_wrap=True)
    if one.difference is not None:
        d = one.difference
        says = "better" if d.low > 0 else ("worse" if d.high < 0 else "cannot be told apart")
        stdout.print(
            f"[bold]{says}[/]: {d.value:+.1%} against {escape(str(one.baseline))} "
            f"(95 %: {d.low:+.1%} to {d.high:+.1%}, p = {d.p:.2g}, paired)"
        )
    for note in one.notes:
        stdout.print(f"  [dim]{escape(note)}[/]", soft_wrap=True)
