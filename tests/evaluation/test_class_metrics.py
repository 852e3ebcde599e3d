"""Class metrics: scikit-learn's figures, and missing answers that are wrong."""

from __future__ import annotations

import random
import warnings

import pytest

from craton.errors import DataError, UsageError
from craton.evaluation.class_metrics import accuracy, confusion, confusion_of, encoded, macro_f1, matthews


@pytest.mark.peer
@pytest.mark.parametrize("missing", [False, True])
def test_agreement_with_scikit_learn(missing: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(0)
    for _ in range(150):
        classes = [f"c{i}" for i in range(rng.randint(1, 5))]
        n = rng.randint(1, 30)
        labels = rng.choices(classes, k=n)
        given = [label if rng.random() < 0.5 else rng.choice(classes) for label in labels]
        if missing:
            given = [None if rng.random() < 0.3 else label for label in given]
        filled = ["no answer" if label is None else label for label in given]
        occur = sorted({*labels, *filled} - {"no answer"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert accuracy(given, labels) == pytest.approx(metrics.accuracy_score(labels, filled))
            expected = metrics.f1_score(labels, filled, labels=occur, average="macro", zero_division=0)
            assert macro_f1(given, labels) == pytest.approx(expected)
            assert matthews(given, labels) == pytest.approx(metrics.matthews_corrcoef(labels, filled), abs=1e-12)
            table = metrics.confusion_matrix(labels, filled, labels=[*occur, "no answer"])
        own = confusion(given, labels)
        assert own.classes == tuple(occur)
        assert own.counts_KM.tolist() == table[:-1].tolist()


def test_a_missing_answer_costs_recall_only() -> None:
    assert accuracy([None, "b"], ["a", "b"]) == 0.5
    assert macro_f1([None, "a", "b"], ["a", "a", "b"]) == pytest.approx((2 / 3 + 1) / 2)
    assert macro_f1([None, None], ["a", "b"]) == 0
    assert matthews([None, None], ["a", "b"]) == 0
    assert matthews(["a", "a"], ["a", "a"]) == 0  # undefined


def test_labels_of_any_kind() -> None:
    assert accuracy([1, 0, True], [1, 0, 1]) == 1
    assert confusion([1, "x", (2,)], ["x", 1, (2,)]).accuracy() == pytest.approx(1 / 3)


def test_codes_may_be_resampled() -> None:
    given, labels = ["a", None, "b", "c"], ["a", "b", "b", "a"]
    classes, codes = encoded(given, labels)
    rows = [0, 2, 2, 3]
    expected = macro_f1([given[i] for i in rows], [labels[i] for i in rows])
    assert confusion_of(classes, codes[rows]).macro_f1() == expected


def test_refusals() -> None:
    with pytest.raises(DataError):
        accuracy([], [])
    with pytest.raises(DataError, match="item 1"):
        macro_f1(["a", "a"], ["a", None])
    with pytest.raises(UsageError):
        matthews(["a"], ["a", "b"])
