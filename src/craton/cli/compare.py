"""`craton compare`: prompt, retrieve or fine-tune, decided by measurement on the user's own task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.pretrain import Recipe
from craton.cli.terminal import print_json, status, stderr, stdout
from craton.compare.settings import CompareSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from craton.compare.study import Comparison, Watch
    from craton.store.models import StoredModel
    from craton.store.runs import Run

Apply = Annotated[bool, Parameter(negative="", help="publish the recommended way as a named model to chat with")]
ReportPath = Annotated[Path | None, Parameter(name="--report", help="also write the HTML report here")]


def compare(
    task: Annotated[str, Parameter(help="a task file, a data file, or stdlib: questions about Python's library")],
    /,
    *,
    recipe: Recipe = None,
    apply: Apply = False,
    report: ReportPath = None,
    json: Json = False,
    settings: Flags[CompareSettings] | None = None,
) -> None:
    """Compare the ways to adapt a model on a task: as it is, with the best prompt, with retrieved texts, fine-tuned,
    and fine-tuned with retrieved texts; on one split, one model and equal budgets; and recommend one.

    Stopped at any time, a comparison goes on with: craton runs resume ID
    What a finished one recommends is published by --apply, or later with: craton runs apply ID
    """
    from craton.compare.study import compare as run_comparison
    from craton.config.resolve import FLAGS, read_toml, resolve

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    layers.append((FLAGS, given(settings)))
    chosen, provenance = resolve(CompareSettings, layers)
    _followed(lambda watch: run_comparison(task, chosen, provenance, watch, publish=apply, report=report), json)


def resume_run(run: Run) -> None:
    """Go on with a comparison, its --apply and --report included."""
    from craton.compare.study import resume

    _followed(lambda watch: resume(run, watch), False)


def _followed(start: Callable[[Watch], Comparison], json: bool) -> None:
    from craton.compare.study import REPORT_NAME, Watch, wished_report

    begun: list[Run] = []
    with status(quiet=json) as say:

        def on_plan(run: Run, lines: Sequence[str]) -> None:
            begun.append(run)
            if not json:
                stderr.print(f"[bold]run[/] {run.id}")
                for line in lines:
                    stderr.print(f"  [dim]· {escape(line)}[/]")

        watch = Watch(on_plan=on_plan, on_progress=say)
        try:
            found = start(watch)
        except KeyboardInterrupt:
            if begun:
                said = "what is ready and every answer to the test are kept"
                stderr.print(f"stopped; {said}. Go on with: craton runs resume {begun[0].id}")
            raise
    path = found.run.folder / REPORT_NAME
    if json:
        applied = found.model.id if found.model is not None else None
        print_json(found.as_dict() | {"report": str(path), "applied": applied})
        return
    show(found)
    stdout.print(f"\nreport: {escape(str(wished_report(found.run) or path))}", soft_wrap=True)
    if found.model is not None:
        told_published(found.model)
    else:
        stdout.print(f"[dim]publish it with: craton runs apply {found.run.id}[/]", soft_wrap=True)


def told_published(model: StoredModel) -> None:
    """Say what was published, and how to try it."""
    stdout.print(f"published: [bold]{escape(model.id)}[/]  try: craton chat {escape(model.id)}", soft_wrap=True)


def show(found: Comparison) -> None:
    """The table and the verdict, for people."""
    from rich.table import Table

    from craton.compare.verdict import seconds

    metric, verdict = found.task.metric, found.verdict
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("way", no_wrap=True)
    for column in (metric.replace("_", " "), "95 %", "p50", "p95", "set-up", "10k asked"):
        table.add_column(column, justify="right", no_wrap=True)
    for m in found.measurements:
        quality, f = verdict.quality[m.label], m.figures
        asked = m.label != "majority"
        style = "bold green" if m.label == verdict.recommended else ("dim" if m.diagnostic else "")
        table.add_row(
            m.label,
            f"{quality.value:.1%}",
            f"{100 * quality.low:.0f} to {100 * quality.high:.0f}",
            seconds(f["latency_p50"].value) if asked else "–",
            seconds(f["latency_p95"].value) if asked else "–",
            seconds(m.recipe.setup) if m.recipe else "–",
            seconds(verdict.totals[m.label][10_000]) if m.label in verdict.totals else "–",
            style=style,
        )
    stdout.print()
    stdout.print(table)
    stdout.print(f"\n[bold]{escape(verdict.sentence)}[/]", soft_wrap=True)
    stdout.print(escape(verdict.margin), soft_wrap=True)
    if verdict.flips:
        stdout.print("[dim]What would flip it:[/]")
        for flip in verdict.flips:
            stdout.print(f"  [dim]· {escape(flip)}[/]", soft_wrap=True)
    if verdict.break_evens:
        stdout.print("[dim]What a dearer set-up is worth:[/]")
        for one in verdict.break_evens:
            stdout.print(f"  [dim]· {escape(one.sentence)}[/]", soft_wrap=True)
