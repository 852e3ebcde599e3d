"""`craton shrink`: how small can a model be for a task? A ladder, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.pretrain import Recipe
from craton.cli.terminal import print_json, status, stderr, stdout
from craton.compression.shrink_settings import ShrinkSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from craton.compression.shrink import Shrunk, Watch
    from craton.store.runs import Run

REPORT_NAME = "report.html"


def shrink(
    model: Annotated[str, Parameter(help="a name or a path")],
    /,
    *,
    task: Annotated[str, Parameter(help="a task file or a data file: what the model is to stay good at")],
    recipe: Recipe = None,
    report: Annotated[Path | None, Parameter(help="also write the HTML report here")] = None,
    json: Json = False,
    settings: Flags[ShrinkSettings] | None = None,
) -> None:
    """Try smaller forms of a model (fewer bits, fewer layers with distillation, both), measure each on the task, on
    text and on this machine, and publish the one to take. Ends with 1 where none is shown to keep the quality.

    Stopped at any time, it goes on with: craton runs resume ID
    """
    from craton.compression.shrink import shrink as run_ladder
    from craton.config.resolve import FLAGS, read_toml, resolve

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    layers.append((FLAGS, given(settings)))
    chosen, provenance = resolve(ShrinkSettings, layers)
    _followed(lambda watch: run_ladder(model, task, chosen, provenance, watch), report, json)


def resume_run(run: Run) -> None:
    """Go on with a ladder."""
    from craton.compression.shrink import resume

    _followed(lambda watch: resume(run, watch), None, False)


def _followed(start: Callable[[Watch], Shrunk], report: Path | None, json: bool) -> None:
    from craton.checkpoints.disk import replace_file
    from craton.compression.shrink import Watch
    from craton.compression.shrink_report import report as html

    begun: list[Run] = []
    with status(quiet=json) as say:

        def on_plan(run: Run, lines: Sequence[str]) -> None:
            begun.append(run)
            if not json:
                stderr.print(f"[bold]run[/] {run.id}")
                for line in lines:
                    stderr.print(f"  [dim]· {escape(line)}[/]")

        try:
            found = start(Watch(on_plan=on_plan, on_progress=say))
        except KeyboardInterrupt:
            if begun:
                stderr.print(f"stopped; what was made is kept. Go on with: craton runs resume {begun[0].id}")
            raise
    page = html(found).encode()
    path = found.run.folder / REPORT_NAME
    replace_file(path, page)
    if report is not None:
        replace_file(report, page)
    if json:
        print_json(found.as_dict() | {"report": str(path)})
    else:
        _show(found)
        stdout.print(f"\nreport: {escape(str(report or path))}", soft_wrap=True)
        if found.model is not None:
            stdout.print(f"published: [bold]{escape(found.model.id)}[/]", soft_wrap=True)
    if found.model is None:
        raise SystemExit(1)


def _show(found: Shrunk) -> None:
    from rich.table import Table

    from craton.compression.pareto import front
    from craton.compression.shrink_report import confirmation, megabytes

    best = {rung.label for rung in front(found.rungs)}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", no_wrap=True)
    for column in (found.task.metric.replace("_", " "), "95 %", "bits/byte", "disk", "memory", "prefill", "decode"):
        table.add_column(column, justify="right", no_wrap=True)
    for rung in found.rungs:
        f, q = rung.footprint, rung.quality
        style = "bold green" if rung.label == found.choice.chosen.label else ""
        table.add_row(
            f"{'●' if rung.label in best else ' '} {rung.label}",
            f"{q.value:.1%}",
            f"{100 * q.low:.0f} to {100 * q.high:.0f}",
            f"{rung.bits_per_byte.value:.3f}",
            megabytes(f.disk),
            megabytes(f.memory),
            f"{f.prefill:,.0f}/s",
            f"{f.decode:,.0f}/s",
            style=style,
        )
    stdout.print()
    stdout.print(table)
    stdout.print("[dim]● on the Pareto front: no other is better in quality, bytes and speed[/]")
    stdout.print(f"\n[bold]{escape(found.choice.sentence)}[/]", soft_wrap=True)
    stdout.print(escape(confirmation(found)), soft_wrap=True)
