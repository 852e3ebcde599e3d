"""`craton pretrain-chat`: a CLIP and a language model become a model that chats about pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.pretrain import DryRun, Recipe
from craton.cli.training import followed, show_result
from craton.pretraining.image_chat.settings import USUAL, ChatPretrainSettings

if TYPE_CHECKING:
    from craton.store.runs import Run


def pretrain_chat(
    *data: Annotated[str, Parameter(help="tables of image and caption, or of conversations with pictures")],
    recipe: Recipe = None,
    dry_run: DryRun = False,
    json: Json = False,
    settings: Flags[ChatPretrainSettings] | None = None,
) -> None:
    """Join a model that sees (--vision) and one that speaks (--language) by a projector, train that alone, and put the
    LLaVA that it makes into the store. Then teach it to chat: craton finetune NAME CONVERSATIONS

    Stopped at any time, a run goes on with: craton runs resume ID
    """
    from craton.config.resolve import FLAGS, read_toml, resolve
    from craton.pretraining.image_chat.pretrain import pretrain_chat as run_pretraining

    layers = [("usual for projectors", USUAL)]
    if recipe is not None:
        layers.append((str(recipe), read_toml(recipe)))
    chosen, provenance = resolve(ChatPretrainSettings, [*layers, (FLAGS, given(settings))])
    with followed(json, None) as hooks:
        result = run_pretraining(data, chosen, provenance, hooks, dry_run=dry_run)
    if result is not None:
        show_result(result, json)


def resume_run(run: Run) -> None:
    """Go on with the training run of a projector."""
    from craton.pretraining.image_chat.pretrain import resume

    with followed(json=False) as hooks:
        result = resume(run, hooks)
    show_result(result, json=False)
