"""A transcript as a file: plain text, SubRip, WebVTT, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Literal

from craton.inference.transcription import Segment, Transcript, as_json

Format = Literal["txt", "srt", "vtt", "json"]


def write_transcript(transcript: Transcript, format: Format) -> str:
    """The text of a file in this format, ending with a line end. With word times, subtitles have one cue a word."""
    return WRITERS[format](transcript)


def _txt(transcript: Transcript) -> str:
    return "".join(f"{segment.text.strip()}\n" for segment in transcript.segments)


def _srt(transcript: Transcript) -> str:
    cues = (
        f"{number}\n{_stamp(start, ',')} --> {_stamp(end, ',')}\n{text}\n"
        for number, (start, end, text) in enumerate(_cues(transcript), 1)
    )
    return "\n".join(cues)


def _vtt(transcript: Transcript) -> str:
    cues = (f"{_stamp(start, '.')} --> {_stamp(end, '.')}\n{_plain(text)}\n" for start, end, text in _cues(transcript))
    return "WEBVTT\n\n" + "\n".join(cues)


def _json(transcript: Transcript) -> str:
    return json.dumps(as_json(transcript), ensure_ascii=False) + "\n"


WRITERS: dict[Format, Callable[[Transcript], str]] = {"txt": _txt, "srt": _srt, "vtt": _vtt, "json": _json}


def _cues(transcript: Transcript) -> Iterator[tuple[float, float, str]]:
    for segment in transcript.segments:
        yield from _cues_of(segment)


def _cues_of(segment: Segment) -> Iterator[tuple[float, float, str]]:
    if not segment.words:
        # "-->" inside a text would be read as a line of times.
        yield segment.start, segment.end, segment.text.strip().replace("-->", "->")
    for word in segment.words:
        yield word.start, word.end, word.text.strip().replace("-->", "->")


def _plain(text: str) -> str:
    # WebVTT's text is markup.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _stamp(seconds: float, point: str) -> str:
    whole = round(max(0.0, seconds) * 1000)
    hours, rest = divmod(whole, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"
