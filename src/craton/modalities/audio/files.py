"""Sound files to samples: mono, 16 kHz, fp32. Every limit is held before or while a file is decoded, never after.

soundfile (libsndfile) reads WAV, FLAC, OGG, MP3 and their like; PyAV (FFmpeg) what it does not know: M4A, WebM, the
sound of films. soxr changes the sampling rate.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from craton.config import Settings
from craton.errors import FileFormatError, UsageError

SAMPLE_RATE: Final = 16_000
BLOCK: Final = 1 << 16  # frames decoded at a time
# The containers that FFmpeg may recognise: none that names other files or addresses to read.
CONTAINERS: Final = "mov,mp4,m4a,3gp,matroska,webm,ogg,mp3,aac,flac,wav,aiff,caf,asf,avi,flv,amr,ac3,eac3,mpegts,mpeg"
_UNKNOWN_SIZES: Final = (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF)  # of a WAV that was written into a pipe

Samples = NDArray[np.float32]


class AudioLimits(Settings):
    """What a sound file may be at most; beyond it nothing is decoded."""

    seconds: float = Field(default=6 * 3600.0, gt=0, description="the longest recording, in seconds")
    channels: int = Field(default=64, ge=1, description="channels, which are averaged")
    rates: tuple[int, int] = Field(default=(1_000, 384_000), description="the lowest and highest sampling rate")


def read_audio(source: str | Path | bytes, limits: AudioLimits = AudioLimits()) -> Samples:  # noqa: B008  (immutable)
    """The samples [N] of a file, or of a file's bytes: mono, 16 kHz, fp32.

    Raises:
        UsageError: there is no such file, or a package of the extra [audio] is not installed.
        FileFormatError: the file is no sound, is cut short, is beyond a limit, or holds no sample or NaN.
    """
    need("soundfile", "soxr")
    if isinstance(source, bytes):
        return _read(_Seekable(io.BytesIO(source)), "the sound", limits)
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            raise UsageError("this is a folder, not a sound file", where=str(path))
        with path.open("rb", buffering=0) as file:
            return _read(_Seekable(file), str(path), limits)
    except OSError as error:
        raise UsageError(f"the sound file cannot be read: {error.strerror}", where=str(path)) from None


def check_samples(samples: NDArray[Any], rate: int = SAMPLE_RATE) -> Samples:
    """Samples that somebody made ([N] or [N, channels], numbers in -1..1) as `read_audio` gives them.

    Raises UsageError for another shape, no sample, NaN or a rate beyond the limits.
    """
    limits = AudioLimits()
    if samples.ndim not in (1, 2) or not samples.size or not np.issubdtype(samples.dtype, np.floating):
        raise UsageError(
            f"samples are floating-point numbers [N] or [N, channels], not {samples.dtype} {list(samples.shape)}"
        )
    try:
        _check_form(rate, samples.shape[1] if samples.ndim == 2 else 1, "the samples", limits)
        blocks = [samples.reshape(len(samples), -1).astype(np.float32)]
        return samples.astype(np.float32) if _plain(samples, rate) else _join(blocks, rate, "the samples", limits)
    except FileFormatError as error:
        raise UsageError(error.what, where=error.where, remedy=error.remedy) from None


def _plain(samples: NDArray[Any], rate: int) -> bool:
    return samples.ndim == 1 and rate == SAMPLE_RATE and bool(np.isfinite(samples).all())


class _Seekable(io.BufferedReader):
    """Says -1 where a damaged header leads before the file's beginning; libraries in C expect no exception there."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OSError):
            return -1


def need(*packages: str) -> None:
    """Raises UsageError where one of these packages of the extra [audio] is not installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"reading sound needs {' and '.join(missing)}", remedy="pip install 'craton[audio]' (or those alone)"
        )


def _read(file: BinaryIO, where: str, limits: AudioLimits) -> Samples:
    import soundfile

    _check_length(file, where)
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError):
        file.seek(0)
        return _read_with_av(file, where, limits)
    with sound:
        _check_form(sound.samplerate, sound.channels, where, limits)
        promised = None if sound.format in ("MP3", "OGG") else sound.frames  # those tell their length only roughly
        if sound.frames > limits.seconds * sound.samplerate:
            raise _too_long(where, limits)
        return _join(_blocks(sound, where), sound.samplerate, where, limits, promised)


def _blocks(sound: Any, where: str) -> Iterator[Samples]:
    import soundfile

    while True:
        try:
            block = sound.read(BLOCK, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise _damaged(where, str(error)) from None
        if not len(block):
            return
        yield block


def _read_with_av(file: BinaryIO, where: str, limits: AudioLimits) -> Samples:
    from importlib.util import find_spec

    none = FileFormatError(
        "this is not a sound file that can be read",
        where=where,
        remedy="WAV, FLAC, OGG, MP3, M4A, WebM and films are read; check what the file really is"
        + ("" if find_spec("av") else " (some of them need PyAV: pip install av)"),
    )
    if not find_spec("av"):
        raise none
    import av

    try:
        container = av.open(file, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})
    except (av.FFmpegError, ValueError):
        raise none from None
    with container:
        if not container.streams.audio:
            raise FileFormatError("there is no sound in this file", where=where)
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise FileFormatError("the sound is in a codec that is not known", where=where)
        rate, channels = stream.rate or 0, stream.layout.nb_channels
        _check_form(rate, channels, where, limits)
        return _join(_av_blocks(container, stream, where), rate, where, limits)


def _av_blocks(container: Any, stream: Any, where: str) -> Iterator[Samples]:
    import av

    # Packed fp32: PyAV reads memory that is none where planes are more than eight. The rate stays, as soxr changes it
    # for all files alike.
    resampler = av.AudioResampler(format="flt", layout=stream.layout, rate=stream.rate)
    channels = stream.layout.nb_channels
    try:
        for frame in container.decode(stream):
            for part in resampler.resample(frame):
                yield part.to_ndarray().reshape(-1, channels).astype(np.float32, copy=False)
    except (av.FFmpegError, ValueError) as error:
        raise _damaged(where, str(error)) from None


def _join(
    blocks: Iterable[Samples], rate: int, where: str, limits: AudioLimits, promised: int | None = None
) -> Samples:
    """Blocks [n, channels] at `rate` as mono samples at 16 kHz. promised: how many frames the header says there are."""
    import soxr

    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    parts, count = [], 0
    for block in blocks:
        mono = block.mean(1, dtype=np.float32) if block.shape[1] > 1 else block[:, 0]
        if not np.isfinite(mono).all():
            bad = count + int((~np.isfinite(mono)).argmax())
            raise FileFormatError(
                f"sample {bad} ({bad / rate:.2f} s) is not a number",
                where=where,
                remedy="the recording is damaged: export it again from where it was made",
            )
        count += len(mono)
        if count > limits.seconds * rate:
            raise _too_long(where, limits)
        parts.append(resampler.resample_chunk(mono) if resampler is not None else mono.copy())
    if not count:
        raise FileFormatError("the file holds no sample", where=where, remedy="record or export it again")
    if promised is not None and count < promised:
        raise _damaged(where, f"{count / rate:.2f} s are there of {promised / rate:.2f} s")
    if resampler is not None:
        parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(parts)


def _check_form(rate: int, channels: int, where: str, limits: AudioLimits) -> None:
    low, high = limits.rates
    if not low <= rate <= high:
        raise FileFormatError(
            f"a sampling rate of {rate} Hz, where {low} to {high} are read",
            where=where,
            remedy="resample the recording",
        )
    if not 1 <= channels <= limits.channels:
        raise FileFormatError(
            f"{channels} channels, where 1 to {limits.channels} are read", where=where, remedy="mix the channels first"
        )


def _check_length(file: BinaryIO, where: str) -> None:
    # libsndfile reads a WAV or AIFF that was cut off to where it ends and says nothing.
    head, end = file.read(12), file.seek(0, io.SEEK_END)
    if head[:4] == b"FORM" and head[8:11] == b"AIF":
        (size,) = struct.unpack(">I", head[4:8])
        if size > end - 8:
            raise _damaged(where, f"{end - 8:,} bytes are there of {size:,}")
    at = 12
    while head[:4] == b"RIFF" and head[8:] == b"WAVE" and at + 8 <= end:
        file.seek(at)
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            there = end - at - 8
            if size not in _UNKNOWN_SIZES and size > there:
                raise _damaged(where, f"{there:,} bytes of sound are there of {size:,}")
            break
        at += 8 + size + size % 2
    file.seek(0)


def _damaged(where: str, why: str) -> FileFormatError:
    return FileFormatError(
        f"the file is damaged or cut short: {why}", where=where, remedy="copy or download it again from its source"
    )


def _too_long(where: str, limits: AudioLimits) -> FileFormatError:
    return FileFormatError(
        f"the recording is longer than {limits.seconds / 3600:g} hours", where=where, remedy="cut it into parts"
    )
