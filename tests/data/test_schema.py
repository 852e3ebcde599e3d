"""Schemas: recognised, brought into one form, refused with the line and the remedy where they are wrong or mixed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from craton.data.forms import texts_of
from craton.data.labels import LabelMap
from craton.data.records import Record, read_records
from craton.data.schema import KeySettings, check_schema, schema_of
from craton.errors import CratonError, DataError, FileFormatError, UnknownName

USER, ANSWER, OTHER = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))


def records(*values: dict[str, Any], name: str = "train.jsonl") -> Iterator[Record]:
    return (Record(value, f"{name}:{i}") for i, value in enumerate(values, 1))


def form(value: dict[str, Any], **options: Any) -> tuple[str, dict[str, Any]]:
    checked = check_schema(records(value), **options)
    return checked.schema, next(iter(checked)).value


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ({"text": "t", "id": 7}, "text", {"text": "t"}),
        ({"prompt": "p", "completion": "c"}, "prompt", {"prompt": "p", "completion": "c"}),
        ({"prompt": [USER], "completion": "a"}, "prompt", {"prompt": [USER], "completion": [ANSWER]}),
        ({"messages": [USER, ANSWER]}, "messages", {"messages": [USER, ANSWER], "tools": None}),
        ({"messages": [USER], "tools": [{"a": 1}]}, "messages", {"messages": [USER], "tools": [{"a": 1}]}),
        ({"messages": [USER], "tools": '[{"a": 1}]'}, "messages", {"messages": [USER], "tools": [{"a": 1}]}),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            "preference",
            {"prompt": "p", "chosen": "c", "rejected": "r"},
        ),
        (  # the prompt as messages of its own
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
            "preference",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        ),
        (  # the prompt as text, and again within both answers
            {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]},
            "preference",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        ),
        (  # the prompt only within both answers
            {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            "preference",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        ),
        (
            {"prompt": "p", "completion": "c", "label": True},
            "binary",
            {"prompt": "p", "completion": "c", "label": True},
        ),
        (
            {"prompt": "p", "completion": "c", "label": "0"},
            "binary",
            {"prompt": "p", "completion": "c", "label": False},
        ),
        ({"text": "t", "label": 3}, "labelled", {"text": "t", "label": "3"}),
        ({"anchor": "a", "positive": "p"}, "pairs", {"anchor": "a", "positive": "p", "negatives": []}),
        (
            {"anchor": "a", "positive": "p", "negative": "n"},
            "pairs",
            {"anchor": "a", "positive": "p", "negatives": ["n"]},
        ),
        (
            {"anchor": "a", "positive": "p", "negatives": ["n", "m"]},
            "pairs",
            {"anchor": "a", "positive": "p", "negatives": ["n", "m"]},
        ),
        # Names that others use.
        ({"instruction": "i", "input": "x", "output": "o"}, "prompt", {"prompt": "i\n\nx", "completion": "o"}),
        ({"instruction": "i", "input": "", "output": "o"}, "prompt", {"prompt": "i", "completion": "o"}),
        ({"instruction": "i", "context": "x", "response": "o"}, "prompt", {"prompt": "i\n\nx", "completion": "o"}),
        ({"prompt": "p", "response": "c"}, "prompt", {"prompt": "p", "completion": "c"}),
        ({"question": "q", "answer": "a"}, "prompt", {"prompt": "q", "completion": "a"}),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "messages",
            {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "tools": None},
        ),
        ({"conversations": [USER, ANSWER]}, "messages", {"messages": [USER, ANSWER], "tools": None}),
        # Columns of a table that hold nothing.
        ({"text": "t", "messages": None, "label": None}, "text", {"text": "t"}),
    ],
)
def test_each_form(value: dict[str, Any], schema: str, expected: dict[str, Any]) -> None:
    assert schema_of(value) == schema
    assert form(value) == (schema, expected)


def test_named_keys_and_what_was_decided_about_them() -> None:
    value = {"review": "r", "sentiment": -1, "label": "x", "question": "q", "answer": "a"}
    keys = KeySettings(text_key="review", label_key="sentiment")
    checked = check_schema(records(value), keys=keys)
    assert checked.schema == "labelled"
    assert checked.decisions == ("review read as text", "sentiment read as label")
    assert next(iter(checked)).value == {"text": "r", "label": "-1"}
    assert form(value, keys=KeySettings(text_key="review"), expected=("text",)) == ("text", {"text": "r"})
    assert check_schema(records({"question": "q", "answer": "a"})).decisions == (
        "question, answer read as prompt, completion",
    )


def test_the_task_decides_between_schemas_that_fit() -> None:
    value = {"text": "t", "label": 1, "prompt": "p", "completion": "c"}
    assert form(value, expected=("text",))[0] == "text"
    assert form(value, expected=("labelled",))[0] == "labelled"
    with pytest.raises(DataError, match=r"schema 'pairs' \(anchor, positive\)") as caught:
        form(value, expected=("pairs",))
    assert caught.value.where == "train.jsonl:1"


def test_a_classification_without_labels_asks_for_their_key() -> None:
    with pytest.raises(DataError) as caught:
        form({"text": "t", "category": "c"}, expected=("labelled",))
    assert caught.value.remedy == "name the key of the label: --label-key"


def test_mixed_schemas_name_the_first_of_each() -> None:
    checked = check_schema(records({"text": "a"}, {"text": "b"}, {"prompt": "p", "completion": "c"}))
    with pytest.raises(DataError, match=r"'text' \(train.jsonl:1\) and 'prompt' \(train.jsonl:3\)") as caught:
        list(checked)
    assert caught.value.where == "train.jsonl:3"


def test_records_are_checked_lazily_and_none_is_lost() -> None:
    checked = check_schema(records({"text": "a"}, {"text": "b"}, {"nothing": 1}))
    assert next(checked.records).value == {"text": "a"}
    assert next(checked.records).value == {"text": "b"}
    with pytest.raises(DataError, match="no schema"):
        next(checked.records)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"mesages": []}, "did you mean 'messages' for 'mesages'?"),
        ({"promt": "p", "completion": "c"}, "did you mean 'prompt' for 'promt'?"),
        ({"foo": 1}, "use the keys of one schema: chosen, rejected; messages;"),
        ({"foo": 1}, "--text-key"),
        ({"question": "q", "answer": "a", "context": "c"}, "use the keys"),  # what to do with the context?
        ({}, "(none)"),
        ({"text": None}, "text is null"),
        ({"text": 5}, "text must be text, not a number"),
        ({"prompt": "p", "completion": 5}, "completion must be a list of messages, not a number"),
        ({"messages": "hello"}, "messages must be a list of messages, not text"),
        ({"messages": ["hello"]}, "a message must be an object, not text"),
        ({"messages": [USER], "tools": "x"}, "tools is a string that holds no JSON"),
        ({"chosen": [USER], "rejected": [ANSWER]}, "chosen and rejected share no prompt"),
        ({"chosen": "a", "rejected": "b"}, "chosen must be a list of messages, not text"),
        ({"prompt": "p", "completion": "c", "label": "maybe"}, "label must be true or false, not 'maybe'"),
        ({"text": "t", "label": 0.5}, "label must be a name or a whole number, not 0.5"),
        ({"text": "t", "label": ""}, "label must be a name"),
        ({"anchor": "a", "positive": "p", "negatives": [1]}, "negatives must be texts"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown speaker 'robot'"),
        ({"instruction": ["i"], "output": "o"}, "instruction and input must be text"),
    ],
)
def test_what_fits_no_schema_is_named_with_its_line(value: dict[str, Any], words: str) -> None:
    with pytest.raises(CratonError) as caught:
        list(check_schema(records(value)))
    assert words in str(caught.value)
    assert str(caught.value.where).startswith("train.jsonl:1")


def test_a_table_without_a_header_is_told_so() -> None:
    with pytest.raises(DataError) as caught:
        check_schema(records({"I am still waiting": "x", "card_arrival": "y"}, name="a.csv"))
    assert "the first line must be the header" in str(caught.value.remedy)


def test_a_named_key_that_is_not_there() -> None:
    with pytest.raises(UnknownName) as caught:
        form({"review": "r"}, keys=KeySettings(text_key="reviews"))
    assert (caught.value.remedy, caught.value.where) == ("did you mean 'review'?", "train.jsonl:1")


def test_no_records() -> None:
    with pytest.raises(FileFormatError, match="no records"):
        check_schema(iter(()))


def test_the_texts_of_a_record_are_its_words_and_not_its_labels() -> None:
    parts = [{"type": "text", "text": "q"}]
    value = {"messages": [{"role": "user", "content": parts}, ANSWER], "tools": [{"name": "f"}], "label": "spam"}
    assert list(texts_of(value)) == ["q", "a"]
    assert list(texts_of({"anchor": "a", "positive": "p", "negatives": ["n"]})) == ["a", "p", "n"]


# --- labels --------------------------------------------------------------------------------------------------------


def test_labels_have_one_order_whatever_the_data_s() -> None:
    assert LabelMap.of(["b", "a", "b"]) == LabelMap(("a", "b"))
    assert LabelMap.of(["10", "-3", "2"]).names == ("-3", "2", "10")
    assert LabelMap.of(["10", "x", "2"]).names == ("10", "2", "x")


def test_an_unknown_label_names_its_line() -> None:
    labels = LabelMap(("card_arrival", "atm"))
    assert labels.index("atm") == 1
    with pytest.raises(UnknownName, match="unknown label 'card_arival'") as caught:
        labels.index("card_arival", "test.csv:7")
    assert (caught.value.where, caught.value.remedy) == ("test.csv:7", "did you mean 'card_arrival'?")


def test_labels_are_saved_and_loaded(tmp_path: Path) -> None:
    labels = LabelMap.of(["خوب", "بد"])
    labels.save(tmp_path / "labels.json")
    assert LabelMap.load(tmp_path / "labels.json") == labels
    for content in ('{"labels": ["a", "a"]}', '{"labels": [1]}', "[]", "{"):
        (tmp_path / "labels.json").write_text(content)
        with pytest.raises(FileFormatError):
            LabelMap.load(tmp_path / "labels.json")


# --- real data -----------------------------------------------------------------------------------------------------


def test_real_files(shared_data: Path) -> None:
    banking = check_schema(
        read_records(shared_data / "banking77" / "test.csv"),
        keys=KeySettings(label_key="category"),
        expected=("labelled",),
    )
    labels = LabelMap.of(record.value["label"] for record in banking)
    assert len(labels.names) == 77
    films = shared_data / "parsinlu" / "sentiment_movie_dev.jsonl"
    checked = check_schema(read_records(films), keys=KeySettings(text_key="review", label_key="label"))
    written = [json.loads(line) for line in films.read_text(encoding="utf-8").splitlines()]
    assert [r.value for r in checked] == [{"text": w["review"], "label": w["label"]} for w in written]
