"""Where recordings with their texts come from: tables and folders, all in memory as mono sound at 16 kHz."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from craton.data.records import read_records
from craton.errors import DataError, FileFormatError, UsageError
from craton.modalities.audio import SAMPLE_RATE, read_audio

MOST_BYTES: Final = 8 * 1024**3  # of all recordings together, which stay in memory
MOST_TEXT: Final = 1 << 20  # bytes of a text's file
TABLES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SOUNDS: Final = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".webm", ".aiff", ".aif")
REPORT_EVERY: Final = 500


class _Found(NamedTuple):
    path: Path
    text: str
    origin: str


@dataclass(frozen=True)
class SpeechSet:
    """Recordings, each [N] int16 at 16 kHz, and what is said in them. origins: where each came from."""

    recordings: tuple[NDArray[np.int16], ...]
    texts: tuple[str, ...]
    origins: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.recordings)

    @property
    def seconds(self) -> float:
        """Of all recordings together."""
        return sum(map(len, self.recordings)) / SAMPLE_RATE

    @property
    def digest(self) -> str:
        """SHA-256 of all that is learnt, in order."""
        state = hashlib.sha256(repr((self.texts, [len(r) for r in self.recordings])).encode())
        for recording in self.recordings:
            state.update(recording.data)
        return state.hexdigest()

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> SpeechSet:
        """These recordings, in this order."""
        return SpeechSet(
            tuple(self.recordings[i] for i in indices),
            tuple(self.texts[i] for i in indices),
            tuple(self.origins[i] for i in indices),
        )

    def split(self, share: float, seed: int) -> tuple[SpeechSet, SpeechSet]:
        """(the rest, a random `share` of the recordings): none if the share is 0, at least one otherwise."""
        count = min(max(1, round(share * len(self))), max(0, len(self) - 1)) if share else 0
        order = np.random.default_rng((seed, 1)).permutation(len(self))
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))


def read_speech(sources: Sequence[str], *, on_progress: Callable[[str], None] = lambda doing: None) -> SpeechSet:
    """Every recording of `sources` with its text; runs of white space in a text become one space.

    A source is a table (.jsonl, .csv ...) of records {"audio": PATH, "text": ...} whose paths are relative to it, or a
    folder in which the text of NAME.wav (or another kind of sound) stands in NAME.txt.

    Raises UsageError for what is not there or too large, DataError for a recording without a text, FileFormatError for
    files that are no sound or no text.
    """
    recordings: list[NDArray[np.int16]] = []
    texts: list[str] = []
    origins: list[str] = []
    size = 0
    for source in sources:
        on_progress(f"reading {source}")
        for found in _read(Path(source).expanduser()):
            # 16 bits, as nearly every recording has: half the memory, and nothing that can be heard is lost.
            recording = np.clip(np.rint(read_audio(found.path) * 32768), -32768, 32767).astype(np.int16)
            size += recording.nbytes
            if size > MOST_BYTES:
                raise UsageError(
                    f"more than {len(recordings):,} recordings do not fit {MOST_BYTES >> 30} GiB", remedy="take fewer"
                )
            recordings.append(recording)
            texts.append(found.text)
            origins.append(found.origin)
            if len(recordings) % REPORT_EVERY == 0:
                on_progress(f"{len(recordings):,} recordings read")
    if not recordings:
        raise UsageError("there are no recordings", where=", ".join(sources), remedy="name a folder or a table")
    return SpeechSet(tuple(recordings), tuple(texts), tuple(origins))


def _read(path: Path) -> Iterator[_Found]:
    if path.is_dir():
        yield from _read_folder(path)
    elif not path.is_file():
        raise UsageError("there is no such file or folder", where=str(path), remedy="check the path")
    elif path.suffix.lower() in TABLES:
        yield from _read_table(path)
    else:
        raise UsageError(
            "a recording by itself has no text to learn",
            where=str(path),
            remedy='name a folder of NAME.wav and NAME.txt, or a table of {"audio": "a.wav", "text": "..."}',
        )


def _read_folder(folder: Path) -> Iterator[_Found]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SOUNDS and path.is_file() and not hidden:
            yield _Found(path, _text_beside(path), str(path))


def _text_beside(sound: Path) -> str:
    path = sound.with_suffix(".txt")
    try:
        if path.stat().st_size > MOST_TEXT:
            raise FileFormatError("this is no text of a recording: more than 1 MiB", where=str(path))
        return _some(path.read_text(encoding="utf-8-sig"), str(path))
    except FileNotFoundError:
        raise DataError(
            "this recording has no text", where=str(sound), remedy=f"write what is said into {path.name} beside it"
        ) from None
    except UnicodeDecodeError:
        raise FileFormatError("the text is not UTF-8", where=str(path), remedy="save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"the text cannot be read: {error.strerror}", where=str(path)) from None


def _read_table(path: Path) -> Iterator[_Found]:
    for record in read_records(path):
        audio, text = (record.value.get(key) for key in ("audio", "text"))
        if not isinstance(audio, str) or not isinstance(text, str):
            raise DataError(
                "a record of speech names its file and says its text",
                where=record.origin,
                remedy='write {"audio": "a.wav", "text": "..."}',
            )
        yield _Found(path.parent / audio, _some(text, record.origin), record.origin)


def _some(text: str, where: str) -> str:
    plain = " ".join(text.split())
    if not plain:
        raise DataError("the text is empty", where=where, remedy="write what is said, or leave the recording out")
    return plain
