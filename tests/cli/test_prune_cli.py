"""`craton prune`: single weights or whole parts, never both at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from craton.compression import job, structured
from craton.compression.structured import StructuredResult
from craton.compression.structured_settings import StructuredSettings
from craton.errors import UsageError
from craton.store.runs import Run, list_runs

TEXT = ["--samples", "4", "--window", "32"]


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def app() -> App:
    """The verbs that matter here."""
    app = App(result_action="return_value")
    for verb in ("prune", "runs"):
        app.command(f"craton.cli.{verb}:{verb}", name=verb)
    return app


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("red blue green zim zam what class " * 300, encoding="utf-8")
    return path


def test_single_weights(app: App, tiny_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", str(tiny_model), "--name", "sparse", "--calibration", str(text), *TEXT, "--sparsity", "2:4"]
    app(words)
    said = " ".join(capsys.readouterr().err.split())
    assert "50% of 0.07373M weights in the blocks become 0" in said
    assert "50.0% zeros in 14 matrices" in said
    assert "sparse@v1" in said
    app([*words, "--method", "wanda", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "sparse@v2"
    assert found["facts"] == {"zeros": 0.5, "pattern": "2:4"}
    assert all(row["zeros"] == row["weights"] / 2 for row in found["matrices"])


def test_whole_parts_go_to_structured_pruning(
    app: App, tiny_model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def answer(model: str, settings: StructuredSettings, **options: Any) -> StructuredResult:
        asked.update(options, model=model, settings=settings)
        sizes = ({"layers": 2}, {"layers": 1})
        pair = (1.5, 2.0)
        return StructuredResult("cut@v1", "", "", sizes, (10, 5), (20, 10), pair, pair, (0.0, 0.0), (1,), ("cut",))

    monkeypatch.setattr(structured, "prune_structured", answer)
    app(["prune", str(tiny_model), "--name", "cut", "--layers", "1", "--calibration", str(text), "--samples", "3"])
    assert asked["settings"] == StructuredSettings(layers=1)
    assert asked["name"] == "cut"
    assert asked["samples"] == 3
    assert [str(source) for source in asked["sources"]] == [str(text)]
    assert "window" not in asked  # what was not given is his to choose
    said = capsys.readouterr().err
    assert "cut@v1" in said
    assert "decode" in said
    assert "prefill" not in said  # was not measured
    app(["prune", str(tiny_model), "--name", "cut", "--heads", "0.5", "--channels", "0.25", "--json"])
    assert asked["settings"] == StructuredSettings(heads=0.5, channels=0.25)
    assert json.loads(capsys.readouterr().out)["model"] == "cut@v1"


def test_refusals(app: App, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--sparsity is for single weights, --layers for whole parts"):
        app(["prune", str(tiny_model), "--name", "x", "--layers", "1", "--sparsity", "0.5"])
    with pytest.raises(UsageError, match="no sparsity"):
        app(["prune", str(tiny_model), "--name", "x", "--sparsity", "3:2"])
    with pytest.raises(UsageError, match="less than 1"):
        app(["prune", str(tiny_model), "--name", "x", "--heads", "2"])
    assert list_runs() == []


def test_an_interrupted_run_goes_on(
    app: App, tiny_model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "publish_model", stop)
        with pytest.raises(SystemExit, match="130"):
            app(["prune", str(tiny_model), "--name", "sparse", "--calibration", str(text), *TEXT])
    app(["runs", "resume", "last"])
    assert "sparse@v1" in capsys.readouterr().err
    parts = Run.create("prune", config={"settings": {"layers": 1}}, provenance={})
    with pytest.raises(UsageError, match="whole parts starts anew"):
        app(["runs", "resume", parts.id])
