"""`craton distill` and the parts of a model from the command line: what is asked for reaches the run, and what is wrong
is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from craton import store
from craton.checkpoints.checkpoint import Checkpoint
from craton.errors import CratonError
from craton.store.runs import Run

WORDS = "the code of zim is red and the code of zam is blue what is the code of zum "


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i:02}.txt").write_text(f"story {i}: " + WORDS * (3 + i % 3), encoding="utf-8")
    return tmp_path / "text"


@pytest.fixture
def craton(capsys) -> Callable[..., tuple[int, str, str]]:
    """craton(*arguments) -> (exit status, standard output, standard error)."""
    app = App()
    app.command("craton.cli.distill:distill", name="distill")
    app.command("craton.cli.runs:runs", name="runs")

    def run(*arguments: Any) -> tuple[int, str, str]:
        try:
            status = int(app([*map(str, arguments)], exit_on_error=False, result_action="return_value") or 0)
        except CratonError as error:
            status = error.exit_status
            print(error)
        out, err = capsys.readouterr()
        return status, out, err

    return run


SMALL = ["--steps", "3", "--context", "32", "--batch", "2", "--threads", "1", "--holdout", "0.2"]


def test_a_student_is_cut_taught_and_published(craton, tiny_model, text):
    status, out, _ = craton("distill", tiny_model, "depth:0.5", text, *SMALL, "--name", "half", "--json")
    assert status == 0
    told = json.loads(out)
    assert told["model"] == "half@v1"
    assert told["steps"] == 3
    assert told["evaluation"]["divergence"] >= 0
    assert len(Checkpoint.open(store.find("half").path).config.trunk.layers) == 1
    run = Run.open(told["run"])
    assert run.kind == "distill"
    origins = {key: origin for key, (_, origin) in run.settings().items()}
    assert origins["settings.training.steps"] == "--steps"
    assert origins["settings.training.learning_rate"] == "usual for distillation"
    status, out, _ = craton("runs", "resume", told["run"])
    assert status == 2
    assert "is done" in out


def test_people_see_what_was_decided_and_measured(craton, tiny_model, text):
    status, out, err = craton("distill", tiny_model, tiny_model, text, *SMALL, "--loss", "reverse", "--name", "same")
    assert (status, out) == (0, "")
    assert "likeliest of" in err
    assert "held-out loss" in err
    assert "same@v1" in err


def test_a_stopped_run_goes_on(craton, tiny_model, text, monkeypatch):
    from craton.compression import distill

    real = distill.carry_out

    def stop(*arguments: Any, **more: Any):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "carry_out", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        craton("distill", tiny_model, "width:0.5", text, *SMALL, "--name", "later")
    monkeypatch.setattr(distill, "carry_out", real)
    stopped = Run.open("last")
    assert stopped.status == "interrupted"
    status, _, err = craton("runs", "resume", stopped.id)
    assert status == 0
    assert "later@v1" in err


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--loss", "jensen"], "jensen"),
        (["--alpha", "2"], "less than or equal to 1"),
        (["--name", "Not A Name"], "name"),
    ],
)
def test_wrong_flags_teach(craton, tiny_model, text, flags, match, craton_home):
    try:
        status, out, err = craton("distill", tiny_model, tiny_model, text, *SMALL, *flags)
    except Exception as error:  # what cyclopts itself refuses
        status, out, err = 2, str(error), ""
    assert status == 2
    assert match in out + err
    assert not (craton_home / "runs").exists()


def test_no_data_is_said(craton, tiny_model):
    status, out, _ = craton("distill", tiny_model, tiny_model, *SMALL)
    assert status == 2
    assert "DATA" in out
