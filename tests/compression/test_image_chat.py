"""Models that chat about pictures, made smaller or other: what comes out is shown a picture and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.inference.test_pictures import asking, photo, write_seeing

import craton
from craton.checkpoints.checkpoint import Checkpoint
from craton.compression.convert import convert
from craton.compression.convert_settings import ConvertSettings
from craton.compression.distill import distill
from craton.compression.distill_settings import DistillSettings
from craton.compression.merge_models import merge_models
from craton.compression.merge_settings import MergeSettings
from craton.compression.prune import prune
from craton.compression.quantize import quantize
from craton.compression.quantize_settings import PruneSettings, QuantizeSettings
from craton.compression.structured import prune_structured
from craton.compression.structured_settings import StructuredSettings
from craton.errors import CheckpointError
from craton.store import find
from craton.store.runs import list_runs
from craton.training.settings import TrainingSettings

pytest.importorskip("PIL", reason="pictures need Pillow")

TEXT: dict[str, Any] = {"samples": 4, "window": 32}
MESSAGES = asking("What is ", photo(1, 50, 40), "?")


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of words."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"the cat {n * n % 7} saw a dog {n % 11}" for n in range(800)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module", params=["llava", "smolvlm"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers of text; SmolVLM's says in processor_config.json how pictures are prepared."""
    folder = write_seeing(tmp_path_factory.mktemp(request.param), request.param)
    if request.param == "smolvlm":
        values = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    return folder


def quantized(base: Path, text: str) -> None:
    chosen = QuantizeSettings(calibration=(text,), bits=8, method="awq", keep=("lm_head", "down_proj"), **TEXT)
    outcome = quantize(str(base), chosen, {}, "made")
    assert all("vision" not in row["matrix"] for row in outcome.rows)
    assert Checkpoint.open(find("made").path).quantized_kinds() == {"Q8_0"}


def test_a_gguf_file_is_refused_before_the_work(base: Path, text: str) -> None:
    chosen = QuantizeSettings(calibration=(text,), format="gguf", keep=("lm_head", "down_proj"), **TEXT)
    with pytest.raises(CheckpointError, match="cannot be written as GGUF"):
        quantize(str(base), chosen, {}, "made")
    assert list_runs() == []


def pruned(base: Path, text: str) -> None:
    prune(str(base), PruneSettings(calibration=(text,), sparsity="0.1", **TEXT), {}, "made")


def without_a_layer(base: Path, text: str) -> None:
    prune_structured(str(base), StructuredSettings(layers=1), name="made", sources=(text,), window=32, samples=4)


def with_fewer_tokens(base: Path, text: str) -> None:
    chosen = StructuredSettings(vocab=(text,))
    prune_structured(str(base), chosen, name="made", sources=(text,), window=32, samples=4, measure_speed=False)


def converted(base: Path, text: str) -> None:
    context = 2 * Checkpoint.open(base).text_config.context
    convert(str(base), ConvertSettings(context=context), {}, name="made")


def merged(base: Path, text: str) -> None:
    merge_models([str(base)] * 2, MergeSettings(), name="made")


def distilled(base: Path, text: str) -> None:
    training = TrainingSettings(steps=2, batch=2, micro_tokens=128, threads=1)
    result = distill(
        str(base), "depth:0.5", [text], DistillSettings(name="made", context=32, holdout=0.1, training=training), {}
    )
    assert result is not None


@pytest.mark.parametrize(
    ("make", "answers_the_same"),
    [(quantized, False), (pruned, False), (without_a_layer, False), (with_fewer_tokens, False), (converted, False),
     (merged, True), (distilled, False)],
)  # fmt: skip
def test_what_is_made_is_shown_a_picture(
    base: Path, text: str, make: Callable[[Path, str], None], answers_the_same: bool
) -> None:
    make(base, text)
    before, after = craton.load(base, threads=1), craton.load("made", threads=1)
    assert after.sees
    prompt, wanted = after.prompt(MESSAGES), before.prompt(MESSAGES)
    assert prompt.text == wanted.text
    for ours, theirs in zip(prompt.pictures, wanted.pictures, strict=True):
        np.testing.assert_array_equal(ours.pixels_CHW, theirs.pixels_CHW)
    said = after.chat(MESSAGES, max_tokens=4)
    assert said.completion_tokens > 0
    if answers_the_same:
        assert said.text == before.chat(MESSAGES, max_tokens=4).text
