"""`craton pretrain-pairs`: pictures and texts in one space, from pictures with captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags
from craton.cli.options import Json
from craton.cli.pretrain import DryRun, Recipe
from craton.cli.training import trained, with_recipe
from craton.pretraining.image_text.settings import USUAL, PairPretrainSettings

if TYPE_CHECKING:
    from craton.store.runs import Run


def pretrain_pairs(
    *data: Annotated[str, Parameter(help="tables of image and caption, folders of pictures with NAME.txt beside them")],
    recipe: Recipe = None,
    dry_run: DryRun = False,
    json: Json = False,
    settings: Flags[PairPretrainSettings] | None = None,
) -> None:
    """Train a model of pictures and texts by contrast and put it into the store: a CLIP (softmax) or a SigLIP
    (sigmoid), which craton classify and craton search use with any words. From few pictures, begin with a text encoder
    that knows more words than their captions hold: --text-model minilm-l6-v2

    Stopped at any time, a run goes on with: craton runs resume ID
    """
    from craton.pretraining.image_text.pretrain import pretrain_pairs as run_pretraining

    chosen, provenance = with_recipe(PairPretrainSettings, ("usual for pairs", USUAL), recipe, settings)
    trained(lambda hooks: run_pretraining(data, chosen, provenance, hooks, dry_run=dry_run), json)


def resume_run(run: Run) -> None:
    """Go on with a training run on pictures with captions."""
    from craton.pretraining.image_text.pretrain import resume

    trained(lambda hooks: resume(run, hooks), json=False)
