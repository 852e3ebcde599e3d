"""What can be asked of a transcription."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from craton.config import Settings

Temperature = Annotated[float, Field(ge=0.0, le=2.0)]


class TranscriptionSettings(Settings):
    """How sound becomes text (Radford 2022, arXiv 2212.04356, section 4.5)."""

    language: str | None = Field(None, description="the code of the language spoken (en, fa, de); none: found out")
    translate: bool = Field(False, description="write English, whatever is spoken (multilingual models)")
    beam: int = Field(
        1, ge=1, le=16, description="hypotheses that are followed at temperature 0; 1: the likeliest token"
    )
    best_of: int = Field(
        5, ge=1, le=16, description="texts drawn at a higher temperature, of which the likeliest is kept"
    )
    temperatures: tuple[Temperature, ...] = Field(
        (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), min_length=1, description="tried in this order until a text is good enough"
    )
    max_compression: float | None = Field(
        2.4, gt=0, description="a text that zlib shrinks more than this repeats itself and is written again"
    )
    min_logprob: float | None = Field(
        -1.0, description="a text whose tokens have a lower mean log-probability is written again"
    )
    no_speech: float | None = Field(
        0.6,
        ge=0,
        le=1,
        description="a window more likely than this to hold no speech, and of low log-probability, is empty",
    )
    prompt: str | None = Field(None, description="text that stands before: names and words to expect, a style")
    word_times: bool = Field(False, description="when each word is spoken")
    skip_silence: bool = Field(True, description="leave out long stretches of quiet")
    previous_text: bool = Field(
        False,
        description="each window sees the text before it, so a recording is read from front to back, one at a time",
    )
    batch: int = Field(8, ge=1, le=64, description="windows of 30 s that are read together")
    seed: int = Field(0, ge=0, description="of the draws at a higher temperature")
