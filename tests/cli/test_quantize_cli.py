"""`craton quantize`: what it says, as text and as JSON, and how an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cyclopts import App

from craton.checkpoints.checkpoint import Checkpoint
from craton.compression import job
from craton.errors import UsageError
from craton.store import find
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
    for verb in ("quantize", "runs"):
        app.command(f"craton.cli.{verb}:{verb}", name=verb)
    return app


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("red blue green zim zam what class " * 300, encoding="utf-8")
    return path


def test_it_says_what_was_made_and_measured(
    app: App, tiny_model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["quantize", str(tiny_model), "--name", "small", "--calibration", str(text), *TEXT])
    said = " ".join(capsys.readouterr().err.split())
    for words in (
        "14 matrices of 0.07373M weights; kept as they are: the embedding, which is the head as well",
        "4.50 bits a weight in 14 matrices",
        "perplexity",
        f"on 16 held-out windows of 32 tokens of {text}",
        "read again: outputs differ by",
        "small@v1",
    ):
        assert words in said
    settings = {key: origin for key, (_, origin) in Run.open("last").settings().items()}
    assert settings["settings.calibration"] == "--calibration"
    assert settings["settings.method"] == "default"
    assert "quantised from" in (find("small").path / "README.md").read_text()


def test_json_has_every_matrix(app: App, tiny_model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "rtn", "--bits", "8", "--act", "int8", "--keep", "down_proj,layers.0", "--json"]
    app(["quantize", str(tiny_model), "--name", "small", "--calibration", str(text), *TEXT, *flags])
    output = capsys.readouterr()
    assert output.err == ""
    found = json.loads(output.out)
    assert found["model"] == "small@v1"
    assert len(found["matrices"]) == 6
    assert {row["bits"] for row in found["matrices"]} == {8}
    assert found["calibration"]["files"][0]["path"] == str(text)
    assert set(found["measured"]) == {"loss_before", "loss_after", "perplexity_before", "perplexity_after"}
    assert found["bytes_after"] < found["bytes_before"]
    assert Checkpoint.open(find("small").path).int8_activations


def test_an_interrupted_run_says_how_to_go_on_and_does(
    app: App, tiny_model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "publish_model", stop)
        with pytest.raises(SystemExit, match="130"):
            app(["quantize", str(tiny_model), "--name", "small", "--calibration", str(text), *TEXT])
    [run] = list_runs()
    assert f"craton runs resume {run.id}" in capsys.readouterr().err
    text.unlink()  # the run has kept what it needs of it
    app(["runs", "resume", run.id])
    assert "small@v1" in capsys.readouterr().err
    assert Run.open(run.id).status == "done"
    with pytest.raises(UsageError, match="is done"):
        app(["runs", "resume", run.id])


def test_wrong_settings_are_refused(app: App, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["quantize", str(tiny_model), "--name", "small"]
    for flags in (["--bits", "5"], ["--group", "48"], ["--method", "best"]):
        with pytest.raises(SystemExit) as ended:
            app([*model, *flags])
        assert ended.value.code != 0
    with pytest.raises(UsageError, match="no size"):
        app([*model, "--size", "80"])
    with pytest.raises(UsageError, match="window"):
        app([*model, "--window", "3"])
    assert list_runs() == []
