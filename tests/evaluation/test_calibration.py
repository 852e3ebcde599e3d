"""Calibration: errors by their definition, in bins that are equally wide or equally full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.errors import DataError, UsageError
from craton.evaluation.calibration import (
    brier,
    brier_multiclass,
    expected_calibration_error,
    reliability_table,
)

answers = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


@given(answers, st.integers(1, 15))
def test_equal_width_is_the_definition(pairs: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = zip(*pairs, strict=True)
    expected = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [(c, y) for c, y in pairs if low < c <= high or (b == 0 and c == 0)]
        if inside:
            gap = abs(sum(c for c, _ in inside) - sum(y for _, y in inside))
            expected += gap / len(pairs)
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)


@given(answers, st.integers(1, 15), st.booleans())
def test_bins_hold_all_answers_in_order(pairs: list[tuple[float, bool]], bins: int, adaptive: bool) -> None:
    confidence, correct = zip(*pairs, strict=True)
    table = reliability_table(confidence, correct, bins, adaptive=adaptive)
    assert sum(row.n for row in table) == len(pairs)
    assert len(table) <= bins
    assert sum(row.n * row.accuracy for row in table) == pytest.approx(sum(correct))
    for row in table:
        assert row.low - 1e-12 <= row.confidence <= row.high + 1e-12
    assert [row.high for row in table] == sorted(row.high for row in table)


def test_adaptive_bins_are_equally_full_and_keep_ties_together() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(1000) ** 4
    assert [row.n for row in reliability_table(confidence, confidence > 2, 10, adaptive=True)] == [100] * 10
    tied = reliability_table([0.5] * 90 + [0.9] * 10, [1] * 100, 10, adaptive=True)
    assert [(row.confidence, row.n) for row in tied] == [(pytest.approx(0.5), 90), (pytest.approx(0.9), 10)]


def test_a_calibrated_model_has_a_small_error_and_a_boaster_a_large_one() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.random(20_000)
    correct = rng.random(20_000) < confidence
    for adaptive in (False, True):
        assert expected_calibration_error(confidence, correct, adaptive=adaptive) < 0.02
    assert expected_calibration_error([1.0] * 10, [1] * 5 + [0] * 5) == pytest.approx(0.5)


@pytest.mark.peer
def test_brier_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(2)
    for _ in range(100):
        n, K = int(rng.integers(2, 30)), int(rng.integers(2, 5))
        confidence, correct = rng.random(n), rng.integers(0, 2, n)
        expected = metrics.brier_score_loss(correct, confidence, pos_label=1)
        assert brier(confidence, correct) == pytest.approx(expected)
        probabilities, labels = rng.dirichlet(np.ones(K), n), rng.integers(0, K, n)
        expected = np.mean([np.sum((row - np.eye(K)[y]) ** 2) for row, y in zip(probabilities, labels, strict=True)])
        assert brier_multiclass(probabilities, labels) == pytest.approx(expected)
    two = np.stack([1 - confidence, confidence], axis=1)
    assert brier_multiclass(two, correct) == pytest.approx(2 * brier(confidence, correct))


def test_refusals() -> None:
    with pytest.raises(DataError, match="item 1"):
        brier([0.5, 1.5], [1, 0])
    with pytest.raises(DataError, match="item 0"):
        expected_calibration_error([float("nan")], [1])
    with pytest.raises(DataError):
        brier([], [])
    with pytest.raises(UsageError):
        brier([0.5], [1, 0])
    with pytest.raises(UsageError):
        reliability_table([0.5], [1], 0)
    with pytest.raises(DataError, match="item 1"):
        brier_multiclass([[0.5, 0.5], [0.5, 0.6]], [0, 1])
    with pytest.raises(UsageError):
        brier_multiclass([[0.5, 0.5]], [2])
