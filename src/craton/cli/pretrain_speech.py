"""`craton pretrain-speech`: a model that writes down speech, from nothing or from a Whisper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.pretrain import DryRun, Recipe
from craton.cli.training import trained
from craton.finetuning.speech.settings import SpeechTrainSettings, usual

if TYPE_CHECKING:
    from craton.store.runs import Run


def pretrain_speech(
    *data: Annotated[str, Parameter(help="tables of audio and text, folders of sound with NAME.txt beside NAME.wav")],
    recipe: Recipe = None,
    dry_run: DryRun = False,
    json: Json = False,
    settings: Flags[SpeechTrainSettings] | None = None,
) -> None:
    """Train a Whisper on recordings with their texts and put it into the store, where craton transcribe finds it: a
    fresh one, or with --model whisper-tiny.en one that can hear already (all weights, or --method lora).

    Stopped at any time, a run goes on with: craton runs resume ID
    """
    from craton.config.resolve import FLAGS, read_toml, resolve
    from craton.finetuning.speech.train import train_speech

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    layers.append((FLAGS, given(settings)))
    first, _ = resolve(SpeechTrainSettings, layers)
    chosen, provenance = resolve(SpeechTrainSettings, [("usual for speech", usual(first)), *layers])
    trained(lambda hooks: train_speech(data, chosen, provenance, hooks, dry_run=dry_run), json)


def resume_run(run: Run) -> None:
    """Go on with a training run on speech."""
    from craton.finetuning.speech.train import resume

    trained(lambda hooks: resume(run, hooks), json=False)
