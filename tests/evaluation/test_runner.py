"""The runner: each answer kept at once, an interrupted evaluation goes on, figures and slices."""

from __future__ import annotations

import json

import numpy as np
import pytest

from craton.evaluation.items import Answer, Item
from craton.evaluation.runner import evaluate, score, script_of, slices, summary

ITEMS = [
    Item(str(i), "a question " * (1 + i % 5), ("yes" if i % 2 else "no",), f"d{i % 6}", fields={"lang": "en"})
    for i in range(30)
]


class Counting:
    def __init__(self, fail_at=None):
        self.asked, self.fail_at = 0, fail_at

    def __call__(self, item):
        self.asked += 1
        if self.asked == self.fail_at:
            raise KeyboardInterrupt
        return Answer("Yes", 0.8, 10, 2, 0.01 * self.asked)


def test_an_interrupted_evaluation_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(ITEMS, Counting(fail_at=11), "accuracy", rows=path)
    second = Counting()
    rows = evaluate(ITEMS, second, "accuracy", rows=path)
    assert second.asked == 20
    assert [row.id for row in rows] == [item.id for item in ITEMS]
    assert sum(row.score for row in rows) == 15
    assert evaluate(ITEMS, Counting(fail_at=1), "accuracy", rows=path) == rows
    # What an older version kept of each row beside these fields is not missed.
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"found_gold": 1.0}) + "\n" for row in kept))
    assert evaluate(ITEMS, Counting(fail_at=1), "accuracy", rows=path) == rows


def test_the_figures_have_their_intervals():
    found = summary(evaluate(ITEMS, Counting(), "accuracy"), "accuracy")
    assert found["accuracy"].value == 0.5
    assert found["accuracy"].low < 0.5 < found["accuracy"].high
    assert found["accuracy"].clusters == 6
    assert found["brier"].value == pytest.approx((0.2**2 + 0.8**2) / 2)
    assert found["calibration_error"].value == pytest.approx(0.3)
    assert found["latency_p50"].value < found["latency_p95"].value


def test_calibration_is_of_what_the_metric_counts():
    """SQuAD's exact match drops punctuation: "C++" would count as a right "C#", given with all confidence."""
    items = [Item(str(i), "which language", ("C#",), f"d{i}") for i in range(20)]
    found = summary(evaluate(items, lambda item: Answer("C++", 1.0, 1, 1, 0.1), "accuracy"), "accuracy")
    assert found["accuracy"].value == 0
    assert found["brier"].value == 1
    assert found["calibration_error"].value == 1


@pytest.mark.parametrize("metric", ["f1", "exact_match", "contains", "rouge_l"])
def test_answers_have_f1_and_exact_match_whatever_counts(metric):
    items = [Item(str(i), "who", ("the old cat",), f"d{i}") for i in range(4)]
    said = ["old cat", "a dog", "cat", "The old cat."]
    rows = evaluate(items, lambda item: Answer(said[int(item.id)], None, 1, 1, 0.1), metric)
    found = summary(rows, metric)
    assert next(iter(found)) == metric
    assert found["f1"].value == pytest.approx((1 + 0 + 2 / 3 + 1) / 4)
    assert found["exact_match"].value == 0.5
    classes = evaluate(ITEMS, Counting(), "accuracy")
    assert "f1" not in summary(classes, "accuracy")
    assert "f1" not in summary(classes, "contains", kind="choice")
    assert {"f1", "exact_match"} <= set(summary(classes, "accuracy", kind="answer"))


def test_what_was_retrieved_has_recall_and_ndcg():
    shown = {"0": ("a", "a", "b"), "1": ("x", "a", "a"), "2": (), "3": ("x", "y", "z"), "4": ("x", "a", "b")}
    items = [Item(i, "q", ("a",), f"d{i}", gold=() if i == "3" else ("a", "b")) for i in shown]
    found = summary(evaluate(items, lambda item: Answer("a", None, 1, 1, 0.1, shown[item.id]), "f1"), "f1")
    # Item 3 does not say which documents hold its answer; for item 2 nothing was found, which counts as nothing.
    assert found["recall@3"].n == found["ndcg@3"].n == 4
    assert found["recall@3"].value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    second, third = 1 / np.log2(3), 1 / 2
    assert found["ndcg@3"].value == pytest.approx((1 + second / (1 + second) + (second + third) / (1 + second)) / 4)
    assert found["recall@3"].low < found["recall@3"].value < found["recall@3"].high
    unread = summary(evaluate(items, lambda item: Answer("a", None, 1, 1, 0.1), "f1"), "f1")
    assert not any(name.startswith(("recall", "ndcg")) for name in unread)


def test_slices_are_by_length_answer_and_key():
    found = slices(evaluate(ITEMS, Counting(), "accuracy"), ITEMS, ("lang",))
    assert set(found) == {"length", "answer"}  # one script and one language are no slices
    assert found["answer"]["yes"].value == 1
    assert sum(one.n for one in found["length"].values()) == 30


@pytest.mark.parametrize(
    ("metric", "answer", "expected"),
    [
        ("accuracy", " YES ", 1),
        ("exact_match", "the yes.", 1),
        ("f1", "yes sir", 2 / 3),
        ("contains", "oh yes!", 1),
        ("rouge_l", "yes", 1),
    ],
)
def test_scores(metric, answer, expected):
    assert score(answer, Item("1", "q", ("yes", "sí"), "g"), metric) == pytest.approx(expected)


def test_scripts_are_told():
    assert [script_of(text) for text in ("hello", "سلام دنیا", "漢字", "12")] == ["Latin", "Arabic", "Han", "none"]
