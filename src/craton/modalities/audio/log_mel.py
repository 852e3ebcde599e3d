"""The log-mel spectrogram that Whisper reads (Radford 2022, arXiv 2212.04356, section 2.2): 25 ms windows every 10 ms,
mel bins on Slaney's scale, logarithm to base 10, the quietest 8 decades below the loudest cut off."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

RATE: Final = 16_000
WINDOW: Final = 400  # samples
HOP: Final = 160  # samples
FRAMES_PER_SECOND: Final = RATE // HOP
DECADES: Final = 8.0  # kept below the loudest bin
BLOCK: Final = 3000  # frames transformed at a time: a long recording needs no more memory than its result


def log_mel(samples_N: NDArray[np.float32], mels: int) -> NDArray[np.float32]:
    """The spectrogram [mels, N // 160] of samples at 16 kHz, fp32.

    The ends are mirrored, as the reference implementations do. Needs at least 201 samples.
    """
    window_W = np.hanning(WINDOW + 1)[:-1]  # in fp64: the quiet bins are far below the loud ones
    filters_FM = mel_filters(mels)
    padded = np.pad(samples_N, WINDOW // 2, mode="reflect")
    count = len(samples_N) // HOP
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    out_MT = np.empty((mels, count), np.float32)
    for first in range(0, count, BLOCK):
        spectrum_TF = np.fft.rfft(frames[first : min(first + BLOCK, count)] * window_W)
        power_TF = (spectrum_TF.real**2 + spectrum_TF.imag**2).astype(np.float32)
        out_MT[:, first : first + len(power_TF)] = (power_TF @ filters_FM).T
    np.log10(np.maximum(out_MT, 1e-10, out=out_MT), out=out_MT)
    np.maximum(out_MT, out_MT.max(initial=-10.0) - DECADES, out=out_MT)
    out_MT += 4.0
    out_MT /= 4.0
    return out_MT


@cache
def mel_filters(mels: int) -> NDArray[np.float32]:
    """Triangles [201 frequencies, mels] of equal area, evenly spaced on Slaney's mel scale (Auditory Toolbox, 1998)."""
    frequency_F = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    corner_P = _hertz(np.linspace(0, _mel(RATE / 2), mels + 2))
    width_P = np.diff(corner_P)
    distance_PF = corner_P[:, None] - frequency_F
    rising_MF, falling_MF = -distance_PF[:-2] / width_P[:-1, None], distance_PF[2:] / width_P[1:, None]
    filters_MF = np.maximum(0, np.minimum(rising_MF, falling_MF)) * (2 / (corner_P[2:] - corner_P[:-2]))[:, None]
    return np.ascontiguousarray(filters_MF.T, np.float32)


# Linear up to 1 kHz (15 mels), from there on 27 mels for each factor of 6.4.
_LINEAR: Final = 200 / 3  # hertz a mel
_KNEE: Final = 1000 / _LINEAR
_STEP: Final = np.log(6.4) / 27


def _mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < 1000 else _KNEE + float(np.log(hertz / 1000)) / _STEP


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel < _KNEE, mel * _LINEAR, 1000 * np.exp(_STEP * (mel - _KNEE)))
