"""The runner: each answer kept at once, an interrupted evaluation goes on, figures and slices."""

from __future__ import annotations

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


def test_the_figures_have_their_intervals():
    found = summary(evaluate(ITEMS, Counting(), "accuracy"), "accuracy")
    assert found["accuracy"].value == 0.5
    assert found["accuracy"].low < 0.5 < found["accuracy"].high
    assert found["accuracy"].clusters == 6
    assert found["brier"].value == pytest.approx((0.2**2 + 0.8**2) / 2)
    assert found["calibration_error"].value == pytest.approx(0.3)
    assert found["latency_p50"].value < found["latency_p95"].value


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
