"""`craton prune`: a model with fewer weights: single ones as zeros, or whole layers, heads, channels and tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.quantize import followed, show_outcome
from craton.cli.terminal import print_json, size, status, stderr
from craton.compression.quantize_settings import PruneSettings
from craton.compression.structured_settings import StructuredSettings
from craton.errors import UsageError

if TYPE_CHECKING:
    from craton.compression.job import Outcome
    from craton.compression.structured import StructuredResult
    from craton.store.runs import Run

TEXT = ("calibration", "samples", "window", "seed")  # settings that both ways have


def prune(
    model: Annotated[str, Parameter(help="a name or a path")],
    /,
    *,
    name: Annotated[str, Parameter(help="the result's name in the store")],
    json: Json = False,
    settings: Flags[PruneSettings] | None = None,
    structured: Flags[StructuredSettings] | None = None,
) -> None:
    """Remove weights from a model: single ones (--sparsity, --method), or whole parts (--layers, --heads, --channels,
    --vocab), which make it smaller and faster everywhere.

    What was written is read again and measured on what was held out before it counts: text, or for single weights of a
    model that sees or hears, pictures or recordings (--calibration FOLDER). Single weights go block by block, and
    a run that was stopped goes on with: craton runs resume ID
    """
    values, parts = given(settings), given(structured)
    if parts:
        odd = sorted(set(values) - set(TEXT))
        if odd:
            flags = ", ".join(f"--{key}" for key in odd)
            raise UsageError(
                f"{flags} is for single weights, --{next(iter(parts))} for whole parts",
                remedy="prune twice: first one, then the other",
            )
        _structured(model, parts, values, name, json)
        return
    from craton.compression.prune import prune as run_pruning
    from craton.config.resolve import FLAGS, resolve

    chosen, provenance = resolve(PruneSettings, [(FLAGS, values)])
    _report(followed(lambda watch: run_pruning(model, chosen, provenance, name, watch), json), json)


def resume_run(run: Run) -> None:
    """Go on with a run of `craton prune`. Raises UsageError for one that removed whole parts."""
    from craton.compression.prune import resume

    if "sparsity" not in run.config()["settings"]:
        raise UsageError("a run that removes whole parts starts anew", where=str(run.folder))
    _report(followed(lambda watch: resume(run, watch), json=False), json=False)


def _structured(model: str, parts: dict[str, Any], text: dict[str, Any], name: str, json: bool) -> None:
    from craton.compression.structured import prune_structured
    from craton.config.resolve import FLAGS, resolve

    resolve(PruneSettings, [(FLAGS, text)])  # refuses what is out of range
    chosen, _ = resolve(StructuredSettings, [(FLAGS, parts)])
    options = {key: text[key] for key in ("samples", "window", "seed") if key in text}
    with status(quiet=json) as say:
        result = prune_structured(
            model, chosen, name=name, sources=text.get("calibration", ()), on_progress=say, **options
        )
    _report_parts(result, json)


def _report(outcome: Outcome, json: bool) -> None:
    if json:
        print_json(outcome.as_dict())
        return
    zeros, weights = outcome.facts["zeros"], sum(row["weights"] for row in outcome.rows)
    show_outcome(
        outcome,
        f"{zeros:.1%} zeros in {len(outcome.rows)} matrices of {weights / 1e6:.4g}M weights; "
        f"{size(outcome.bytes_before)} before, {size(outcome.bytes_after)} after",
    )


def _report_parts(result: StructuredResult, json: bool) -> None:
    from dataclasses import asdict
    from math import exp

    if json:
        print_json(asdict(result))
        return
    (loss_before, loss_after), (before, after) = result.loss, result.parameters
    stderr.print("[bold green]done[/]")
    stderr.print(f"  [bold]parameters[/]  {before / 1e6:.4g}M before, {after / 1e6:.4g}M after")
    stderr.print(f"  [bold]size[/]        {size(result.bytes[0])} before, {size(result.bytes[1])} after")
    stderr.print(
        f"  [bold]measured[/]    perplexity {exp(loss_before):.4g} before, {exp(loss_after):.4g} after (held-out text)"
    )
    for what, (slow, fast) in {"decode": result.decode, "prefill": result.prefill}.items():
        if slow and fast:
            stderr.print(f"  [bold]{what:<11}[/] {slow:,.0f} tokens/s before, {fast:,.0f} after")
    for decision in result.decisions:
        stderr.print(f"  [dim]· {stderr.escape(decision)}[/]")
    stderr.print(f"  [bold]model[/]       {stderr.escape(result.model)}")
