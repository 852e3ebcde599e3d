"""Text to calibrate with: enough of it, the same each time, and none of it in what judges."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.compression.calibration import BUILT_IN, heldout_loss, read_calibration
from craton.errors import DataError, UsageError
from craton.modalities.text import Tokenizer
from craton.models import CausalLM


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Checkpoint.open(tiny_model).tokenizer()


def text_file(folder: Path, words: int = 3000) -> Path:
    path = folder / "text.txt"
    path.write_text(" ".join(f"word{n}" for n in range(words)), encoding="utf-8")
    return path


def test_what_is_on_every_machine_is_enough_and_the_same_each_time(tokenizer: Tokenizer) -> None:
    first, second = (read_calibration(tokenizer, [], window=128, samples=32, seed=0, held_out=8) for _ in range(2))
    assert first.ids_NT.shape == (32, 128)
    assert first.heldout_MT.shape == (8, 128)
    assert first.ids_NT.dtype == torch.int64
    assert torch.equal(first.ids_NT, second.ids_NT)
    assert first.facts == second.facts
    assert first.facts["text"] == BUILT_IN
    assert (first.facts["windows"], first.facts["tokens"], first.facts["held_out_windows"]) == (32, 32 * 128, 8)


def test_a_file_is_written_down_with_its_hash_and_its_end_is_held_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = text_file(tmp_path)
    found = read_calibration(tokenizer, [str(path)], window=64, samples=16, seed=0, held_out=4)
    [entry] = found.facts["files"]
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry["bytes"] == path.stat().st_size
    other = read_calibration(tokenizer, [str(path)], window=64, samples=16, seed=1, held_out=4)
    assert not torch.equal(found.ids_NT, other.ids_NT)
    stream = tokenizer.encode(path.read_text(), add_special_tokens=False)
    last = len(stream) // 64
    assert found.heldout_MT[-1].tolist() == stream[(last - 1) * 64 : last * 64]
    judged = {tuple(row.tolist()) for row in found.heldout_MT}
    assert not judged & {tuple(row.tolist()) for row in found.ids_NT}


def test_records_and_too_little_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps({"text": "red blue green " * 20}) for _ in range(60)), encoding="utf-8")
    assert read_calibration(tokenizer, [str(path)], window=32, samples=8, seed=0, held_out=4).facts["documents"] == 60
    with pytest.raises(DataError, match=r"makes \d+ windows of 128 tokens; 500 to calibrate") as refused:
        read_calibration(tokenizer, [str(path)], window=128, samples=500, seed=0)
    assert refused.value.remedy is not None
    assert "66,048" in refused.value.remedy  # (500 + 16) * 128
    path.write_text('{"words": "red"}', encoding="utf-8")
    with pytest.raises(DataError, match="no text"):
        read_calibration(tokenizer, [str(path)], window=32, samples=1, seed=0)
    with pytest.raises(UsageError):
        read_calibration(tokenizer, [str(tmp_path / "absent.txt")], window=32, samples=1, seed=0)


def test_the_loss_is_that_of_the_next_tokens(tiny_model: Path) -> None:
    model = Checkpoint.open(tiny_model).load(torch.float32)
    assert isinstance(model, CausalLM)
    ids_NT = torch.arange(3 * 40).view(3, 40) % 300
    total = 0.0
    for ids_T in ids_NT:
        logits_TV = model(ids_T, torch.arange(40))
        total += float(torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum"))
    assert math.isclose(heldout_loss(model, ids_NT), total / (3 * 39), rel_tol=1e-5)
