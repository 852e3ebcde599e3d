"""`craton pretrain-masks`: a model that segments what a click or a box means, from exact masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.pretrain import DryRun, Recipe
from craton.cli.training import followed, show_result
from craton.pretraining.masks.settings import USUAL, MaskPretrainSettings

if TYPE_CHECKING:
    from craton.store.runs import Run


def pretrain_masks(
    *data: Annotated[str, Parameter(help="folders of cut-outs (pictures with an alpha channel), COCO's annotations")],
    recipe: Recipe = None,
    dry_run: DryRun = False,
    json: Json = False,
    settings: Flags[MaskPretrainSettings] | None = None,
) -> None:
    """Train a model that segments what a click or a box means and put it into the store: a SAM with a plain encoder,
    which craton segment uses.

    Stopped at any time, a run goes on with: craton runs resume ID
    """
    from craton.config.resolve import FLAGS, read_toml, resolve
    from craton.pretraining.masks.pretrain import pretrain_masks as run_pretraining

    layers = [("usual for masks", USUAL)]
    if recipe is not None:
        layers.append((str(recipe), read_toml(recipe)))
    chosen, provenance = resolve(MaskPretrainSettings, [*layers, (FLAGS, given(settings))])
    with followed(json, None) as hooks:
        result = run_pretraining(data, chosen, provenance, hooks, dry_run=dry_run)
    if result is not None:
        show_result(result, json)


def resume_run(run: Run) -> None:
    """Go on with a training run on masks."""
    from craton.pretraining.masks.pretrain import resume

    with followed(json=False) as hooks:
        result = resume(run, hooks)
    show_result(result, json=False)
