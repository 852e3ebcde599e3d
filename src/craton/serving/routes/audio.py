"""`/v1/audio/transcriptions` and `/v1/audio/translations`: windows of sound between the steps of other answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from itertools import islice
from typing import Any

from craton.config import parse
from craton.errors import FileFormatError
from craton.inference.model import Model
from craton.inference.transcription import Step, Transcript, as_json
from craton.inference.transcription_formats import Format, write_transcript
from craton.inference.transcription_settings import TranscriptionSettings
from craton.modalities.audio import read_audio
from craton.serving.call import Call
from craton.serving.errors import ApiError
from craton.serving.http import Reply, Stream, Text
from craton.serving.schemas.audio import SoundFields, TranscriptionRequest, TranslationRequest
from craton.serving.sse import data

FILES: dict[str, tuple[Format, str]] = {
    "text": ("txt", "text/plain; charset=utf-8"),
    "srt": ("srt", "application/x-subrip; charset=utf-8"),
    "vtt": ("vtt", "text/vtt; charset=utf-8"),
}


async def transcriptions(call: Call, body: TranscriptionRequest) -> Reply:
    """The text of a recording, in its own language."""
    words = "word" in (body.timestamp_granularities or ())
    if words and body.response_format != "verbose_json":
        raise ApiError(400, "times of words are in the response format verbose_json", param="timestamp_granularities")
    # A stream is in the order of the sound: one window at a time.
    asked = {"language": body.language, "word_times": words, **({"batch": 1} if body.stream else {})}
    call.stream = body.stream
    steps = await _start(call, body, asked)
    return Stream(_events(steps), _failure) if body.stream else await _reply(steps, body, "transcribe", words)


async def translations(call: Call, body: TranslationRequest) -> Reply:
    """The text of a recording, in English."""
    return await _reply(await _start(call, body, {"translate": True}), body, "translate", False)


async def _start(call: Call, body: SoundFields, asked: dict[str, Any]) -> AsyncIterator[Step]:
    """What batch after batch of windows brings. All that can be refused is refused before it."""
    call.model = body.model
    served = await call.borrow(body.model)
    if served.application is not None or not served.model.hears:
        raise ApiError(400, f"{served.id} hears nothing: take a speech model", param="model")
    values = asked | {"prompt": body.prompt or None}
    if body.temperature > 0:
        values["temperatures"] = (body.temperature,)
    settings = parse(TranscriptionSettings, values, where="the form")
    try:
        samples = await asyncio.to_thread(read_audio, body.file)
    except FileFormatError as error:
        raise ApiError(400, f"{error.what} ({error.remedy})", param="file", code=error.code) from None
    model: Model = served.model

    def work() -> Iterator[Step]:
        yield from model.transcriber.steps([samples], settings)

    steps = work()
    # The first one before the answer begins: what the model cannot do is refused with a status.
    first = await call.state.worker.work(islice(steps, 1))

    async def rest() -> AsyncIterator[Step]:
        found = first
        while found:
            yield found[0]
            found = await call.state.worker.work(islice(steps, 1))

    return rest()


async def _reply(steps: AsyncIterator[Step], body: SoundFields, task: str, words: bool) -> Reply:
    whole = [transcript async for step in steps for transcript in step.transcripts]
    (transcript,) = whole
    if body.response_format in FILES:
        form, kind = FILES[body.response_format]
        return Text(write_transcript(transcript, form), kind)
    if body.response_format == "verbose_json":
        return _verbose(transcript, task, words)
    return {"text": transcript.text, "usage": _usage(transcript)}


def _verbose(transcript: Transcript, task: str, words: bool) -> dict[str, Any]:
    said = as_json(transcript)
    # OpenAI's has the words beside the segments and not within them.
    spoken = [word for segment in said["segments"] for word in segment.pop("words", [])]
    more = {"words": [{key: word[key] for key in ("word", "start", "end")} for word in spoken]} if words else {}
    segments = [segment | {"seek": 0} for segment in said["segments"]]
    return {"task": task, **said, "segments": segments, **more, "usage": _usage(transcript)}


def _usage(transcript: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(transcript.seconds)}


async def _events(steps: AsyncIterator[Step]) -> AsyncGenerator[bytes, None]:
    async for step in steps:
        for segment in step.segments:
            yield data({"type": "transcript.text.delta", "delta": segment.text})
        for transcript in step.transcripts:
            done = {"type": "transcript.text.done", "text": transcript.text, "usage": _usage(transcript)}
            yield data(done)


def _failure(error: ApiError) -> bytes:
    return data({"type": "error", **error.body()})
