"""The ladder end to end on a tiny model: what it makes, measures, chooses and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from craton.cli import app
from craton.compression.footprint import Footprint
from craton.compression.pareto import BASE
from craton.compression.shrink import Watch, resume, shrink
from craton.compression.shrink_report import report
from craton.compression.shrink_settings import ShrinkSettings
from craton.errors import DataError, UsageError
from craton.inference.model import load
from craton.store import find, list_models
from craton.store.runs import list_runs


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def task(tmp_path) -> Path:
    rows = [{"text": f"{'red blue' if i % 2 else 'green'} {i}", "label": "zim" if i % 2 else "zam"} for i in range(80)]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"the code of a {i} is red blue green number {i * 7} small word" for i in range(3000)))
    return path


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Footprints without a process for each turn."""
    monkeypatch.setattr(
        "craton.compression.shrink.footprints",
        lambda models, **_: [Footprint(1000 - number, 5000, 10.0, 10.0) for number, _ in enumerate(models)],
    )


def settings(text: Path, **more) -> ShrinkSettings:
    return ShrinkSettings(
        **{"text": (str(text),), "minutes": 0, "rounds": 1, "threads": 1, "margin": 1.0, "name": "small"} | more
    )


@pytest.mark.slow
def test_a_ladder_is_made_measured_and_its_choice_published(home, tiny_model, task, text):
    said: list[str] = []
    found = shrink(str(tiny_model), str(task), settings(text), {}, Watch(on_plan=lambda run, lines: said.extend(lines)))
    labels = [rung.label for rung in found.rungs]
    assert labels == [BASE, "8 bits", "4 bits, nearest", "4 bits", "3 bits"]
    assert "8 bits; 4 bits, nearest; 4 bits; 3 bits" in said[1]
    disk = {rung.label: rung.footprint.disk for rung in found.rungs}
    assert disk[BASE] > disk["8 bits"] > disk["4 bits"] >= disk["4 bits, nearest"]
    for rung in found.rungs:
        assert rung.footprint.decode > 0
        assert rung.footprint.memory > rung.footprint.disk
        assert rung.quality.n == len(found.task.dev)
    # With a margin of everything, the smallest is taken, and it answers as its rung did.
    smallest = min(found.rungs, key=lambda rung: rung.footprint.disk)
    assert found.choice.chosen.label == smallest.label
    assert found.model is not None
    assert found.model.name == "small"
    assert [parent.relation for parent in found.model.parents] == ["quantised_from"]
    assert load(found.model.id, threads=1).generate("the code", max_tokens=2).text is not None
    # The rungs themselves are gone, and the sealed test was opened once.
    assert [model.name for model in list_models()] == ["small"]
    assert [event["event"] for event in found.run.events()].count("opened") == 1
    page = report(found)
    assert page.count("<svg") == 2
    assert "<script" not in page
    for label in labels:
        assert label in page


@pytest.mark.slow
def test_where_nothing_keeps_the_quality_the_base_stays_and_the_test_stays_sealed(
    home, at_once, tiny_model, task, text, capsys
):
    flags = ["--minutes", "0", "--rounds", "1", "--threads", "1", "--margin", "0", "--text", str(text), "--limit", "4"]
    with pytest.raises(SystemExit) as ended:
        app(["shrink", str(tiny_model), "--task", str(task), *flags], result_action="return_value")
    assert ended.value.code == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "Keep the model as it is" in out
    assert "sealed test stays sealed" in out
    assert list_models() == []


@pytest.mark.slow
def test_an_interrupted_ladder_goes_on_where_it_stopped(home, at_once, tiny_model, task, text):
    def stop(doing: str) -> None:
        if doing.startswith("3 of 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shrink(str(tiny_model), str(task), settings(text), {}, Watch(on_progress=stop))
    [run] = [run for run in list_runs() if run.kind == "shrink"]
    before = {model.id for model in list_models()}
    assert before == {"small-8-bits@v1", "small-4-bits-nearest@v1"}
    seen: list[str] = []
    found = resume(run, Watch(on_progress=seen.append))
    assert found.model is not None
    assert not any(doing.startswith(("1 of 4", "2 of 4")) for doing in seen)
    assert find("small").id == "small@v1"


def test_a_task_that_changed_is_not_gone_on_with(home, at_once, tiny_model, task, text):
    def stop(doing: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shrink(str(tiny_model), str(task), settings(text), {}, Watch(on_progress=stop))
    [run] = [run for run in list_runs() if run.kind == "shrink"]
    with task.open("a") as file:
        file.write('{"text": "one more", "label": "zim"}\n')
    with pytest.raises(DataError, match="not what it was"):
        resume(run)


def test_what_cannot_be_shrunk_is_refused_before_anything_is_made(home, tiny_model, task, tmp_path, minilm_folder):
    short = tmp_path / "short.txt"
    short.write_text("too little")
    with pytest.raises(DataError, match="windows"):
        shrink(str(tiny_model), str(task), settings(short), {})
    with pytest.raises(UsageError, match="writes no text"):
        shrink(str(minilm_folder), str(task), settings(short), {})
    assert list_runs() == []
