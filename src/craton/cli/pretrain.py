"""`craton pretrain`: a model from text, from nothing or from a model that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.training import followed, show_result
from craton.pretraining.settings import PretrainSettings

if TYPE_CHECKING:
    from craton.store.runs import Run

Recipe = Annotated[Path | None, Parameter(name=["--recipe", "-r"], help="a TOML file of settings; flags go before it")]
DryRun = Annotated[bool, Parameter(negative="", help="prepare, estimate and stop before the first step")]
Sample = Annotated[str | None, Parameter(help="a text to continue now and then, to see what has been learnt")]


def pretrain(
    *data: Annotated[str, Parameter(help="files, folders, patterns, hf:org/name[:split], or one folder of shards")],
    recipe: Recipe = None,
    dry_run: DryRun = False,
    sample: Sample = None,
    json: Json = False,
    settings: Flags[PretrainSettings] | None = None,
) -> None:
    """Train a language model (or, with --objective masked-token, an encoder) on text and put it into the store.

    One dial, --size, picks shape, batch, learning rate and tokens by published scaling laws; every choice is shown and
    can be overruled. Stopped at any time, a run goes on with: craton runs resume ID
    """
    from craton.config.resolve import FLAGS, read_toml, resolve
    from craton.pretraining.pretrain import pretrain as run_pretraining

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    chosen, provenance = resolve(PretrainSettings, [*layers, (FLAGS, given(settings))])
    with followed(json, sample) as hooks:
        result = run_pretraining(data, chosen, provenance, hooks, dry_run=dry_run)
    if result is not None:
        show_result(result, json)


def resume_run(run: Run) -> None:
    """Go on with a pretraining run."""
    from craton.pretraining.pretrain import resume

    with followed(json=False) as hooks:
        result = resume(run, hooks)
    show_result(result, json=False)
