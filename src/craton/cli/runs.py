"""`craton runs`: what was trained, how it went, how two runs differ, how a run goes on, and what comes of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import App, Parameter

from craton.cli import run_pages as pages
from craton.cli.options import Json
from craton.cli.terminal import print_json, stderr
from craton.errors import UsageError
from craton.store.cards import loss_name
from craton.store.runs import LOSSES, Run, damaged_runs, remove_run
from craton.store.runs import list_runs as stored_runs

RunId = Annotated[str, Parameter(help="an id or its beginning, a name, or last")]

LOG_LINES: Final = 10
# The verb that goes on with each kind of run.
RESUMERS: Final = {
    "pretrain": "craton.cli.pretrain",
    "pretrain-images": "craton.cli.pretrain_images",
    "pretrain-pairs": "craton.cli.pretrain_pairs",
    "pretrain-masks": "craton.cli.pretrain_masks",
    "pretrain-chat": "craton.cli.pretrain_chat",
    "pretrain-speech": "craton.cli.pretrain_speech",
    "finetune": "craton.cli.finetune",
    "distill": "craton.cli.distill",
    "compare": "craton.cli.compare",
    "quantize": "craton.cli.quantize",
    "prune": "craton.cli.prune",
    "shrink": "craton.cli.shrink",
}

runs = App(name="runs", help="List runs; show, compare, resume, apply or remove them.")


@runs.default
def list_runs(*, json: Json = False) -> None:
    """List every run, the newest first."""
    found, damaged = stored_runs()[::-1], damaged_runs()
    if json:
        print_json({"runs": [_facts(run) for run in found], "damaged": [error.as_dict() for error in damaged]})
        return
    pages.print_list([_facts(run) for run in found])
    for error in damaged:
        stderr.print(f"[red]{stderr.escape(str(error))}[/]")


@runs.command
def show(
    run: RunId,
    /,
    *,
    tensorboard: Annotated[
        Path | None, Parameter(help="write its metrics as TensorBoard's event files into this folder, and nothing else")
    ] = None,
    json: Json = False,
) -> None:
    """Show a run: what it is, its loss as a curve, what was measured, and each setting with its origin."""
    opened = Run.open(run)
    if tensorboard is not None:
        _write_tensorboard(opened, tensorboard, json)
        return
    facts = _facts(opened) | _details(opened)
    if json:
        print_json(facts | {"metrics": opened.metrics(), "events": opened.events()})
        return
    rows = opened.metrics()
    pages.print_facts(facts)
    pages.print_curve("loss", {loss_name(key): points for key, points in _curves(rows).items()})
    pages.print_columns("measured", {key: (value,) for key, value in _measured(opened, rows).items()})
    pages.print_settings(facts["settings"])
    if opened.status in ("failed", "lost"):
        pages.print_log(opened.log_lines(LOG_LINES))


@runs.command
def compare(a: RunId, b: RunId, /, *, json: Json = False) -> None:
    """Compare two runs: the settings that differ, both losses in one plot, and what was measured."""
    pair = (Run.open(a), Run.open(b))
    settings = _differing(*({key: value for key, (value, _) in run.settings().items()} for run in pair))
    around = _differing(*({"kind": run.kind, **run.environment()} for run in pair))
    metrics = [run.metrics() for run in pair]
    measured = _paired(*(_measured(run, rows) for run, rows in zip(pair, metrics, strict=True)))
    if json:
        print_json(
            {
                "runs": [_facts(run) for run in pair],
                "settings": settings,
                "environment": around,
                "metrics": {key: [x, y, _difference(x, y)] for key, (x, y) in measured.items()},
            }
        )
        return
    pages.print_pair([_facts(run) for run in pair])
    pages.print_columns("settings that differ", settings | around, ("A", "B"))
    curves = [_curves(rows) for rows in metrics]
    for key in LOSSES:
        pages.print_curve(loss_name(key), {letter: found[key] for letter, found in zip("AB", curves, strict=True)})
    with_difference = {key: (x, y, pages.signed(_difference(x, y))) for key, (x, y) in measured.items()}
    pages.print_columns("measured", with_difference, ("A", "B", "B - A"), absent="-")


@runs.command
def resume(run: RunId, /) -> None:
    """Go on with a run from its last checkpoint, as if it had never stopped."""
    opened = Run.open(run)
    opened.refuse_if_alive()
    if opened.record.status == "done":
        raise UsageError(f"run {opened.id} is done", remedy=f"see what it made: craton runs show {opened.id}")
    if opened.kind not in RESUMERS:
        raise UsageError(f"a run of kind {opened.kind!r} cannot be resumed", where=str(opened.folder))
    import_module(RESUMERS[opened.kind]).resume_run(opened)


@runs.command
def apply(
    run: RunId,
    /,
    *,
    name: Annotated[str | None, Parameter(help="the result's name in the store (none: the comparison's)")] = None,
    json: Json = False,
) -> None:
    """Publish what a finished comparison recommends, as craton compare --apply does."""
    from craton.cli.compare import told_published
    from craton.compare.application import apply as publish

    made = publish(Run.open(run), name)
    if json:
        print_json({"applied": made.id})
        return
    told_published(made)


@runs.command
def rm(run: RunId, /, *, json: Json = False) -> None:
    """Remove a run with its checkpoints. The models that it published stay."""
    removed = remove_run(run)
    if json:
        print_json({"removed": removed})
        return
    stderr.print(f"removed [bold]{removed}[/]")


def _write_tensorboard(run: Run, folder: Path, json: bool) -> None:
    from craton.training.tensorboard import TensorBoardLog

    with TensorBoardLog(folder / run.id) as log:
        rows = run.metrics()
        for row in rows:
            log.log(row["step"], row)
    if json:
        print_json({"folder": str(folder), "steps": len(rows)})
        return
    command = stderr.escape(f"tensorboard --logdir {shlex.quote(str(folder))}")
    stderr.print(f"{len(rows)} steps written. See them with: [bold]{command}[/]")


def _facts(run: Run) -> dict[str, Any]:
    last, record = run.last_metrics(), run.record
    return {
        "id": run.id,
        "kind": run.kind,
        "name": run.name,
        "status": run.status,
        "step": last.get("step"),
        "total_steps": record.total_steps,
        "loss": last.get("loss"),
        "model": (record.result or {}).get("model"),
        "created": record.created,
        "seconds": round(run.seconds, 3),
    }


def _details(run: Run) -> dict[str, Any]:
    return {
        "command": list(run.record.command),
        "parents": [parent.model_dump() for parent in run.record.parents],
        "result": run.record.result,
        "folder": str(run.folder),
        "environment": run.environment(),
        "settings": {key: {"value": value, "from": origin} for key, (value, origin) in run.settings().items()},
    }


def _measured(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured at the end, before the last numbers of its steps."""
    measured = dict((run.record.result or {}).get("metrics") or {})
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    return measured | {key: value for key, value in last.items() if key not in ("step", "time", *measured)}


def _curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    return {key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in LOSSES}


def _paired(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in {**a, **b}}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (x, y) for key, (x, y) in _paired(a, b).items() if x != y}


def _difference(a: Any, b: Any) -> float | None:
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return b - a if numbers else None
