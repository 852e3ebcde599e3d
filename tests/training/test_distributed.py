"""Two processes do what one does: FSDP2, tensor parallelism, and a resume of both, over gloo on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "distributed_run.py"


def run(tmp_path: Path, name: str, processes: int, **arguments):
    out = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(SCRIPT), json.dumps({"out": str(out), **arguments})],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def assert_same(one, other, tolerance):
    for (loss, norm), (other_loss, other_norm) in zip(one["losses"], other["losses"], strict=True):
        assert loss == pytest.approx(other_loss, rel=tolerance)
        assert norm == pytest.approx(other_norm, rel=tolerance)
    assert one["evaluation"]["loss"] == pytest.approx(other["evaluation"]["loss"], rel=tolerance)
    for name, (total, first) in one["weights"].items():
        other_total, other_first = other["weights"][name]
        assert first == pytest.approx(other_first, rel=20 * tolerance, abs=1e-5), name
        assert total == pytest.approx(other_total, rel=20 * tolerance, abs=1e-2), name


def test_two_sharded_ranks_are_one_rank(tmp_path):
    two, one = run(tmp_path, "two", 2), run(tmp_path, "one", 1)
    assert_same(two, one, 1e-4)
    assert (two["agreed"], one["agreed"]) == (0.5, 0)


def test_tensor_parallel_ranks_are_one_rank(tmp_path):
    two = run(tmp_path, "two", 2, settings={"tensor_parallel": 2})
    assert_same(two, run(tmp_path, "one", 1), 1e-4)
    assert two["agreed"] == 0.5


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(tmp_path):
    # An evaluation stands before each checkpoint, and must leave nothing gathered behind.
    evaluated = {"settings": {"evaluate_every": 3}}
    straight = run(tmp_path, "straight", 2, **evaluated)
    first = run(tmp_path, "first", 2, folder=str(tmp_path / "checkpoints"), stop=4, **evaluated)
    second = run(tmp_path, "second", 2, folder=str(tmp_path / "checkpoints"), resume=True, **evaluated)
    assert (len(first["losses"]), len(second["losses"])) == (4, 3)  # the checkpoint is that of step 3
    assert first["losses"][:3] + second["losses"] == straight["losses"]
    assert second["weights"] == straight["weights"]
