"""A fusion is tuned on some questions, kept in the index, and judged by questions about other documents."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from craton.errors import DataError
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.documents import Document
from craton.retrieval.fusion import DENSE, LEXICAL
from craton.retrieval.index import Index
from craton.retrieval.tuning import read_questions, tune

DOCUMENTS = 60


class File:
    """A source file of one document, "d7", that alone has the word "w7"."""

    def __init__(self, number: int) -> None:
        self.name, self.kind, self.digest = f"d{number}", "text", str(number)
        self.text = f"The word w{number} stands here."

    def documents(self):
        yield Document(self.name, self.name, self.text, "text")


def blind(texts):
    """Vectors that say nothing of their texts."""
    vectors = np.array([np.random.default_rng(list(text.encode())).standard_normal(8) for text in texts])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def index(tmp_path):
    encoder = SimpleNamespace(name="blind")
    with Collection.create(tmp_path / "x.sqlite", CollectionSettings(encoder="blind")) as collection:
        collection.sync([File(n) for n in range(DOCUMENTS)], blind, lambda text: len(text.split()))
        yield Index(collection, blind, encoder.name)


def questions(folder, count, key="gold", suffix=".jsonl"):
    rows = [(f"Where does w{n} stand?", f"d{n}") for n in range(count)]
    path = folder / f"questions{suffix}"
    if suffix == ".csv":
        path.write_text("".join(f"{a},{b}\n" for a, b in [("question", key), *rows]))
    else:
        path.write_text("".join(json.dumps({"question": a, key: b}) + "\n" for a, b in rows))
    return path


@pytest.mark.parametrize(("key", "suffix"), [("gold", ".jsonl"), ("document", ".jsonl"), ("gold", ".csv")])
def test_the_better_search_is_found_kept_and_judged_by_other_documents(index, tmp_path, key, suffix):
    task = read_questions(questions(tmp_path, DOCUMENTS, key, suffix))
    assert {gold for item in task.dev for gold in item.gold}.isdisjoint(item.group for item in task.train)
    found = tune(index, task)
    assert found.chosen.fusion.kind != "dense"
    assert index.collection.fusion == found.chosen.fusion
    assert found.replaced == DENSE
    assert found.chosen.questions + found.after.n == DOCUMENTS
    assert found.after.value == 1.0 > found.before.value + 0.5
    assert found.gain.value == pytest.approx(found.after.value - found.before.value)
    again = tune(index, read_questions(questions(tmp_path, DOCUMENTS, key, suffix)))
    assert again.replaced == found.chosen.fusion
    assert again.gain.value == 0


def test_a_task_file_says_more(index, tmp_path):
    path = questions(tmp_path, DOCUMENTS, key="page")
    (tmp_path / "t.toml").write_text(f'[data]\nitems = "{path.name}"\nanswer = "page"\ngold = "page"\ngroup = "page"\n')
    assert tune(index, read_questions(tmp_path / "t.toml")).chosen.fusion.kind != "dense"


def test_questions_about_other_documents_are_counted_and_too_few_change_nothing(index, tmp_path):
    assert tune(index, read_questions(questions(tmp_path, DOCUMENTS + 10))).left_out == 10
    index.collection.set_fusion(LEXICAL)
    with pytest.raises(DataError, match="questions to tune on"):
        tune(index, read_questions(questions(tmp_path, 9)))
    assert index.collection.fusion == LEXICAL


def test_questions_without_their_documents_are_refused(tmp_path):
    with pytest.raises(DataError, match="which document") as caught:
        read_questions(questions(tmp_path, 20, key="page"))
    assert "'page'" in str(caught.value.remedy)
