"""`craton pretrain-masks`: a model that segments what a click or a box means, from exact masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags
from craton.cli.options import Json
from craton.cli.pretrain import DryRun, Recipe
from craton.cli.training import trained, with_recipe
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
    from craton.pretraining.masks.pretrain import pretrain_masks as run_pretraining

    chosen, provenance = with_recipe(MaskPretrainSettings, ("usual for masks", USUAL), recipe, settings)
    trained(lambda hooks: run_pretraining(data, chosen, provenance, hooks, dry_run=dry_run), json)


def resume_run(run: Run) -> None:
    """Go on with a training run on masks."""
    from craton.pretraining.masks.pretrain import resume

    trained(lambda hooks: resume(run, hooks), json=False)
