"""The training benchmarks' contenders do the same work, and their documents have the form that others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.peer
def test_contenders_start_from_one_loss_and_make_the_cases():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import torch
    from contenders.train_models import Job
    from contenders.train_race import BEST, INSTALLED, OURS
    from gpu_training import measure

    from craton.pretraining.sizing import Shape

    # On a CPU and tiny: what is compared is the work, not the speed. A peer whose first loss differs would be absent.
    job = Job(Shape(width=64, layers=2, heads=2, kv_heads=1, hidden=128), vocab=300, batch=2, length=64)
    cases = measure("tiny", job, torch.device("cpu"), rounds=1, steps=1, limit=None)
    assert set(cases) == {"pretrain/tiny", "mfu/tiny", "memory/tiny"}
    assert set(cases["pretrain/tiny"]["peers"]) == {INSTALLED, BEST}
    assert OURS in cases["pretrain/tiny"]["settings"]
    assert 0 < cases["mfu/tiny"]["of_limit"] < 1


def test_without_a_gpu_there_is_a_document_without_cases(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    path = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_training.py"), "--quick", "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stderr
    assert json.loads(path.read_text())["cases"] == {}
