"""How long a run will take, said before it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from craton.data.loader import ListSource, Loader
from craton.training import estimate as module
from craton.training.cross_entropy import NextToken
from craton.training.estimate import estimate
from craton.training.loop import Trainer
from craton.training.settings import TrainingSettings

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_examples, make_model


def seconds(monkeypatch: pytest.MonkeyPatch, *, steps: int, peak: float) -> tuple[float, float]:
    """The estimate on a machine whose products run at `peak` FLOP/s, and whose measured rate is 1,000 tokens/s."""
    monkeypatch.setattr(module, "gemm_peak", lambda dtype, device: peak)
    monkeypatch.setattr(module, "measured_rate", lambda trainer, batch: 1000.0)
    settings = TrainingSettings(steps=steps, batch=8)
    loader = Loader(ListSource(make_examples()), batch=8, micro_tokens=64, seed=0)
    trainer = Trainer(make_model(), NextToken(), loader, settings, dtype=torch.float32)
    return estimate(trainer, torch.float32).seconds


def test_a_step_of_a_moment_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = seconds(monkeypatch, steps=3, peak=1e12)
    assert high == pytest.approx(1.35 * low)


def test_slow_steps_are_tried_out_for_a_long_run_and_not_for_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = seconds(monkeypatch, steps=3, peak=1e6)
    assert high == pytest.approx(4 * low)  # from products alone
    low, high = seconds(monkeypatch, steps=300, peak=1e6)
    assert high == pytest.approx(1.35 * low)
