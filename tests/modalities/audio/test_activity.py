"""Where somebody speaks: bursts of noise stand for speech here; real speech is judged in tests/inference."""

from __future__ import annotations

import numpy as np
import pytest

from craton.modalities.audio.activity import find_speech, quietest

RATE = 16_000


def recording(*parts: tuple[float, float], floor: float = 1e-4) -> np.ndarray:
    """(seconds, level) one after another, over a noise floor."""
    dice = np.random.default_rng(0)
    levels = np.concatenate([np.full(int(seconds * RATE), level) for seconds, level in parts])
    return (dice.standard_normal(len(levels)) * np.maximum(levels, floor)).astype(np.float32)


def test_long_pauses_are_left_out_and_short_ones_are_not():
    samples = recording((3, 0), (2, 0.1), (0.5, 0), (2, 0.1), (4, 0), (1, 0.1), (2, 0))
    found = [(round(a.start / RATE, 1), round(a.end / RATE, 1)) for a in find_speech(samples)]
    assert found == [(2.4, 8.1), (10.9, 13.1)]


@pytest.mark.parametrize("floor", [1e-6, 1e-4, 1e-3, 1e-2])
def test_the_noise_of_the_room_does_not_matter(floor):
    found = find_speech(recording((3, 0), (2, 0.1), (3, 0), floor=floor))
    assert len(found) == 1
    assert abs(found[0].start / RATE - 2.4) < 0.1
    assert abs(found[0].end / RATE - 5.6) < 0.1


def test_a_quiet_speaker_beside_a_loud_one_is_kept():
    found = find_speech(recording((2, 0.2), (3, 0), (2, 0.01), (2, 0)))
    assert len(found) == 2


@pytest.mark.parametrize("level", [0.0, 1e-5])
def test_silence(level):
    assert find_speech(recording((5, level), floor=0.0)) == []


def test_sound_all_the_time():
    assert find_speech(recording((5, 0.1))) == [(0, 5 * RATE)]


def test_a_cut_falls_into_a_pause():
    samples = recording((3, 0.1), (0.4, 0), (3, 0.1))
    assert 3.0 * RATE < quietest(samples, RATE, 6 * RATE) < 3.4 * RATE
