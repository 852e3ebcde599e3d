"""What `craton pretrain-speech` may be told, and what a run begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import Field, PositiveInt

from craton.config import Settings
from craton.data.speech_batches import SpeechAugmentSettings
from craton.finetuning.adapters import LoraSettings
from craton.training.settings import TrainingSettings

SpeechTask = Literal["seq2seq", "ctc", "both"]

FRESH_WINDOW: Final = 4


class SpeechTrainSettings(Settings):
    """A training run on recordings: from nothing (`size`) or from a model (`model`)."""

    objective: SpeechTask = Field(
        default="seq2seq", description="the decoder's next token, CTC on the encoder alone, or both, weighted"
    )
    ctc_weight: float = Field(default=0.3, gt=0, lt=1, description="both: share of CTC in the loss")
    size: str = Field(default="2m", description="parameters of a fresh model, which pick its width and depth")
    model: str | None = Field(default=None, description="go on with this speech model instead of a fresh one")
    method: Literal["full", "lora"] = Field(
        default="full", description="with --model: all weights, or an adapter that is merged in at the end"
    )
    window: int | None = Field(
        default=None,
        ge=1,
        le=30,
        description="seconds that the model hears at once (none: 4 of a fresh one, else as many as before)",
    )
    mels: PositiveInt = Field(default=80, le=128, description="bins of the spectrogram, for a fresh model")
    vocab: PositiveInt = Field(
        default=1024, description="tokens of a fresh model, times not counted; learnt on the texts, at most so many"
    )
    context: int = Field(default=128, ge=16, description="longest text in tokens is half of it; for a fresh model")
    language: str = Field(default="en", description="what is spoken, for a model of several languages")
    evaluation: tuple[str, ...] = Field(default=(), description="held-out recordings, in the form of the training data")
    holdout: float = Field(
        default=0.05, ge=0, le=0.5, description="without evaluation data: share of the recordings kept apart for it"
    )
    name: str | None = Field(default=None, description="the name in the store (none: speech-OBJECTIVE)")
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files into the run's folder")
    lora: LoraSettings = Field(
        default=LoraSettings(targets=("q", "k", "v", "o", "up", "down")), description="The adapter (lora)."
    )
    augment: SpeechAugmentSettings = Field(
        default=SpeechAugmentSettings(), description="How training changes a recording."
    )
    training: TrainingSettings = Field(default=TrainingSettings(), description="The loop.")


_AUGMENT: Final[Mapping[str, Any]] = {
    "speed": 0.2, "gain": 12.0, "noise": 0.5, "snr": 5.0, "shift": 0.2, "hide_mels": 0.15, "hide_frames": 0.15,
}  # fmt: skip
_LOOP: Final[Mapping[str, Any]] = {
    "batch": 32, "epochs": 20.0, "learning_rate": 1e-3, "weight_decay": 0.05, "beta2": 0.98,
    "warmup": 0.1, "schedule": "cosine", "final_rate": 0.01,
}  # fmt: skip


def usual(settings: SpeechTrainSettings) -> dict[str, Any]:
    """The layer of settings beneath what the user says, for a run of this kind."""
    training = dict(_LOOP)
    if settings.model is not None:
        # A model that can hear already wants small steps; an adapter larger ones than all weights.
        training |= {"epochs": 4.0, "learning_rate": 5e-4 if settings.method == "lora" else 3e-5, "batch": 16}
    return {"training": training, "augment": dict(_AUGMENT)}
