"""`craton transcribe`: sound files to text and subtitles."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import DEFAULT_SPEECH_MODEL, DType, Json, Threads
from craton.cli.terminal import load_model, print_json, status, stderr, write
from craton.config.resolve import FLAGS, resolve
from craton.errors import CratonError, FileFormatError, UsageError
from craton.inference.transcription_settings import TranscriptionSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STDIN = "standard input"


def transcribe(
    *audio: Annotated[str, Parameter(help="sound files; without any, one from standard input")],
    model: Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")] = DEFAULT_SPEECH_MODEL,
    format: Annotated[Literal["txt", "srt", "vtt", "json"], Parameter(help="of what is written")] = "txt",
    out: Annotated[
        Path | None, Parameter(help="a folder: one file there for each sound file, and nothing on standard output")
    ] = None,
    live: Annotated[
        bool,
        Parameter(
            negative="",
            help="write while somebody speaks: sound comes from standard input, 16-bit numbers at 16 kHz of one "
            "channel, or a WAV file as it grows",
        ),
    ] = False,
    flags: Flags[TranscriptionSettings] | None = None,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write down what is said. Reads WAV, FLAC, OGG, MP3, M4A, WebM, the sound of films, and more."""
    settings, _ = resolve(TranscriptionSettings, [(FLAGS, given(flags))])
    if live:
        _live(audio, format, out, settings, model, dtype, threads, json)
        return
    _check(audio, format, out)
    names = audio or (STDIN,)
    from craton.checkpoints.disk import disk_errors, replace_file
    from craton.inference.transcription import as_json
    from craton.inference.transcription_formats import write_transcript
    from craton.modalities.audio import read_audio

    read: list[str] = []
    unreadable: list[tuple[str, CratonError]] = []

    def recordings() -> Iterator[NDArray[np.float32]]:
        for name in names:
            try:
                samples = read_audio(name if audio else sys.stdin.buffer.read())
            except (FileFormatError, UsageError) as error:
                unreadable.append((name, error))  # the others are not lost for it
                continue
            read.append(name)
            yield samples

    waiting = recordings()
    first = next(waiting, None)  # what is no sound is refused before the model is loaded
    if first is None:
        raise _nothing_readable(unreadable)
    loaded = load_model(model, dtype=dtype, threads=threads, quiet=json)
    transcriber = loaded.transcriber
    transcriber.check(settings)
    if out is not None:
        with disk_errors("make the folder", out):
            out.mkdir(parents=True, exist_ok=True)

    started, documents, seconds = time.monotonic(), [], 0.0
    with status(quiet=json) as say:
        transcripts = transcriber.transcribe(
            chain([first], waiting), settings, lambda done, total: say(f"{done:.0f} of {total:.0f} s of sound")
        )
        for number, transcript in enumerate(transcripts):
            name = read[number]  # a recording is taken before its transcript is there
            seconds += transcript.seconds
            if out is not None:
                path = out / f"{Path(name).stem}.{format}"
                replace_file(path, write_transcript(transcript, format).encode())
            elif not json:
                if len(audio) > 1 and format == "txt":
                    write(f"{name}:\n")
                write(write_transcript(transcript, format))
            documents.append({"file": name} | as_json(transcript))
    if json:
        left_out = [{"file": name, **error.as_dict()} for name, error in unreadable]
        print_json({"model": loaded.name, "transcripts": documents, "unreadable": left_out})
    else:
        spent = time.monotonic() - started
        stderr.print(f"[dim]{seconds:.1f} s of sound in {spent:.1f} s: {seconds / spent:.1f} times as fast[/]")
        for name, error in unreadable:
            stderr.print(f"[yellow]left out:[/] {stderr.escape(name)}: {stderr.escape(error.what)}")
    if unreadable:
        raise SystemExit(unreadable[0][1].exit_status)


def _nothing_readable(unreadable: Sequence[tuple[str, CratonError]]) -> CratonError:
    """What to raise where none of the files is sound."""
    if len(unreadable) == 1:
        return unreadable[0][1]
    return FileFormatError(
        f"none of the {len(unreadable)} files can be read",
        where="; ".join(f"{name}: {error.what}" for name, error in unreadable),
        remedy=unreadable[0][1].remedy,
    )


def _live(
    audio: Sequence[str],
    format: str,
    out: Path | None,
    settings: TranscriptionSettings,
    model: str,
    dtype: str,
    threads: int | None,
    json: bool,
) -> None:
    """Text as it is spoken: settled words stay, what may still change stands behind them in grey on a terminal."""
    if audio or out is not None or format != "txt":
        raise UsageError("--live reads standard input and writes text or, with --json, a line for each piece")
    if sys.stdin.isatty():
        raise UsageError(
            "there is no sound on standard input",
            remedy="arecord -f S16_LE -r 16000 -c 1 -t raw | craton transcribe --live",
        )
    from craton.inference.transcription_live import LiveTranscriber, Settled
    from craton.modalities.audio.pipes import read_pipe

    loaded = load_model(model, dtype=dtype, threads=threads, quiet=json)
    transcriber = LiveTranscriber(loaded.transcriber, settings)
    terminal, line = sys.stdout.isatty() and not json, ""

    def show(settled: Sequence[Settled]) -> None:
        nonlocal line
        for one in settled:
            if json:
                print_json({"start": one.start, "end": one.end, "text": one.text.strip(), "phrase_ends": one.ends})
                continue
            text = one.text if line else one.text.lstrip()
            line += text
            write(("\x1b[K" if terminal else "") + text)
            if one.ends:
                write("\n")
                line = ""
        if terminal:
            # Saved and restored, so that the next piece is written over it; cut, so that it stays in one line.
            room = max(0, shutil.get_terminal_size().columns - len(line) % shutil.get_terminal_size().columns - 1)
            write(f"\x1b7\x1b[K\x1b[2m{transcriber.provisional[:room]}\x1b[0m\x1b8")

    try:
        for samples in read_pipe(sys.stdin.buffer):
            show(transcriber.push(samples))
    finally:
        # Ctrl-C ends the sound, too: what was said is not lost.
        show(transcriber.finish())
        if line:
            write("\n")


def _check(audio: Sequence[str], format: str, out: Path | None) -> None:
    if not audio and sys.stdin.isatty():
        raise UsageError("there is nothing to transcribe", remedy="name a sound file, or send one to standard input")
    if len(audio) > 1 and format in ("srt", "vtt") and out is None:
        raise UsageError("subtitles of several files cannot stand in one", remedy="write them to a folder with --out")
    names = [Path(name).stem for name in audio]
    if out is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two files would be written as {twice}.{format}", where=str(out), remedy="rename one of them")
    there = [Path(out) / f"{name}.{format}" for name in names] if out is not None else []
    taken = next((path for path in there if path.exists()), None)
    if taken is not None:
        raise UsageError(f"{taken} exists already", remedy="name another folder, or remove it first")
    for name in audio:
        # Before the model is loaded: a typing error should not cost seconds.
        if not Path(name).expanduser().is_file():
            raise UsageError("no such sound file", where=name, remedy="check the path")
