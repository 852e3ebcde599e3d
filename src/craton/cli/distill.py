"""`craton distill`: a smaller model learns what a larger one thinks of every next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.pretrain import DryRun, Recipe, Sample
from craton.cli.training import followed, show_result
from craton.compression.distill_settings import USUAL, DistillSettings

if TYPE_CHECKING:
    from craton.store.runs import Run


def distill(
    teacher: Annotated[str, Parameter(help="the model to learn from: a name or a path")],
    student: Annotated[
        str,
        Parameter(
            help="the model that learns: a name, a path, or cut from the teacher: depth:0.75 keeps so many of its "
            "layers, width:0.5 of its feed-forward's channels"
        ),
    ],
    /,
    *data: Annotated[str, Parameter(help="text or chats: files, folders, patterns, hf:org/name[:split], or shards")],
    recipe: Recipe = None,
    dry_run: DryRun = False,
    sample: Sample = None,
    json: Json = False,
    settings: Flags[DistillSettings] | None = None,
) -> None:
    """Distil a model into a smaller one, or heal one that was pruned: it is trained on the teacher's distributions of
    the next token.

    The teacher reads the data once; what it thinks is kept in the run. Stopped at any time, a run goes on with: craton
    runs resume ID
    """
    from craton.compression.distill import distill as run_distillation
    from craton.config.resolve import FLAGS, read_toml, resolve

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    usual = ("usual for distillation", USUAL)
    chosen, provenance = resolve(DistillSettings, [usual, *layers, (FLAGS, given(settings))])
    with followed(json, sample) as hooks:
        result = run_distillation(teacher, student, data, chosen, provenance, hooks, dry_run=dry_run)
    if result is not None:
        show_result(result, json)


def resume_run(run: Run) -> None:
    """Go on with a distillation."""
    from craton.compression.distill import resume

    with followed(json=False) as hooks:
        result = resume(run, hooks)
    show_result(result, json=False)
