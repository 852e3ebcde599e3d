"""Dynamic time warping and words, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from craton.inference.transcription_times import Word, _join_punctuation, _shorten, warp


def cheapest(cost: np.ndarray) -> float:
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            total[i, j] = cost[i - 1, j - 1] + min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
    return total[rows, columns]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (20, 60)])
def test_the_path_is_the_cheapest_and_leads_from_end_to_end(shape):
    cost = np.random.default_rng(sum(shape)).standard_normal(shape)
    rows, columns = warp(cost)
    assert (rows[0], columns[0]) == (0, 0)
    assert (rows[-1], columns[-1]) == (shape[0] - 1, shape[1] - 1)
    steps = {(int(a), int(b)) for a, b in zip(np.diff(rows), np.diff(columns), strict=True)}
    assert steps <= {(0, 1), (1, 0), (1, 1)}
    assert cost[rows, columns].sum() == pytest.approx(cheapest(cost))


def test_punctuation_hangs_on_its_word():
    words = [Word(t, i, i + 1, 1.0) for i, t in enumerate([" “", "Yes", ",", " he", " said", ".", '"'])]
    assert [word.text for word in _join_punctuation(words)] == [" “Yes,", " he", ' said."']
    assert _join_punctuation(words)[0] == Word(" “Yes,", 1, 2, 1.0)  # a mark has no time of its own


def test_a_word_does_not_take_the_pause_beside_it():
    words = [Word(" a", 0, 0.2, 1), Word(" b", 0.2, 0.4, 1), Word(".", 0.4, 0.5, 1), Word(" c", 0.5, 5.0, 1)]
    short = _shorten(words)
    assert short[3].end == 5.0
    assert short[3].start == pytest.approx(5.0 - 2 * 0.2)
