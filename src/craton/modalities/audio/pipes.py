"""Sound from a pipe while it is being made: raw 16-bit numbers, or a WAV file as it grows."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from craton.errors import FileFormatError
from craton.modalities.audio.files import SAMPLE_RATE, AudioLimits, need

WHERE: Final = "standard input"
PIECE: Final = 3200  # bytes that are waited for at most: a tenth of a second
PCM: Final = 1
MOST_HEADER: Final = 1 << 16  # bytes of chunks before the sound


def read_pipe(file: BinaryIO) -> Iterator[NDArray[np.float32]]:
    """Pieces of sound, mono, 16 kHz, fp32, as they come.

    Without a WAV header it is signed 16-bit numbers, little-endian, of one channel at 16 kHz. A header says how many
    channels, which are averaged, and which rate, which is changed; its lengths are not believed, since it was written
    before the sound. Raises FileFormatError for a header that is none, or of numbers that are not 16-bit integers.
    """
    head = file.read(12)
    rate, channels, rest = SAMPLE_RATE, 1, head
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        rate, channels = _read_header(file)
        rest = b""
    resampler = None
    if rate != SAMPLE_RATE:
        need("soxr")
        import soxr

        resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    frame = 2 * channels
    read = getattr(file, "read1", file.read)
    while True:
        data = read(PIECE)
        rest += data
        whole = len(rest) - len(rest) % frame
        piece, rest = rest[:whole], rest[whole:]
        samples = np.frombuffer(piece, "<i2").astype(np.float32).reshape(-1, channels).mean(1) / 32768
        if resampler is not None:
            samples = resampler.resample_chunk(samples, last=not data)
        if len(samples):
            yield samples
        if not data:
            return


def _read_header(file: BinaryIO) -> tuple[int, int]:
    """(rate, channels), up to where the sound begins."""
    found: tuple[int, int] | None = None
    read = 0
    while read < MOST_HEADER:
        chunk = file.read(8)
        if len(chunk) < 8:
            break
        name, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if name == b"data":
            if found is None:
                break
            return found
        if size > MOST_HEADER:
            break
        body = file.read(size + size % 2)
        read += 8 + len(body)
        if name == b"fmt " and len(body) >= 16:
            kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
            limits = AudioLimits()
            if kind not in (PCM, 0xFFFE) or bits != 16 or not 1 <= channels <= limits.channels:
                raise FileFormatError(
                    f"a pipe of {bits}-bit numbers (kind {kind}), {channels} channels",
                    where=WHERE,
                    remedy="send 16-bit integers: ffmpeg -i SOUND -f s16le -ac 1 -ar 16000 -",
                )
            if not limits.rates[0] <= rate <= limits.rates[1]:
                raise FileFormatError(f"a sampling rate of {rate} Hz", where=WHERE, remedy="resample it")
            found = rate, channels
    raise FileFormatError("the WAV header is damaged", where=WHERE, remedy="send raw 16-bit numbers at 16 kHz instead")
