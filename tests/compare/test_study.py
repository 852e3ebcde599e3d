"""The comparison end to end on a tiny model: what it keeps, what it never sees, how it goes on, what it publishes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from craton.compare.application import apply, open_application
from craton.compare.report import report, threats
from craton.compare.settings import CompareSettings
from craton.compare.study import Watch, compare, figures_of, mean_rows, resume
from craton.errors import CratonError, DataError, StoreError, UsageError
from craton.evaluation.items import Answer, Item
from craton.evaluation.runner import evaluate, slices
from craton.evaluation.tasks import Sealed
from craton.prompting.answering import PromptedModel
from craton.store.artifacts import publish_model
from craton.store.runs import Run, list_runs


def settings(model, **more) -> CompareSettings:
    chosen = {
        "models": (str(model),),
        "encoder": str(model),
        "seeds": 2,
        "trials": 3,
        "minutes": 0.2,
        "epochs": 1.0,
        "threads": 1,
    }
    return CompareSettings(**chosen | more)


def stopped(task, chosen, *, at="", **wishes) -> Run:
    """The run of a comparison that was interrupted when it said `at`, or before it began to work."""
    begun = []

    def stop(doing):
        if at in doing:
            raise KeyboardInterrupt

    watch = Watch(on_progress=stop, on_plan=lambda run, _: begun.append(run))
    with pytest.raises(KeyboardInterrupt):
        compare(str(task), chosen, {}, watch, **wishes)
    [run] = begun
    assert Run.open(run.id).status == "interrupted"
    return Run.open(run.id)


def test_all_ways_are_measured_on_the_same_items_and_kept(home, tiny_model, class_task):
    found = compare(str(class_task), settings(tiny_model), {})
    labels = [m.label for m in found.measurements]
    assert labels == ["zero-shot", "prompt", "retrieval", "lora", "lora+retrieval", "majority", "random examples"]
    ids = [row.id for row in found.measurements[0].rows[0]]
    assert len(ids) == 12
    for m in found.measurements:
        assert all([row.id for row in seed] == ids for seed in m.rows)
        assert len(m.rows) == (2 if "lora" in m.label else 1)
        # The table and the chart say the same.
        assert m.figures["accuracy"] == found.verdict.quality[m.label]
        assert {figure.n for figure in m.figures.values()} == {12}
    assert {row.answer for m in found.measurements for seed in m.rows for row in seed} <= {"zim", "zam"}
    assert found.verdict.recommended in labels[:5]
    # Each row is a run of its own, and so is each fine-tuning.
    kinds = [run.kind for run in list_runs()]
    assert kinds.count("compare-way") == 5
    assert kinds.count("finetune") == 4
    value = json.loads((found.run.folder / "comparison.json").read_bytes())
    assert value["verdict"]["recommended"] == found.verdict.recommended
    page = report(found)
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert page.count("<svg") >= 3
    assert len(threats(found)) >= 16
    assert all(answer for _, answer in threats(found))


def test_nothing_sees_a_test_row_before_the_test_is_opened(home, tiny_model, class_task, monkeypatch):
    seen, opened = [], []
    real_call, real_open = PromptedModel.__call__, Sealed.open

    def call(self, item):
        if not opened:
            messages = self.conversation(item)
            seen.append(json.dumps(messages))
        return real_call(self, item)

    def unseal(self):
        # Everything on the disk at this moment was made without the test.
        for path in [*home.rglob("*.json*"), *home.rglob("*.txt"), *home.rglob("*.sqlite")]:
            assert b"MARKER" not in path.read_bytes(), path
        opened.append(time.time())
        return real_open(self)

    monkeypatch.setattr(PromptedModel, "__call__", call)
    monkeypatch.setattr(Sealed, "open", unseal)
    found = compare(str(class_task), settings(tiny_model, seeds=1), {})
    assert len(opened) == 1
    assert seen
    assert not any("MARKER" in text for text in seen)
    assert any("MARKER" in row.input for row in found.measurements[0].rows[0])


def test_documents_are_retrieved_and_the_winner_is_published_as_one_thing(home, tiny_model, lookup_task):
    found = compare(str(lookup_task), settings(tiny_model, ways=("zero-shot", "retrieval"), name="codes"), {})
    labels = [m.label for m in found.measurements]
    assert labels == ["zero-shot", "retrieval", "majority", "oracle context", "random context"]
    retrieval, oracle = found.measurements[1], found.measurements[3]
    assert all(row.passages for row in retrieval.rows[0])
    assert oracle.figures["recall@1"].value == 1
    assert found.model is None
    lookup_task.unlink()  # what is published comes from the run alone
    made = apply(Run.open(found.run.id))
    assert made.id == "codes@v1"
    assert apply(found.run).id == "codes@v1"  # once, however often it is asked for
    assert apply(found.run, "other").id == "other@v1"
    application = open_application("codes", threads=1)
    asked = "what is the code of number 3"
    answer = application.answer(asked)
    messages = [{"role": "user", "content": asked}]
    assert "".join(application.chat(messages, stream=True)).strip() == answer.text
    assert application.chat(messages).text.strip() == answer.text
    if application.settings.way == "retrieval":
        assert answer.passages


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_answers(home, tiny_model, class_task, tmp_path):
    words = ["compare", class_task, "--models", tiny_model, "--encoder", tiny_model, "--seeds", "1", "--trials", "2"]
    words += ["--minutes", "0.2", "--epochs", "1", "--threads", "1", "--ways", "zero-shot,lora"]
    command = [sys.executable, "-m", "craton.cli", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, timeout=240)
    assert straight.returncode == 0, straight.stderr
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    known = {run.id for run in list_runs()}
    for _ in range(2400):
        fresh = [run for run in list_runs() if run.id not in known and run.kind == "compare"]
        if fresh and (fresh[0].folder / "ways").exists() and len(list((fresh[0].folder / "ways").iterdir())) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [run] = [run for run in list_runs() if run.id not in known and run.kind == "compare"]
    assert run.status in ("lost", "done")
    done = subprocess.run(
        [sys.executable, "-m", "craton.cli", "runs", "resume", run.id], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first = json.loads(straight.stdout)
    second = json.loads((Run.open(run.id).folder / "comparison.json").read_bytes())
    for a, b in zip(first["ways"], second["ways"], strict=True):
        assert a["figures"]["accuracy"] == b["figures"]["accuracy"]


def test_a_task_that_changed_is_not_gone_on_with(home, tiny_model, class_task):
    run, asked = stopped(class_task, settings(tiny_model)), class_task.read_text()
    class_task.write_text('instruction = "Say it."\n' + asked)
    with pytest.raises(DataError, match="not what it was"):
        resume(run)
    class_task.write_text(asked)
    (class_task.parent / "test.jsonl").write_text('{"text": "another", "label": "zim"}\n' * 12)
    with pytest.raises(DataError, match="not what it was"):
        resume(run)


def test_a_comparison_goes_on_from_another_folder_with_the_models_of_its_beginning(
    home, tiny_model, class_task, tmp_path, monkeypatch
):
    def publish():
        return publish_model(
            "base",
            lambda folder: shutil.copytree(tiny_model, folder, dirs_exist_ok=True),
            source="file:x",
            parents=(),
            licence=None,
        ).id

    assert publish() == "base@v1"
    monkeypatch.chdir(class_task.parent)
    run = stopped(class_task.name, settings("base", encoder=str(tiny_model), ways=("zero-shot", "prompt")))
    assert publish() == "base@v2"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = resume(run)
    assert found.settings.models == ("base@v1",)
    assert {m.recipe.model for m in found.measurements if m.recipe} == {"base@v1"}


def test_what_was_wished_is_done_after_a_resume(home, tiny_model, class_task, tmp_path):
    page = tmp_path / "pages" / "r.html"
    page.parent.mkdir()
    chosen = settings(tiny_model, ways=("zero-shot", "prompt"), name="wished")
    run = stopped(class_task, chosen, at="making ready: prompt", publish=True, report=page)
    page.parent.rmdir()
    with pytest.raises(UsageError, match="no folder"):
        resume(run)
    page.parent.mkdir()
    # What fails at the very end can be gone on with, too.
    with pytest.raises(StoreError):
        resume(run, Watch(on_measured=lambda way, _: way == "majority" and page.parent.rmdir()))
    assert Run.open(run.id).status == "failed"
    page.parent.mkdir()
    found = resume(Run.open(run.id))
    assert found.model.id == "wished@v1"
    assert Run.open(run.id).record.result["model"] == "wished@v1"
    assert page.read_bytes() == (run.folder / "report.html").read_bytes()
    assert open_application("wished", threads=1).settings.way == found.verdict.recommended
    assert not (home / "models" / "wished" / "v2").exists()


def test_the_time_of_an_index_counts_over_interruptions(home, tiny_model, lookup_task):
    chosen = settings(tiny_model, ways=("zero-shot", "retrieval"), trials=1)
    run = stopped(lookup_task, chosen, at="passages embedded")
    facts = run.folder / "index.json"
    spent = json.loads(facts.read_bytes())["seconds"]
    assert 0 < spent < 60
    facts.write_text(json.dumps({"seconds": spent + 1000}))
    found = resume(run)
    retrieval = found.measurements[1].recipe
    assert 1000 + spent < retrieval.update < 1060
    assert retrieval.setup >= retrieval.update


def test_an_item_counts_once_whatever_the_seeds():
    items = [Item(str(i), "a question" * (1 + i % 3), ("x",), f"d{i // 2}") for i in range(20)]
    seeds = [
        evaluate(items, lambda item, good=good: Answer("x" if int(item.id) % good else "y", 0.9, 3, 1, 0.1), "accuracy")
        for good in (2, 3)
    ]
    figures = figures_of(seeds, "accuracy")
    assert {figure.n for figure in figures.values()} == {20}
    assert figures["accuracy"].value == pytest.approx((10 + 13) / 40)
    means = mean_rows(seeds)
    assert [row.score for row in means[:4]] == [0, 1, 0.5, 0.5]
    assert [row.id for row in means] == [item.id for item in items]
    parts = slices(means, items)["length"].values()
    assert sum(part.value * part.n for part in parts) == pytest.approx((10 + 13) / 2)


def test_what_cannot_be_compared_is_refused_before_it_costs(home, tiny_model, class_task, tmp_path):
    with pytest.raises(UsageError, match="no comparison"):
        compare(str(class_task), settings(tiny_model, ways=("lora",)), {})
    with pytest.raises(UsageError, match="built-in model"):
        compare(str(class_task), settings(tiny_model, name="smollm2-135m-instruct"), {})
    with pytest.raises(UsageError, match="no folder"):
        compare(str(class_task), settings(tiny_model), {}, report=tmp_path / "absent" / "r.html")
    with pytest.raises(UsageError, match="is a folder"):
        compare(str(class_task), settings(tiny_model), {}, report=tmp_path)
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": "zim"}\n')
    with pytest.raises(DataError, match="can show nothing"):
        compare(str(class_task), settings(tiny_model), {})
    with pytest.raises(CratonError):
        compare(str(tmp_path / "absent.toml"), settings(tiny_model), {})
    assert not list((home / "runs").glob("*")) if (home / "runs").exists() else True


def test_several_models_are_compared_way_by_way(home, tiny_model, class_task):
    other = Path(f"{tiny_model}/../other")
    if not other.exists():
        shutil.copytree(tiny_model, other)
    chosen = settings(tiny_model, models=(str(tiny_model), str(other)), ways=("zero-shot",))
    found = compare(str(class_task), chosen, {})
    labels = [m.label for m in found.measurements if not m.diagnostic]
    assert len(labels) == 2
    assert all(label.endswith(": zero-shot") for label in labels)
    assert found.verdict.kind == "tie"
