"""Sound from a pipe: raw numbers, WAV headers that were written before the sound, and headers that are none."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from craton.errors import FileFormatError
from craton.modalities.audio.pipes import read_pipe


class Slow(io.BytesIO):
    """Gives a few bytes at a time, as a pipe does."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size

    def read1(self, size: int = -1) -> bytes:
        return super().read(min(size, self.size))


def wav(samples: np.ndarray, rate: int = 16_000, bits: int = 16, kind: int = 1, length: int = 0xFFFFFFFF) -> bytes:
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * 2 * channels, 2 * channels, bits)
    head = b"RIFF" + struct.pack("<I", length) + b"WAVE" + b"LIST\x03\0\0\0abc\0" + b"fmt \x10\0\0\0" + form
    return head + b"data" + struct.pack("<I", length) + samples.tobytes()


SOUND = (np.random.default_rng(0).standard_normal(4001) * 3000).astype("<i2")


@pytest.mark.parametrize("size", [1, 7, 3200])
@pytest.mark.parametrize("header", [False, True])
def test_pieces_make_the_sound(size, header):
    data = wav(SOUND) if header else SOUND.tobytes()
    found = np.concatenate(list(read_pipe(Slow(data, size))))
    assert np.allclose(found, SOUND / 32768)


def test_channels_and_rates():
    pytest.importorskip("soxr", reason="needs the extra [audio]")
    stereo = np.stack((SOUND, -SOUND), 1)
    assert np.allclose(np.concatenate(list(read_pipe(io.BytesIO(wav(stereo))))), 0)
    slower = np.concatenate(list(read_pipe(io.BytesIO(wav(SOUND, rate=8_000)))))
    assert len(slower) == 2 * len(SOUND)


def test_nothing_is_nothing():
    assert list(read_pipe(io.BytesIO(b""))) == []


@pytest.mark.parametrize(
    "data",
    [
        wav(SOUND, bits=24),
        wav(SOUND, kind=3),
        wav(SOUND, rate=10),
        b"RIFF\0\0\0\0WAVE",
        b"RIFF\0\0\0\0WAVEdata\xff\xff\xff\xff",
        b"RIFF\0\0\0\0WAVEfmt \xff\xff\xff\x7f",
        b"RIFF\0\0\0\0WAVE" + b"LIST\0\0\0\0" * 10_000,
    ],
)
def test_headers_that_are_none(data):
    with pytest.raises(FileFormatError):
        list(read_pipe(io.BytesIO(data)))
