"""`craton pretrain-chat`: a CLIP and a language model become a model that chats about pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags
from craton.cli.options import Json
from craton.cli.pretrain import DryRun, Recipe
from craton.cli.training import trained, with_recipe
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
    from craton.pretraining.image_chat.pretrain import pretrain_chat as run_pretraining

    chosen, provenance = with_recipe(ChatPretrainSettings, ("usual for projectors", USUAL), recipe, settings)
    trained(lambda hooks: run_pretraining(data, chosen, provenance, hooks, dry_run=dry_run), json)


def resume_run(run: Run) -> None:
    """Go on with the training run of a projector."""
    from craton.pretraining.image_chat.pretrain import resume

    trained(lambda hooks: resume(run, hooks), json=False)
