"""Inspection: the tokens as a reader sees them, samples that are fair and repeatable, problems that are all found."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from craton.checkpoints.checkpoint import Checkpoint
from craton.data.example import next_token_targets, untrained
from craton.data.inspection import KEPT_PROBLEMS, Inspection, inspect_records, tokens_of
from craton.data.records import Record
from craton.data.rendering import RenderSettings
from craton.data.schema import check_schema
from craton.modalities.text import Tokenizer


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return Checkpoint.open(smollm2_gguf).tokenizer()


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def inspect(values: list[dict[str, Any]], tokenizer: Tokenizer | None = None, **options: Any) -> Inspection:
    records: Iterator[Record] = (Record(value, f"a.jsonl:{i}") for i, value in enumerate(values, 1))
    samples = options.pop("samples", 3)
    return inspect_records(
        check_schema(records), tokenizer=tokenizer, settings=RenderSettings(**options), samples=samples
    )


def test_tokens_show_what_is_learnt_and_which_are_special(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>Hi fox<|im_end|>")
    tokens = tokens_of(next_token_targets(ids, [False, False, True, True]), smollm2)
    assert [(t.text, t.trained, t.special) for t in tokens] == [
        ("<|im_start|>", False, True), ("Hi", False, False), (" fox", True, False), ("<|im_end|>", True, True)
    ]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("سلام ‌🦊\n"), max_size=30))
def test_the_texts_of_the_tokens_are_the_text(smollm2: Tokenizer, text: str) -> None:
    sequence = untrained(smollm2.encode(text))
    tokens = tokens_of(sequence, smollm2)
    assert len(tokens) == len(sequence)
    assert "".join(t.text for t in tokens).startswith(smollm2.decode(sequence.ids.tolist()).rstrip("\ufffd"))


def test_all_is_counted(smollm2: Tokenizer) -> None:
    values = [chat("Hi", "Hello"), chat("Hi", "Hello"), chat("سلام", "درود"), chat("Hi")]
    found = inspect(values, smollm2)
    assert (found.schema, found.texts.texts, found.texts.duplicates) == ("messages", 4, 1)
    assert found.report is not None
    assert found.report.examples == 3
    assert found.tokens.total == found.kept
    # An answer and its end, in each of three.
    assert found.trained == 2 * 2 + len(smollm2.encode("درود")) + 1
    assert [str(problem.where) for problem in found.problems] == ["a.jsonl:4"]
    assert found.problem_count == 1
    assert "answers and documents end in <|im_end|>, which is trained" in found.decisions
    assert [sample.record.origin for sample in found.samples] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_every_kind_of_problem_is_found_and_the_rest_is_read(smollm2: Tokenizer) -> None:
    values = [
        {"prompt": "p", "completion": " "},
        {"prompt": "p", "completion": " fine"},
        {"prompt": "<|im_start|><|im_start|>p", "completion": " c"},
    ]
    found = inspect(values, smollm2)
    assert [(p.where, p.what) for p in found.problems] == [
        ("a.jsonl:1", "completion is empty"),
        ("a.jsonl:3", "the sequence begins with two BOS tokens"),
    ]
    assert found.texts.texts == 3


def test_a_flood_of_problems_is_counted_and_not_kept(smollm2: Tokenizer) -> None:
    found = inspect([chat("Hi")] * (KEPT_PROBLEMS + 50), smollm2)
    assert (len(found.problems), found.problem_count) == (KEPT_PROBLEMS, KEPT_PROBLEMS + 50)


def test_long_records_are_counted_by_what_becomes_of_them(smollm2: Tokenizer) -> None:
    values = [{"text": "word " * 50}, {"text": "word"}]
    fates = {"drop": (1, 0, 0, 1), "truncate": (0, 1, 0, 2), "split": (0, 0, 1, 7)}
    for overlong, fate in fates.items():
        report = inspect(values, smollm2, max_tokens=10, overlong=overlong).report
        assert report is not None
        assert (report.dropped, report.truncated, report.split, report.examples) == fate


def test_sequences_have_names(smollm2: Tokenizer) -> None:
    found = inspect([{"prompt": "p", "chosen": " c", "rejected": " r"}], smollm2)
    assert list(found.samples[0].sequences) == ["chosen", "rejected"]
    found = inspect([{"anchor": "a", "positive": "p", "negatives": ["n", "m"]}], smollm2)
    assert list(found.samples[0].sequences) == ["anchor", "positive", "negative 1", "negative 2"]


def test_labels_are_counted_and_nothing_needs_a_model() -> None:
    found = inspect([{"text": f"t{i}", "label": i % 3} for i in range(8)])
    assert found.labels == Counter({"0": 3, "1": 3, "2": 2})
    assert found.report is None
    assert found.as_dict()["tokens"] is None
    assert found.samples[0].sequences == {}


def test_samples_are_spread_over_the_data_and_the_same_each_time() -> None:
    values = [{"text": str(i)} for i in range(1000)]
    picks = [[int(s.record.value["text"]) for s in inspect(values, samples=40).samples] for _ in range(2)]
    assert picks[0] == picks[1] == sorted(picks[0])
    assert len(set(picks[0])) == 40
    assert 300 < sum(picks[0]) / 40 < 700
    assert inspect(values, samples=0).samples == []


def test_json_holds_everything_whatever_a_table_held(smollm2: Tokenizer) -> None:
    value = chat("سلام", "درود")
    value["messages"][0]["when"] = datetime.date(2026, 1, 1)
    document = json.loads(json.dumps(inspect([value]).as_dict()))
    assert document["samples"][0]["record"]["messages"][0]["when"] == "2026-01-01"
    document = json.loads(json.dumps(inspect([chat("سلام", "درود"), chat("x")], smollm2).as_dict()))
    assert document["tokens"]["overlong"] == 0
    assert document["problems"][0]["code"] == "bad_data"
    tokens = document["samples"][0]["sequences"]["messages"]
    assert "".join(t["text"] for t in tokens if t["trained"]) == "درود<|im_end|>"


def test_a_turn_that_ends_in_another_token_than_generation_does_is_told() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "<turn>": 2}, unk_token="a"))
    backend.add_special_tokens(["<end>", "<turn>"])
    template = (
        "{% for m in messages %}{{ '<turn>' + m['content'] + '<turn>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>' }}{% endif %}"
    )
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": "<end>"}, chat_templates={"default": template})
    decisions = inspect([chat("a", "a")], tokenizer).decisions
    assert any(decision.startswith("<turn> does not end a generation of this model") for decision in decisions)
