"""`craton finetune`: a model learns a task from a user's data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.pretrain import DryRun, Recipe, Sample
from craton.cli.training import followed, show_result
from craton.finetuning.settings import FinetuneSettings

if TYPE_CHECKING:
    from craton.store.runs import Run


def finetune(
    model: Annotated[str, Parameter(help="a name or a path")],
    /,
    *data: Annotated[str, Parameter(help="files, folders, patterns, or hf:org/name[:split]")],
    recipe: Recipe = None,
    dry_run: DryRun = False,
    sample: Sample = None,
    json: Json = False,
    settings: Flags[FinetuneSettings] | None = None,
) -> None:
    """Fine-tune a model: chats and answers (sft), classes, text vectors, preferences (dpo, orpo, kto).

    The result is an adapter in PEFT's format (or, with --method full, a model). What is trained on can be seen before:
    craton data inspect DATA --model MODEL. Stopped at any time, a run goes on with: craton runs resume ID
    """
    from craton.config.resolve import FLAGS, read_toml, resolve
    from craton.finetuning.finetune import finetune as run_finetuning
    from craton.finetuning.settings import usual

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    layers.append((FLAGS, given(settings)))
    first, _ = resolve(FinetuneSettings, layers)  # what is usual depends on task and method
    usually = (f"usual for {first.task}, {first.method}", usual(first.task, first.method))
    chosen, provenance = resolve(FinetuneSettings, [usually, *layers])
    with followed(json, sample) as hooks:
        result = run_finetuning(model, data, chosen, provenance, hooks, dry_run=dry_run)
    if result is not None:
        show_result(result, json)


def resume_run(run: Run) -> None:
    """Go on with a fine-tuning run."""
    from craton.finetuning.finetune import resume

    with followed(json=False) as hooks:
        result = resume(run, hooks)
    show_result(result, json=False)
