"""The pages of `craton runs` for people: tables, curves and facts, in colours where the terminal has them."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from json import dumps
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from craton.cli.plots import Point, curve, number_text
from craton.cli.terminal import stderr, stdout
from craton.config.resolve import DEFAULT
from craton.store.cards import duration

STATUS_STYLES: Final = {
    "done": "green",
    "running": "cyan",
    "queued": "dim",
    "interrupted": "yellow",
    "failed": "red",
    "lost": "red",
}
CURVE_STYLES: Final = ("cyan", "magenta")
CURVE_LINES: Final = 14
WIDEST: Final = 110  # columns; what is longer is hard to follow
SHORTEST_ID: Final = 8


def print_list(runs: Sequence[Mapping[str, Any]]) -> None:
    """One line for each run."""
    if not runs:
        stderr.print("There are no runs yet. [dim]Start one with craton pretrain or craton finetune[/]")
        return
    short = short_ids(run["id"] for run in runs)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("run", "kind", "name", "status", "step", "loss", "when", "took"):
        right = column in ("step", "loss", "took")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "name", overflow="fold")
    for run in runs:
        table.add_row(
            f"[bold]{short[run['id']]}[/]",
            escape(run["kind"]),
            escape(run["name"] or ""),
            _status(run),
            _steps(run),
            "" if run["loss"] is None else number_text(run["loss"]),
            f"[dim]{_ago(run['created'])}[/]",
            duration(run["seconds"]),
        )
    stdout.print(table)
    for run in runs:
        if run["status"] == "lost":
            stderr.print(f"[red]{short[run['id']]} is lost:[/] {_rescue(short[run['id']])}")


def print_facts(run: Mapping[str, Any]) -> None:
    """What a run is, made of and made."""
    name = f"  {escape(run['name'])}" if run["name"] else ""
    stdout.print(f"[bold]{run['id']}[/]{name}", soft_wrap=True)
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["created"]))
    facts: list[tuple[str, str | None]] = [
        ("status", _status(run) + (f": {_rescue(run['id'])}" if run["status"] == "lost" else "")),
        ("kind", escape(run["kind"])),
        ("steps", _steps(run) or "none yet"),
        ("created", f"{created}, {_ago(run['created'])}"),
        ("took", duration(run["seconds"]) if run["seconds"] else None),
        ("command", escape(shlex.join(run["command"]))),
        *((parent["relation"].replace("_", " "), escape(parent["name"])) for parent in run["parents"]),
        ("made", f"[bold]{escape(run['model'] or '')}[/]" if run["model"] else None),
        *_error(run["result"] or {}),
        ("with", escape(_environment(run["environment"]))),
        ("folder", escape(run["folder"])),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in facts:
        if value is not None:
            table.add_row(key, value)
    stdout.print(table)


def print_pair(runs: Sequence[Mapping[str, Any]]) -> None:
    """The two runs of a comparison and the letters that stand for them."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for letter, run, style in zip("AB", runs, CURVE_STYLES, strict=True):
        facts = (run["id"], run["kind"], run["name"] or "")
        status = (_status(run), _steps(run), duration(run["seconds"]))
        table.add_row(f"[bold {style}]{letter}[/]", *map(escape, facts), *status)
    stdout.print(table)


def print_columns(
    title: str, rows: Mapping[str, Sequence[Any]], columns: Sequence[str] = ("",), *, absent: str = "none"
) -> None:
    """A table of values by name, with a heading for each column; `absent` stands for values that are None."""
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, overflow="fold")
    for i, column in enumerate(columns):
        style = CURVE_STYLES[i] if len(columns) > 1 and i < len(CURVE_STYLES) else ""
        table.add_column(f"[{style}]{column}[/]" if style else column, justify="right", overflow="fold")
    for key, values in rows.items():
        table.add_row(f"[dim]{escape(key)}[/]", *(escape(absent if v is None else _text(v)) for v in values))
    stdout.print()
    stdout.print(table)


def print_settings(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Each setting with its origin; what the user did not choose is dimmed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("settings", "", "from"):
        table.add_column(column, overflow="fold")
    for key, setting in settings.items():
        value = "none" if setting["value"] is None else _text(setting["value"])
        chosen = setting["from"] != DEFAULT
        table.add_row(escape(key), escape(value), escape(setting["from"]), style="" if chosen else "dim")
    if settings:
        stdout.print()
        stdout.print(table)


def print_curve(title: str, series: Mapping[str, Sequence[Point]]) -> None:
    """The series that have points, in one plot."""
    styles = [style for style, points in zip(CURVE_STYLES, series.values(), strict=True) if points]
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return
    coloured = stdout.color_system is not None and not stdout.no_color
    log_x = falls_early(next(iter(drawn.values())))
    text = curve(drawn, min(stdout.width, WIDEST), CURVE_LINES, log_x=log_x, styles=styles if coloured else ())
    stdout.print(f"\n[bold]{title}[/]")
    stdout.print(text, soft_wrap=True)


def print_log(lines: Sequence[str]) -> None:
    """The end of a log."""
    if lines:
        stdout.print("\n[bold]end of the log[/]")
        stdout.print("\n".join(lines), markup=False, soft_wrap=True)


def falls_early(points: Sequence[Point]) -> bool:
    """Whether most of the way down is in the first tenth, where a linear axis shows a cliff and then nothing."""
    (first_x, first), (last_x, _) = points[0], points[-1]
    early = min(y for x, y in points if x <= first_x + (last_x - first_x) / 10)
    fall = first - min(y for _, y in points)
    return 0 < 20 * first_x < last_x and fall > 0 and first - early > 0.6 * fall


def short_ids(ids: Iterable[str]) -> dict[str, str]:
    """For each id, its shortest beginning that no other has."""
    ordered = sorted(set(ids))
    alike = [0, *(_alike(a, b) for a, b in pairwise(ordered)), 0]
    return {run_id: run_id[: max(SHORTEST_ID, alike[i] + 1, alike[i + 1] + 1)] for i, run_id in enumerate(ordered)}


def _alike(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def signed(difference: float | None) -> str | None:
    """A difference with its sign."""
    return None if difference is None else ("+" if difference > 0 else "") + number_text(difference)


def _status(run: Mapping[str, Any]) -> str:
    return f"[{STATUS_STYLES[run['status']]}]{run['status']}[/]"


def _rescue(run_id: str) -> str:
    return f"its process is gone; resume with [bold]craton runs resume {run_id}[/]"


def _steps(run: Mapping[str, Any]) -> str:
    step, total = run["step"], run["total_steps"]
    if step is None:
        return ""
    return f"{step}/{total}" if total else str(step)


def _ago(moment: float) -> str:
    seconds = time.time() - moment
    if seconds < 60:
        return "just now"
    return " ".join(duration(seconds).split()[:2]) + " ago"


def _error(result: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    error = result.get("error") or {}
    what = f"[red]{escape(error['what'])}[/]" if error else None
    return [("error", what), *((key, escape(error[key])) for key in ("where", "remedy") if error.get(key))]


def _environment(facts: Mapping[str, Any]) -> str:
    versions = f"Craton {facts['craton']}, torch {facts['torch']}, Python {facts['python']}"
    return f"{versions} on {facts['cpu']}, {facts['threads']} threads"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return number_text(value)
    return value if isinstance(value, str) else dumps(value, ensure_ascii=False)
