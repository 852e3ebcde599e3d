"""Tasks: read from every usual form, split by source document, leaks removed, the test sealed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.errors import CratonError, DataError, UsageError
from craton.evaluation.items import Item
from craton.evaluation.tasks import Sealed, SplitSettings, load_task, read_items, split_by_group


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def squad(path, text="The answer is {}."):
    paragraphs = [
        {
            "context": text.format(i),
            "qas": [{"id": str(i), "question": f"What is it, the {i}th?", "answers": [{"text": str(i)}]}],
        }
        for i in range(9)
    ]
    articles = [{"title": f"T{i // 3}", "paragraphs": paragraphs[i : i + 3]} for i in range(0, 9, 3)]
    path.write_text(json.dumps({"data": articles}))
    return path


def test_a_data_file_is_a_task(tmp_path):
    rows = [{"text": f"this is text number {i} of the file", "label": "ab"[i % 2]} for i in range(60)]
    task = load_task(lines(tmp_path / "data.jsonl", rows))
    assert (task.kind, task.metric, task.choices) == ("choice", "accuracy", ("a", "b"))
    assert len(task.train) + len(task.dev) + len(task.test) == 60
    assert "label" not in task.train[0].fields  # a prompt could otherwise show the answer


def test_a_task_file_names_files_beside_it(tmp_path):
    for name, start in (("train", 0), ("test", 100)):
        lines(
            tmp_path / f"{name}.jsonl",
            [{"q": f"what is {i} plus {i}", "a": str(2 * i)} for i in range(start, start + 20)],
        )
    (tmp_path / "t.toml").write_text('[data]\ntrain = "train.jsonl"\ntest = "test.jsonl"\ninput = "q"\nanswer = "a"\n')
    task = load_task(tmp_path / "t.toml")
    assert (task.name, task.kind, task.metric) == ("t", "answer", "f1")
    assert (len(task.train), len(task.dev), len(task.test)) == (13, 7, 20)


def test_squad_files_bring_their_documents(tmp_path):
    items = read_items(squad(tmp_path / "s.json"))
    assert [item.group for item in items[::3]] == ["T0", "T1", "T2"]
    task = load_task(tmp_path / "s.json")
    assert len(task.passages) == 9
    assert all(item.gold[0] in task.passages for item in task.train)


@given(
    groups=st.lists(st.integers(0, 12), min_size=4, max_size=80).filter(lambda g: len(set(g)) > 2),
    seed=st.integers(0, 99),
)
def test_no_document_is_in_two_parts(groups, seed):
    items = [Item(str(i), f"q{i}", ("a",), str(g)) for i, g in enumerate(groups)]
    parts = split_by_group(items, SplitSettings(seed=seed))
    assert sorted(item.id for part in parts for item in part) == sorted(item.id for item in items)
    names = [{item.group for item in part} for part in parts]
    assert all(names)
    assert len(set().union(*names)) == sum(map(len, names))
    assert parts == split_by_group(items, SplitSettings(seed=seed))


def test_items_that_repeat_the_test_are_removed_and_counted(tmp_path):
    long = "the quick brown fox jumps over the lazy dog while the cat sleeps on the warm mat near the fire"
    train = [{"text": f"training text number {i} says something", "label": "a"} for i in range(10)]
    train += [{"text": long, "label": "a"}, {"text": f"Yes: {long} today", "label": "b"}]
    lines(tmp_path / "train.jsonl", train)
    lines(tmp_path / "test.jsonl", [{"text": long.upper(), "label": "a"}, {"text": "another", "label": "b"}])
    (tmp_path / "t.toml").write_text('[data]\ntrain = "train.jsonl"\ntest = "test.jsonl"\n')
    task = load_task(tmp_path / "t.toml")
    assert len(task.leaks.pairs) == 2
    assert len(task.train) + len(task.dev) == 10
    assert any("near-duplicates" in line for line in task.decisions)


def test_a_sealed_test_opens_once():
    sealed = Sealed([Item("1", "q", ("a",), "g")])
    assert len(sealed) == sealed.groups == 1
    assert sealed.open()[0].id == "1"
    with pytest.raises(UsageError, match="second look"):
        sealed.open()


def asked(folder, head="", **more):
    folder.mkdir(exist_ok=True)
    rows = [{"q": f"what is {i} plus {i}", "a": str(2 * i), "gold": f"{i}.txt", **more} for i in range(20)]
    lines(folder / "items.jsonl", rows)
    (folder / "t.toml").write_text(f'{head}\n[data]\nitems = "items.jsonl"\ninput = "q"\nanswer = "a"\n')
    return folder / "t.toml"


def test_the_digest_is_of_all_that_is_measured_and_learnt_from(tmp_path):
    plain = load_task(asked(tmp_path / "a")).digest
    assert load_task(asked(tmp_path / "a")).digest == plain
    others = [
        {"head": 'instruction = "Add."'},
        {"head": 'docs = ["handbook"]'},
        {"head": 'docs = ["other"]'},
        {"head": 'kind = "choice"\nchoices = ["0", "1"]'},
        {"head": 'kind = "choice"\nchoices = ["1", "0"]'},
        {"gold": "another.txt"},
        {"hint": "a prompt may show it"},
    ]
    digests = [plain, *(load_task(asked(tmp_path / "a", **other)).digest for other in others)]
    digests += [load_task(squad(tmp_path / "s.json", text)).digest for text in ("The answer is {}.", "It is {}!")]
    assert len(set(digests)) == len(digests)


def test_the_digest_does_not_depend_on_where_the_task_lies(tmp_path, monkeypatch):
    here = load_task(asked(tmp_path / "a", 'docs = ["handbook", "package:json"]'))
    assert here.sources == (str(tmp_path / "a" / "handbook"), "package:json")
    assert load_task(asked(tmp_path / "b", 'docs = ["handbook", "package:json"]')).digest == here.digest
    monkeypatch.chdir(tmp_path)
    assert load_task("a/t.toml").digest == here.digest
    monkeypatch.chdir(tmp_path / "a")
    assert load_task("t.toml").digest == here.digest


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "x"}] * 5, "no key says what the answer is"),
        ([{"text": " ", "label": "a"}] * 5, "empty"),
        ([{"text": "x", "label": "a", "source": "one"}] * 5, "one source document"),
        ([], "no records"),
    ],
)
def test_what_makes_no_task_is_refused_in_words(tmp_path, rows, says):
    with pytest.raises(CratonError, match=says):
        load_task(lines(tmp_path / "d.jsonl", rows))


def test_an_unknown_key_of_a_task_file_is_named(tmp_path):
    (tmp_path / "t.toml").write_text('[data]\ntrian = "x"\n')
    with pytest.raises(UsageError, match="did you mean") as caught:
        load_task(tmp_path / "t.toml")
    assert "data.train" in str(caught.value) or "'train'" in str(caught.value)
    (tmp_path / "u.toml").write_text('[data]\nitems = "d.jsonl"\ngroup = "nothing"\n')
    lines(tmp_path / "d.jsonl", [{"text": "x", "label": "a"}] * 3)
    with pytest.raises(DataError, match="nothing"):
        load_task(tmp_path / "u.toml")
