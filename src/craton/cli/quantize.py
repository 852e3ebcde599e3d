"""`craton quantize`: a model's matrices as integers of few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.pretrain import Recipe
from craton.cli.terminal import print_json, size, status, stderr
from craton.compression.quantize_settings import QuantizeSettings

if TYPE_CHECKING:
    from craton.compression.job import Outcome, Watch
    from craton.store.runs import Run

WORST = 3  # matrices that are shown


def quantize(
    model: Annotated[str, Parameter(help="a name or a path")],
    /,
    *,
    name: Annotated[str, Parameter(help="the result's name in the store")],
    recipe: Recipe = None,
    json: Json = False,
    settings: Flags[QuantizeSettings] | None = None,
) -> None:
    """Store a model's matrices with 8, 4, 3 or 2 bits a weight, block by block, so that it need not fit the memory.

    What was written is read again, compared, and measured on what was held out before it counts. A model that sees or
    hears needs pictures or recordings for that: --calibration FOLDER. Stopped at any time, it goes on behind the last
    whole block with: craton runs resume ID
    """
    from craton.compression.quantize import quantize as run_quantizing
    from craton.config.resolve import FLAGS, read_toml, resolve

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    layers.append((FLAGS, given(settings)))
    chosen, provenance = resolve(QuantizeSettings, layers)
    outcome = followed(lambda watch: run_quantizing(model, chosen, provenance, name, watch), json)
    _report(outcome, json)


def resume_run(run: Run) -> None:
    """Go on with a run of `craton quantize`."""
    from craton.compression.quantize import resume

    _report(followed(lambda watch: resume(run, watch), json=False), json=False)


def followed(start: Callable[[Watch], Outcome], json: bool) -> Outcome:
    """Run a job and show how it goes on. On an interrupt, how to go on."""
    from craton.compression.job import Watch

    begun: list[Run] = []
    with status(quiet=json) as say:

        def on_begin(run: Run, decided: list[str]) -> None:
            begun.append(run)
            if not json:
                stderr.print(f"[bold]run[/] {run.id}")
                for line in decided:
                    stderr.print(f"  [dim]· {stderr.escape(line)}[/]")

        try:
            return start(Watch(on_begin=on_begin, on_progress=say))
        except KeyboardInterrupt:
            if begun:
                stderr.print(f"stopped; finished blocks are kept. Go on with: craton runs resume {begun[0].id}")
            raise


def show_outcome(outcome: Outcome, sizes: str) -> None:
    """What came of a job, for people."""
    measured = outcome.measured.as_dict()
    stderr.print(f"[bold green]done[/] in {outcome.seconds:.0f} s")
    stderr.print(f"  [bold]size[/]        {sizes}")
    if "loss_after" in measured:
        change = measured["perplexity_after"] / measured["perplexity_before"] - 1
        figures = (
            f"perplexity {measured['perplexity_before']:.4g} before, {measured['perplexity_after']:.4g} after "
            f"({change:+.1%}); loss {measured['loss_before']:.4f} and {measured['loss_after']:.4f} nats a token"
        )
    else:
        figures = f"vectors: cosine {measured['cosine']:.5f} to those before"
    if "text_cosine" in measured:
        figures += f"; of texts {measured['text_cosine']:.5f}"
    stderr.print(f"  [bold]measured[/]    {figures}")
    stderr.print(f"              on {stderr.escape(_judged_on(outcome.calibration))}")
    stderr.print(f"  [bold]checked[/]     read again: outputs differ by {outcome.difference:.1e} from what was made")
    for note in outcome.notes:
        stderr.print(f"  [yellow]note:[/]       {stderr.escape(note)}")
    stderr.print(f"  [bold]model[/]       {stderr.escape(outcome.model)}")


def _judged_on(facts: Mapping[str, Any]) -> str:
    """What was held out, of the facts of what calibrated."""
    if "pictures" in facts:
        texts = ""
        if "captions" in facts:
            texts = f" and {facts['held_out_texts']} {'captions' if facts['captions'] else 'plain sentences'}"
        return f"{facts['held_out_pictures']} held-out pictures of {', '.join(facts['pictures'])}{texts}"
    if "sounds" in facts:
        where = ", ".join(facts["sounds"])
        return f"what the model wrote of {facts['held_out_sounds']} held-out recordings of {where}"
    where = facts["text"] if isinstance(facts["text"], str) else ", ".join(facts["text"])
    return f"{facts['held_out_windows']} held-out windows of {facts['window']} tokens of {where}"


def _report(outcome: Outcome, json: bool) -> None:
    if json:
        print_json(outcome.as_dict())
        return
    show_outcome(
        outcome,
        f"{size(outcome.bytes_before)} before, {size(outcome.bytes_after)} after; {outcome.bits:.2f} bits a weight in "
        f"{len(outcome.rows)} matrices",
    )
    worst = sorted(outcome.rows, key=lambda row: -(row["output_error"] or row["weight_error"]))[:WORST]
    shown = ", ".join(f"{row['matrix']} {row['output_error'] or row['weight_error']:.1%}" for row in worst)
    stderr.print(f"  [bold]worst[/]       {stderr.escape(shown)} [dim](relative error; all of them: --json)[/]")
