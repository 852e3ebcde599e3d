"""`craton scaling`, with a stand-in for the trainings: what is printed and what its run keeps, in which order."""

from __future__ import annotations

import json
import sys

import pytest
from cyclopts import App

from craton.cli import scaling as verb
from craton.errors import UsageError
from craton.pretraining.scaling import LossLaw
from craton.store.runs import Run

LAW = LossLaw(floor=1.7, a=400.0, alpha=0.34)


@pytest.fixture
def scale(monkeypatch, tmp_path, capsys):
    """scale(*arguments) -> (standard output, standard error, the dials that were trained)."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path))
    trained = []

    def train(plan):
        trained.append(plan.dial)
        return LAW(plan.parameters, plan.tokens)

    monkeypatch.setattr(verb, "connect", lambda sources, settings: (4096, lambda: 1e9, train))
    monkeypatch.setattr(sys, "argv", ["craton", "scaling"])
    app = App()
    app.default(verb.scaling)

    def run(*arguments):
        trained.clear()
        app(list(arguments), result_action="return_value")
        return *capsys.readouterr(), trained

    return run


def test_the_forecast_comes_before_the_measurement_on_the_terminal_and_in_the_run(scale):
    out, err, trained = scale("text.txt", "--sizes", "1m,0.5m,2m", "--predict", "4m")
    assert trained == [500_000, 1_000_000, 2_000_000, 4_000_000]
    assert err.index("2M: held-out loss") < err.index("foretold:") < err.index("4M: held-out loss")
    assert "are few" not in err
    assert "within the interval" in out
    assert "loss = 1.700 + 400 / parameters^0.340" in out
    run = Run.open("last")
    assert run.status == "done"
    assert [event["event"] for event in run.events() if event["event"] not in ("running", "done")] == (
        ["trial"] * 3 + ["forecast", "measured"]
    )
    assert run.config()["predict"] == "4m"


def test_json_is_one_document_and_nothing_else_on_standard_output(scale):
    out, err, trained = scale("text.txt", "--sizes", "0.5m,1m,2m,4m", "--minutes", "10", "--json")
    report = json.loads(out)
    assert len(trained) == len(report["trials"]) == 4
    assert report["run"] == Run.open("last").id
    assert report["measured"] is None
    assert report["forecast"]["low"] < report["forecast"]["loss"] < report["forecast"]["high"]
    assert "tokens a parameter are few" in err
    # 10 minutes at 10^9 FLOPs a second, 6 for each parameter and token.
    assert sum(6 * t["parameters"] * t["tokens"] for t in report["trials"]) == pytest.approx(6e11, rel=0.05)


@pytest.mark.parametrize("arguments", [[], ["text.txt", "--sizes", "1m,2m"], ["text.txt", "--sizes", "1m,x,2m"]])
def test_wrong_use_leaves_no_run(scale, tmp_path, arguments):
    with pytest.raises(UsageError):
        scale(*arguments)
    assert not (tmp_path / "runs").exists()
