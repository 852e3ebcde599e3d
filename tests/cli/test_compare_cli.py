"""`craton compare` from the command line: what it prints, keeps, refuses and publishes, at once or later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from craton.compare.settings import CompareSettings
from craton.compare.study import Watch, compare
from craton.store.runs import list_runs


@pytest.fixture
def quick(tiny_model) -> list[str]:
    words = ["--models", tiny_model, "--encoder", tiny_model, "--ways", "zero-shot,prompt"]
    return [*map(str, words), "--trials", "1", "--minutes", "0.1", "--threads", "1"]


def test_a_finished_comparison_is_published_later(craton_, task, quick):
    found = json.loads(craton_("compare", task, *quick, "--json"))
    assert found["applied"] is None
    assert Path(found["report"]).read_text().startswith("<!")
    assert json.loads(craton_("runs", "apply", found["run"], "--json")) == {"applied": "data@v1"}
    assert "data@v1" in craton_("runs", "apply", found["run"])
    assert json.loads(craton_("runs", "apply", found["run"], "--name", "mine", "--json")) == {"applied": "mine@v1"}
    assert "data@v1" in craton_("list", "--json")


def test_what_would_fail_at_the_end_is_refused_at_the_beginning(craton_, task, quick, tmp_path):
    words = ["compare", task, *quick]
    assert "built-in model" in craton_(*words, "--name", "smollm2-135m-instruct", status=2)
    assert "no folder" in craton_(*words, "--report", tmp_path / "absent" / "r.html", status=2)
    assert list_runs() == []


def test_a_resumed_comparison_keeps_its_flags(craton_, task, tiny_model, tmp_path):
    def stop(doing):
        raise KeyboardInterrupt

    chosen = CompareSettings(
        models=(str(tiny_model),),
        encoder=str(tiny_model),
        ways=("zero-shot", "prompt"),
        trials=1,
        minutes=0.1,
        threads=1,
        name="later",
    )
    with pytest.raises(KeyboardInterrupt):
        compare(str(task), chosen, {}, Watch(on_progress=stop), publish=True, report=tmp_path / "r.html")
    [run] = list_runs()
    said = craton_("runs", "resume", run.id)
    assert "published: later@v1" in said
    assert f"report: {tmp_path / 'r.html'}" in said.replace("\n", "")
    assert (tmp_path / "r.html").exists()
    assert "is done" in craton_("runs", "resume", run.id, status=2)
