"""`craton eval`: what it draws, what it refuses before it measures, and what it says of applications that retrieve."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from craton.compare.application import APPLICATION_NAME, PROMPT_NAME, ApplicationSettings, copy_database
from craton.compare.study import INDEX_NAME
from craton.evaluation import harness
from craton.prompting.answering import Passage, PromptedModel
from craton.prompting.defaults import default_prompt
from craton.prompting.prompt import prompt_toml
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.index import Encoder
from craton.retrieval.readers import Reading, find_sources
from craton.store.artifacts import publish_model


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def task(tmp_path) -> Path:
    """Two classes, the first half of the test of one and the second of the other."""
    rows = [{"text": f"the word number {i}", "label": "zim" if i < 20 else "zam"} for i in range(40)]
    lines(tmp_path / "test.jsonl", rows)
    (tmp_path / "task.toml").write_text('choices = ["zim", "zam"]\n[data]\ntest = "test.jsonl"\n')
    return tmp_path / "task.toml"


@pytest.fixture
def never_answers(monkeypatch):
    """Fails where anything is measured."""

    def call(self, item):
        raise AssertionError("an item was answered")

    monkeypatch.setattr(PromptedModel, "__call__", call)


@pytest.mark.parametrize("limit", ["0", "-1"])
@pytest.mark.parametrize("more", [(), ("--long-context",)])
def test_a_limit_is_a_number_above_0(craton, task, tiny_model, never_answers, limit, more):
    status, _, err = craton("eval", tiny_model, *(() if more else (task,)), "--limit", limit, *more)
    assert status == 2
    assert f"a limit of {limit}" in err
    assert "--limit" in err


def test_a_limit_draws_from_all_items_and_always_the_same(craton, task, tiny_model, monkeypatch):
    asked = []
    real = PromptedModel.__call__

    def call(self, item):
        asked.append(item.id)
        return real(self, item)

    monkeypatch.setattr(PromptedModel, "__call__", call)
    seen = []
    for _ in range(2):
        asked.clear()
        status, out, err = craton("eval", tiny_model, task, "--limit", "16", "--threads", "1", "--json")
        assert status == 0, err
        seen.append(tuple(asked))
    assert seen[0] == seen[1]
    places = [int(re.search(r"\d+$", one).group()) for one in seen[0][1:]]
    assert len(set(places)) == 16
    assert places == sorted(places)
    assert min(places) <= 20 < max(places)  # both classes
    [one] = json.loads(out)["evaluations"]
    assert one["figures"]["accuracy"]["n"] == 16
    assert "16 of 40 test items, drawn with seed 0" in one["notes"]


@pytest.mark.parametrize(("report", "said"), [("nodir/x.html", "no such folder"), (".", "is a folder")])
def test_a_report_that_cannot_be_written_is_refused_at_once(
    craton, task, tiny_model, never_answers, tmp_path, report, said
):
    status, _, err = craton("eval", tiny_model, task, "--report", tmp_path / report)
    assert status == 2
    assert said in err


def test_a_report_in_a_folder_that_nobody_may_write_to_is_refused_at_once(
    craton, task, tiny_model, never_answers, tmp_path, monkeypatch
):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may be allowed everything
    status, _, err = craton("eval", tiny_model, task, "--report", tmp_path / "x.html")
    assert status == 2
    assert "cannot be written to" in err


def test_figures_of_the_harness_have_its_number_of_items(craton, tiny_model, monkeypatch):
    given = {
        "a group": {},
        "a task": {"acc": {"value": 0.5, "stderr": 0.1, "n": 24}, "ppl": {"value": 9.0, "stderr": None, "n": 24}},
    }
    monkeypatch.setattr(harness, "run_harness", lambda *names, **options: given)
    status, out, err = craton("eval", tiny_model, "harness:a", "--threads", "1", "--json")
    assert status == 0, err
    [one] = json.loads(out)["evaluations"]
    assert {name: figure["n"] for name, figure in one["figures"].items()} == {"acc": 24, "ppl": 24}
    assert one["figures"]["acc"]["low"] == pytest.approx(0.5 - 0.196)
    assert one["figures"]["ppl"]["low"] is None


def test_of_a_text_it_says_what_the_interval_is_of(craton, tiny_model, tmp_path):
    (tmp_path / "text.txt").write_text("the code of a is red blue green zim zam " * 200)
    status, out, err = craton("eval", tiny_model, tmp_path / "text.txt", "--threads", "1", "--limit", "3")
    assert status == 0, err
    assert "windows of this one text" in out


CODES = range(0, 84, 7)


@pytest.fixture
def application(tmp_path, monkeypatch, tiny_model) -> str:
    """The name of an application that shows two passages with each question; `items.jsonl` is its test."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    docs = tmp_path / "docs"
    docs.mkdir()
    rows = []
    for i, code in enumerate(CODES):
        (docs / f"{i}.txt").write_text(f"the code of number {i} is {1000 + code}.")
        question = f"what is the code of number {i}"
        rows.append({"question": question, "answer": str(1000 + code), "gold": f"docs/{i}.txt", "group": str(i)})
    lines(tmp_path / "items.jsonl", rows)
    (tmp_path / "task.toml").write_text('[data]\ntest = "items.jsonl"\n')
    encoder, path = Encoder(str(tiny_model), 1), tmp_path / "index.sqlite"
    with Collection.create(path, CollectionSettings(encoder=str(tiny_model))) as collection:
        collection.sync([*find_sources([str(docs)], reading=Reading())], encoder, encoder.count)
    settings = ApplicationSettings(
        task="codes", way="retrieval", model=str(tiny_model), encoder=str(tiny_model), passages=2, measured="not yet"
    )

    def build(folder: Path) -> None:
        (folder / APPLICATION_NAME).write_text(settings.model_dump_json())
        (folder / PROMPT_NAME).write_text(prompt_toml(default_prompt("answer", passages=True)))
        copy_database(path, folder / INDEX_NAME)

    publish_model("codes", build, source="file:codes", parents=(), licence=None)
    return "codes"


def test_of_an_application_it_tells_what_was_retrieved_and_what_it_proves(craton, application, tmp_path, monkeypatch):
    shown: dict[str, list[Passage]] = {}
    real = PromptedModel.read

    def read(self, item):
        ids, passages = real(self, item)
        shown[item.gold[0]] = passages
        self.asked = passages
        return ids, passages

    # The first passage's code is proven, whatever the question; a code that no document holds is not.
    def generate(self, ids):
        return f"{re.search(r'[0-9]{4}', self.asked[0].text).group()}. It is 5.", None, 4

    monkeypatch.setattr(PromptedModel, "read", read)
    monkeypatch.setattr(PromptedModel, "_generate", generate)
    page = tmp_path / "r.html"
    words = ("eval", application, tmp_path / "task.toml", "--threads", "1", "--report", page)
    status, out, err = craton(*words, "--json")
    assert status == 0, err
    figures = json.loads(out)["evaluations"][0]["figures"]
    assert len(shown) == len(CODES)
    names = {gold: [passage.name for passage in passages] for gold, passages in shown.items()}
    assert all(len(one) == 2 for one in names.values())
    recall = [gold in one for gold, one in names.items()]
    gain = [{0: 1.0, 1: 1 / np.log2(3)}[one.index(gold)] if gold in one else 0.0 for gold, one in names.items()]
    assert sum(recall) > 0
    assert figures["recall@2"]["value"] == pytest.approx(np.mean(recall))
    assert figures["ndcg@2"]["value"] == pytest.approx(np.mean(gain))
    assert figures["faithfulness"]["value"] == pytest.approx(0.5)
    assert figures["faithfulness"]["n"] == figures["recall@2"]["n"] == len(CODES)
    assert {"f1", "exact_match"} <= set(figures)
    status, out, err = craton(*words)
    assert status == 0, err
    assert re.search(r"faithfulness +50\.0% +\S+ to \S+ +12", out)
    for name in ("recall@2", "ndcg@2", "faithfulness"):
        assert name in out
        assert f"<td>{name}</td>" in page.read_text()
