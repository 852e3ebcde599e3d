"""`craton pretrain-images`: a model that sees, from pictures, from nothing or from a model that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.pretrain import DryRun, Recipe
from craton.cli.training import trained
from craton.pretraining.images.settings import USUAL, ImagePretrainSettings

if TYPE_CHECKING:
    from craton.store.runs import Run


def pretrain_images(
    *data: Annotated[str, Parameter(help="folders, tables (.jsonl, .csv) of pictures, MNIST's IDX files")],
    recipe: Recipe = None,
    dry_run: DryRun = False,
    json: Json = False,
    settings: Flags[ImagePretrainSettings] | None = None,
) -> None:
    """Train a Vision Transformer on pictures and put it into the store: by classes, by painting hidden patches
    (masked autoencoding) or by agreeing with itself (self-distillation).

    Stopped at any time, a run goes on with: craton runs resume ID
    """
    from craton.config.resolve import FLAGS, read_toml, resolve
    from craton.pretraining.images.pretrain import pretrain_images as run_pretraining

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    layers.append((FLAGS, given(settings)))
    first, _ = resolve(ImagePretrainSettings, layers)
    usually = (f"usual for {first.objective}", USUAL[first.objective])
    chosen, provenance = resolve(ImagePretrainSettings, [usually, *layers])
    trained(lambda hooks: run_pretraining(data, chosen, provenance, hooks, dry_run=dry_run), json)


def resume_run(run: Run) -> None:
    """Go on with a training run on pictures."""
    from craton.pretraining.images.pretrain import resume

    trained(lambda hooks: resume(run, hooks), json=False)
