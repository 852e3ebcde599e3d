"""`/v1/audio/transcriptions` and `/v1/audio/translations`, OpenAI's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from craton.serving.schemas.common import Body, Name, Temperature

Format = Literal["json", "text", "srt", "vtt", "verbose_json"]


class SoundFields(Body):
    """What both take."""

    model: Name
    file: Annotated[bytes, Field(min_length=1)]
    prompt: Annotated[str, Field(max_length=4096)] | None = None
    response_format: Format = "json"
    temperature: Temperature = 0.0


class TranscriptionRequest(SoundFields):
    """Sound to be written down."""

    language: Annotated[str, Field(min_length=2, max_length=16)] | None = None
    timestamp_granularities: Annotated[list[Literal["word", "segment"]], Field(max_length=2)] | None = None
    stream: bool = False


class TranslationRequest(SoundFields):
    """Sound in any language, to be written down in English."""
