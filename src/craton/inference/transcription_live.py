"""Sound as it comes to text as it comes: what two successive readings agree on is settled and never changes.

LocalAgreement-2 (Macháček 2023, arXiv 2307.14743): every second, all sound since the last end of a phrase is read
again; words in which this reading and the one before agree are settled. At a pause everything is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from craton.inference.transcription import Transcriber
from craton.inference.transcription_settings import TranscriptionSettings
from craton.inference.transcription_times import Word
from craton.modalities.audio import SAMPLE_RATE
from craton.modalities.audio.activity import FRAME, levels, speech_threshold

STEP_SECONDS: Final = 1.0  # of new sound between two readings
PAUSE_SECONDS: Final = 0.8  # of quiet that end a phrase
LONGEST_SECONDS: Final = 18.0  # of sound that are read again; then what is settled is cut off
KEPT_SECONDS: Final = 0.4  # of quiet before a phrase
HISTORY_SECONDS: Final = 60.0  # over which quiet and loud are known
PROMPT_CHARACTERS: Final = 200  # of what was settled that a reading is told

Samples = NDArray[np.float32]


class Settled(NamedTuple):
    """Words that are settled, from `start` to `end` in seconds of the whole sound. ends: a phrase ends with them."""

    start: float
    end: float
    text: str
    ends: bool


class LiveTranscriber:
    """Takes sound in pieces of any size; what comes out does not depend on their sizes.

    Memory stays as it is however long it goes on. settings: those of a transcription; times of words are always found.
    A text that repeats itself is not believed while somebody speaks, as the next reading comes anyway; at the end of a
    phrase it is written again, as in any transcription.
    """

    def __init__(self, transcriber: Transcriber, settings: TranscriptionSettings) -> None:
        """Raises what `Transcriber.check` raises."""
        transcriber.check(settings)
        self._transcriber = transcriber
        self._settings = settings.model_copy(update={"word_times": True, "skip_silence": False, "batch": 1})
        self._waiting = np.zeros(0, np.float32)  # not yet a whole step
        self._sound = np.zeros(0, np.float32)  # what is read again
        self._offset = 0  # of its first sample, in the whole sound
        self._levels = np.zeros(0, np.float32)  # of the last minute
        self._before: list[Word] = []  # the last reading's words that are not settled
        self._settled: list[str] = []  # what is settled of the sound that is read again
        self._settled_end = 0  # the sample at which it ends, as the last reading has it
        self._text = settings.prompt or ""  # what was said before that sound

    @property
    def provisional(self) -> str:
        """What the last reading says beyond what is settled; the next one may say otherwise."""
        return "".join(word.text for word in self._before)

    def push(self, samples: Samples) -> list[Settled]:
        """More sound (mono, 16 kHz); what is settled by it."""
        self._waiting = np.concatenate((self._waiting, samples))
        step, found = int(STEP_SECONDS * SAMPLE_RATE), list[Settled]()
        while len(self._waiting) >= step:
            piece, self._waiting = self._waiting[:step], self._waiting[step:]
            found += self._step(piece)
        return found

    def finish(self) -> list[Settled]:
        """The sound has ended; what is left is settled."""
        rest, self._waiting = self._waiting, np.zeros(0, np.float32)
        self._sound = np.concatenate((self._sound, rest))
        self._hear(rest)
        return self._end() if self._speaks(self._sound) else []

    def _step(self, piece: Samples) -> list[Settled]:
        self._sound = np.concatenate((self._sound, piece))
        self._hear(piece)
        if not self._speaks(self._sound):
            self._cut(max(0, len(self._sound) - int(KEPT_SECONDS * SAMPLE_RATE)))
            return []
        if not self._speaks(self._sound[-int(PAUSE_SECONDS * SAMPLE_RATE) :]):
            return self._end()
        words = self._read(final=False)
        agreed = 0
        for old, new in zip(self._before, words, strict=False):
            if _plain(old.text) != _plain(new.text):
                break
            agreed += 1
        # The last word may be cut off by the end of the sound, whatever both readings say.
        agreed = min(agreed, max(0, len(words) - 1))
        settled = self._settle(words[:agreed], ends=False)
        self._before = words[agreed:]
        if len(self._sound) > LONGEST_SECONDS * SAMPLE_RATE:
            self._shorten()
        return settled

    def _end(self) -> list[Settled]:
        settled = self._settle(self._read(final=True), ends=True)
        self._cut(len(self._sound))
        self._before = []
        return settled

    def _shorten(self) -> None:
        """Cut off what is settled, or half where nothing is: a model that cannot make up its mind must not stop us."""
        self._cut(self._settled_end if self._settled_end > SAMPLE_RATE else len(self._sound) // 2)

    def _cut(self, count: int) -> None:
        self._sound = self._sound[count:]
        self._offset += count
        self._text = (self._text + "".join(self._settled))[-PROMPT_CHARACTERS:]
        self._settled, self._settled_end = [], 0

    def _read(self, *, final: bool) -> list[Word]:
        """The words that are not settled, their times in seconds of the whole sound; none where the text is bad and
        this is not the last reading of the phrase."""
        # A text that was cut off begins with a part of a word.
        cut = len(self._text) == PROMPT_CHARACTERS and " " in self._text
        told = self._text.partition(" ")[2] if cut else self._text
        settings = self._settings.model_copy(update={"prompt": told.strip() or None})
        if not final:
            settings = settings.model_copy(update={"temperatures": settings.temperatures[:1]})
        (transcript,) = self._transcriber.transcribe([self._sound], settings)
        most = settings.max_compression
        if not final and most is not None and any(segment.compression > most for segment in transcript.segments):
            return []
        words = [word for segment in transcript.segments for word in segment.words]
        first = _settled_part([_plain(text) for text in self._settled], [_plain(word.text) for word in words])
        if first:
            # With sound behind them their times are better than they were when they were settled.
            self._settled_end = min(len(self._sound), int(words[first - 1].end * SAMPLE_RATE))
        offset = self._offset / SAMPLE_RATE
        return [
            replace(word, start=round(word.start + offset, 3), end=round(word.end + offset, 3))
            for word in words[first:]
        ]

    def _settle(self, words: Sequence[Word], *, ends: bool) -> list[Settled]:
        text = "".join(word.text for word in words)
        if not text.strip():
            end = (self._offset + self._settled_end) / SAMPLE_RATE
            return [Settled(end, end, "", True)] if ends and self._settled else []
        self._settled += [word.text for word in words]
        self._settled_end = int(words[-1].end * SAMPLE_RATE) - self._offset
        return [Settled(words[0].start, words[-1].end, text, ends)]

    def _hear(self, piece: Samples) -> None:
        if len(piece):
            most = int(HISTORY_SECONDS * SAMPLE_RATE) // FRAME
            self._levels = np.concatenate((self._levels, levels(piece)))[-most:]

    def _speaks(self, samples: Samples) -> bool:
        return bool(len(samples)) and bool((levels(samples) > speech_threshold(self._levels)).sum() >= 3)


def _settled_part(settled: Sequence[str], words: Sequence[str]) -> int:
    """How many of `words`, from the first, say what is settled: where the fewest words differ (Levenshtein)."""
    costs = list(range(len(words) + 1))  # of the settled words so far against each beginning of `words`
    for count, old in enumerate(settled, 1):
        last, costs[0] = costs[0], count
        for place, new in enumerate(words, 1):
            last, costs[place] = costs[place], min(costs[place] + 1, costs[place - 1] + 1, last + (old != new))
    if not settled:
        return 0
    # Of equals, one that ends as what is settled does, and else one of about as many words.
    best = [place for place, cost in enumerate(costs) if cost == min(costs)]
    return min(best, key=lambda place: (words[place - 1 : place] != settled[-1:], abs(place - len(settled))))


def _plain(text: str) -> str:
    return re.sub(r"\W+", "", text.lower())
