"""Craton as a contender that trains: its own loop over its own loader, as `craton pretrain` and LoRA run it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from contenders.train_models import SEED
from contenders.train_pace import Pace, run
from contenders.train_sequences import load_sequences
from craton.checkpoints.checkpoint import Checkpoint
from craton.data.example import Example
from craton.data.loader import ListSource, Loader
from craton.finetuning.adapters import LoraSettings
from craton.finetuning.lora import apply_lora
from craton.models import AnyModel, build
from craton.models.initialisation import initialise
from craton.training.cross_entropy import NextToken
from craton.training.hardware import compute_dtype
from craton.training.loop import Trainer
from craton.training.ranks import Ranks
from craton.training.settings import TrainingSettings
from craton.training.state import Progress


class Observer:
    """Tells the pace of each step."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_step(self, progress: Progress, steps: int, values: Mapping[str, float]) -> None:
        self._pace.first_loss(values["loss"])
        self._pace.step_done()

    def on_evaluation(self, progress: Progress, values: Mapping[str, float]) -> None:
        raise AssertionError("nothing is held out")

    def on_checkpoint(self, progress: Progress, path: object) -> None:
        raise AssertionError("there is no folder for checkpoints")


def train(
    pace: Pace,
    *,
    folder: str,
    data: str,
    batch: int,
    micro_tokens: int,
    lora: int | None = None,
    compile: bool = False,
    device: str = "cpu",
) -> None:
    """Pretrain a fresh model of the shape in `folder`, or with `lora`, a rank, adapters on the weights in it.

    data: see `save_sequences`; read in its order, `batch` sequences a step.
    """
    examples = [Example((sequence,)) for sequence in load_sequences(data)]
    source = ListSource(examples)
    dtype, _ = compute_dtype("auto", torch.device(device))
    checkpoint = Checkpoint.open(folder)
    model: AnyModel
    if lora is None:
        model = build(checkpoint.config)
        initialise(model, SEED)
        source.row = examples[0].tokens  # windows of one length
    else:
        model = checkpoint.load(dtype)
        apply_lora(model, LoraSettings(rank=lora, alpha=2 * lora))
    settings = TrainingSettings(
        steps=1_000_000, batch=batch, micro_tokens=micro_tokens, compile=compile, learning_rate=1e-4
    )
    loader = Loader(source, batch=batch, micro_tokens=micro_tokens, seed=SEED, shuffle=False)
    ranks = Ranks(torch.device(device))
    trainer = Trainer(model, NextToken(), loader, settings, dtype=dtype, ranks=ranks, observers=[Observer(pace)])
    pace.begin(f"{str(dtype).removeprefix('torch.')}{', compiled' if compile else ''}", device)
    trainer.fit()


if __name__ == "__main__":
    run(train)
