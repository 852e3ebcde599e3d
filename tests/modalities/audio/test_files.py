"""Sound files, good and bad."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from craton.errors import FileFormatError, UsageError
from craton.modalities.audio import AudioLimits, check_samples, read_audio

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")


def tone(rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    time = np.arange(int(rate * seconds)) / rate
    return np.repeat((0.5 * np.sin(2 * np.pi * 200 * time))[:, None], channels, 1)


def written(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("rate", [1_000, 8_000, 16_000, 22_050, 44_100, 48_000, 384_000])
@pytest.mark.parametrize("channels", [1, 2, 16])
def test_rates_and_channels(rate, channels):
    found = read_audio(written(tone(rate, channels=channels), rate))
    assert found.dtype == np.float32
    assert found.shape == (16_000,)
    middle = slice(2_000, 14_000)
    assert np.abs(found[middle] - tone(16_000)[middle, 0]).max() < 0.02


@pytest.mark.parametrize(
    ("format", "subtype"),
    [
        *(("WAV", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_16"),
        ("CAF", "PCM_16"),
        ("AU", "PCM_16"),
    ],
)
def test_formats(format, subtype, tmp_path):
    path = tmp_path / f"tone.{format.lower()}"
    path.write_bytes(written(tone(16_000), 16_000, format, subtype))
    found = read_audio(path)
    assert abs(len(found) - 16_000) < 2_500  # some codecs pad
    assert 0.4 < np.abs(found).max() < 0.75


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("webm", "libopus"), ("matroska", "pcm_s16le")])
def test_what_only_ffmpeg_reads(container, codec, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound"
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=48_000)
        stream.layout = "stereo"
        samples = tone(48_000, channels=2).T.astype(np.float32)
        kind = stream.format.name
        shaped = np.ascontiguousarray(samples) if kind == "fltp" else samples.T.reshape(1, -1)
        if kind == "s16":
            shaped = (shaped * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(shaped), format=kind, layout="stereo")
        frame.rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    found = read_audio(path)
    assert abs(len(found) - 16_000) < 1_500
    assert 0.4 < np.abs(found).max() < 0.75


BAD = {
    "a text": b"this is not sound at all\n" * 50,
    "nothing": b"",
    "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.wav\n#EXT-X-ENDLIST\n",
    "a list for ffmpeg": b"ffconcat version 1.0\nfile other.wav\n",
    "a cut header": written(tone(16_000), 16_000)[:30],
    "noise": bytes(np.random.default_rng(0).integers(0, 256, 4_000, dtype=np.uint8)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_sound(name, tmp_path):
    (tmp_path / "other.wav").write_bytes(written(tone(16_000), 16_000))
    (tmp_path / "it.wav").write_bytes(BAD[name])
    with pytest.raises(FileFormatError):
        read_audio(tmp_path / "it.wav")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("format", ["WAV", "FLAC", "AIFF"])
def test_a_file_that_is_cut_short(format, share):
    whole = written(tone(16_000, 3.0), 16_000, format)
    with pytest.raises(FileFormatError, match=r"cut short|can be read"):
        read_audio(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "AIFF", "CAF", "RF64"])
def test_damaged_bytes_are_refused_in_words_or_read(format):
    dice = np.random.default_rng(0)
    whole = written(tone(8_000, 0.2), 8_000, format)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.integers(1, 12)):
            damaged[dice.integers(min(len(damaged), 200))] = dice.integers(256)
        try:
            found = read_audio(bytes(damaged), AudioLimits(seconds=60))
        except FileFormatError:
            continue
        assert found.ndim == 1
        assert np.isfinite(found).all()


def test_many_channels_by_ffmpeg(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w", format="matroska") as out:
        stream = out.add_stream("pcm_s16le", rate=16_000)
        stream.layout = "hexadecagonal"  # 16 channels
        samples = (tone(16_000, channels=16) * 32767).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="hexadecagonal")
        frame.rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    assert np.abs(read_audio(path) - tone(16_000)[:, 0]).max() < 0.01


def test_a_wav_from_a_pipe_does_not_know_its_length():
    whole = bytearray(written(tone(16_000), 16_000))
    at = whole.index(b"data") + 4
    whole[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(read_audio(bytes(whole))) == 16_000


def test_a_header_that_promises_terabytes_takes_no_memory():
    whole = bytearray(written(tone(16_000), 16_000))
    at = whole.index(b"data") + 4
    whole[at : at + 4] = struct.pack("<I", 0xF0000000)
    with pytest.raises(FileFormatError, match="cut short"):
        read_audio(bytes(whole))


def test_numbers_that_are_none():
    for bad in (np.nan, np.inf):
        samples = tone(16_000)
        samples[8_000] = bad
        with pytest.raises(FileFormatError, match=r"sample 8000 \(0.50 s\)"):
            read_audio(written(samples, 16_000, subtype="FLOAT"))


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG"])
def test_no_samples(format):
    with pytest.raises(FileFormatError, match=r"no sample|can be read"):
        read_audio(written(tone(16_000)[:0], 16_000, format))


def test_limits_hold_before_anything_is_decoded():
    with pytest.raises(FileFormatError, match="longer than"):
        read_audio(written(tone(16_000, 2.0), 16_000), AudioLimits(seconds=1.0))
    with pytest.raises(FileFormatError, match="channels"):
        read_audio(written(tone(16_000, channels=3), 16_000), AudioLimits(channels=2))
    for rate in (999, 400_000):
        with pytest.raises(FileFormatError, match=f"{rate} Hz"):
            read_audio(written(tone(rate, 0.1), rate))


def test_a_path_that_leads_nowhere(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(UsageError, match="folder"):
        read_audio(tmp_path)


def test_samples_that_somebody_made():
    assert check_samples(np.zeros(10)).dtype == np.float32
    assert len(check_samples(tone(8_000, channels=2), 8_000)) == 16_000
    for bad in (np.zeros(0), np.zeros((2, 2, 2)), np.zeros(10, np.int16), np.full(10, np.nan)):
        with pytest.raises(UsageError):
            check_samples(bad)
    with pytest.raises(UsageError, match="5 Hz"):
        check_samples(np.zeros(10), 5)
