"""Every metric against a value made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from craton.errors import UsageError
from craton.training.metrics import accuracy, bits_per_byte, macro_f1, mean_reciprocal_rank, recall_at_k

PREDICTED = np.array([0, 0, 1, 2, 2, 2])
LABELS = np.array([0, 1, 1, 2, 0, 3])


def test_accuracy() -> None:
    assert accuracy(PREDICTED, LABELS) == pytest.approx(3 / 6)


def test_macro_f1() -> None:
    # Class 0: 1 of 2 given and 1 of 2 true, 1/2. Class 1: 1 of 1 and 1 of 2, 2/3. Class 2: 1 of 3 and 1 of 1, 1/2.
    # Class 3 occurs once and is never given: 0.
    assert macro_f1(PREDICTED, LABELS) == pytest.approx((1 / 2 + 2 / 3 + 1 / 2 + 0) / 4)


def test_macro_f1_does_not_follow_the_majority() -> None:
    labels = np.array([0] * 9 + [1])
    assert accuracy(np.zeros(10, dtype=np.int64), labels) == pytest.approx(0.9)
    assert macro_f1(np.zeros(10, dtype=np.int64), labels) == pytest.approx((18 / 19 + 0) / 2)


SCORES = np.array([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.6, 0.7], [0.5, 0.4, 0.3, 0.2]])
RELEVANT = np.array([[0, 0, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)


def test_mean_reciprocal_rank() -> None:
    # Ranks of the first relevant one: 2, 2 (0.7 behind 0.8), 1.
    assert mean_reciprocal_rank(SCORES, RELEVANT) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)


def test_recall_at_k() -> None:
    assert recall_at_k(SCORES, RELEVANT, 1) == pytest.approx((0 + 0 + 1) / 3)
    assert recall_at_k(SCORES, RELEVANT, 2) == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert recall_at_k(SCORES, RELEVANT, 4) == pytest.approx(1)


def test_equal_scores_earn_nothing() -> None:
    scores, relevant = np.zeros((2, 5)), np.eye(2, 5, dtype=bool)
    assert mean_reciprocal_rank(scores, relevant) == pytest.approx(1 / 5)
    assert recall_at_k(scores, relevant, 4) == 0


def test_bits_per_byte() -> None:
    # 3 tokens of 1/4, 1/8 and 1/2: 2 + 3 + 1 bits, over a text of 4 letters in 8 bytes.
    assert bits_per_byte(-np.log([1 / 4, 1 / 8, 1 / 2]).sum(), len("سلام".encode())) == pytest.approx(6 / 8)


def test_nothing_to_measure_is_refused() -> None:
    nothing = np.array([], dtype=np.int64)
    for metric in (accuracy, macro_f1):
        with pytest.raises(UsageError, match="0 predictions"):
            metric(nothing, nothing)
        with pytest.raises(UsageError, match="6 predictions for 5 labels"):
            metric(PREDICTED, LABELS[:5])
    with pytest.raises(UsageError, match="no relevant"):
        mean_reciprocal_rank(SCORES, RELEVANT & False)
    with pytest.raises(UsageError, match="no text"):
        bits_per_byte(1.0, 0)
