"""Where somebody speaks: long stretches of quiet are left out before a speech model can dream words into them.

By the energy of 20 ms frames against the recording's own quiet and loud levels. Deliberately generous: what it leaves
out is quiet; noise as loud as the speech is left in, for the model's own no-speech probability to judge.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

FRAME: Final = 320  # samples: 20 ms
SILENCE_DB: Final = -70.0  # of full scale: nothing below this is speech
ABOVE_QUIET_DB, BELOW_LOUD_DB, SHARE = 9.0, 35.0, 0.4
PAUSE_SECONDS: Final = 1.5  # shorter pauses belong to the speech around them
MARGIN_SECONDS: Final = 0.6  # kept before and after speech


class Activity(NamedTuple):
    """A stretch of speech, in samples."""

    start: int
    end: int


def find_speech(samples_N: NDArray[np.float32], rate: int = 16_000) -> list[Activity]:
    """The stretches in which somebody may be speaking, in order, apart from each other."""
    count = len(samples_N)
    loud_T = levels(samples_N)
    threshold = speech_threshold(loud_T)
    margin, pause = int(MARGIN_SECONDS * rate), int(PAUSE_SECONDS * rate)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], loud_T > threshold, [0]))))
    found: list[Activity] = []
    for first, last in zip(edges[::2] * FRAME, edges[1::2] * FRAME, strict=True):
        start, end = max(0, int(first) - margin), min(count, int(last) + margin)
        if found and start - found[-1].end < max(0, pause - 2 * margin):
            found[-1] = Activity(found[-1].start, end)
        else:
            found.append(Activity(start, end))
    return found


def quietest(samples_N: NDArray[np.float32], start: int, end: int) -> int:
    """The sample between `start` and `end` around which it is quietest: the best place to cut."""
    loud_T = levels(samples_N[start:end])
    smooth_T = np.convolve(loud_T, np.ones(15) / 15, mode="same")
    smooth_T[:7], smooth_T[-7:] = np.inf, np.inf
    return start + int(smooth_T.argmin()) * FRAME + FRAME // 2


def levels(samples_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """The energy of each 20 ms in decibels of full scale; the last frame is filled up with zeros."""
    frames = np.pad(samples_N, (0, -len(samples_N) % FRAME)).reshape(-1, FRAME)
    energy_T = np.einsum("tn,tn->t", frames, frames) / FRAME
    decibels: NDArray[np.float32] = 10 * np.log10(energy_T + 1e-12)
    return decibels


def speech_threshold(loud_T: NDArray[np.float32]) -> float:
    """Of frames of these levels, the level above which somebody may be speaking."""
    # Where a tenth of the recording is digital silence, the room's noise is not known and counts as speech.
    quiet, loud = (float(level) for level in np.percentile(loud_T, (10, 95)))
    between = quiet + SHARE * (loud - quiet)
    return max(SILENCE_DB, min(max(quiet + ABOVE_QUIET_DB, loud - BELOW_LOUD_DB), between))
