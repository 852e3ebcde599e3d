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
    from craton.store.runs import Run

REPORT_NAME = "report.html"

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
    """
    from craton.compare.study import compare as run_comparison
    from craton.config.resolve import FLAGS, read_toml, resolve

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    layers.append((FLAGS, given(settings)))
    chosen, provenance = resolve(CompareSettings, layers)
    _followed(lambda watch: run_comparison(task, chosen, provenance, watch), apply, report, json)


def resume_run(run: Run) -> None:
    """Go on with a comparison."""
    from craton.compare.study import resume

    _followed(lambda watch: resume(run, watch), False, None, False)


def _followed(start: Callable[[Watch], Comparison], apply: bool, report: Path | None, json: bool) -> None:
    from craton.checkpoints.disk import replace_file
    from craton.compare.application import apply as publish
    from craton.compare.report import report as html
    from craton.compare.study import Watch

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
                stderr.print(f"stopped; every answer so far is kept. Go on with: craton runs resume {begun[0].id}")
            raise
    page = html(found).encode()
    path = found.run.folder / REPORT_NAME
    replace_file(path, page)
    if report is not None:
        replace_file(report, page)
    made = publish(found) if apply else None
    if json:
        print_json(found.as_dict() | {"report": str(path), "applied": made.id if made else None})
        return
    show(found)
    stdout.print(f"\nreport: {escape(str(report or path))}", soft_wrap=True)
    if made is not None:
        stdout.print(f"published: [bold]{escape(made.id)}[/]  try: craton chat {escape(made.name)}", soft_wrap=True)


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
