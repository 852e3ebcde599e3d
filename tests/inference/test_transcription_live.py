"""Sound as it comes: what is settled never changes, nothing is lost or said twice, and pieces may be of any size."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import craton
from craton.inference.transcription import Segment, Transcript
from craton.inference.transcription_live import LONGEST_SECONDS, LiveTranscriber, _settled_part
from craton.inference.transcription_settings import TranscriptionSettings
from craton.inference.transcription_times import Word
from craton.modalities.audio import SAMPLE_RATE, read_audio


class Ears:
    """Hears the words of a script, each a second long. The last one is heard wrong where the sound ends within it."""

    def __init__(self, words):
        self.words, self.prompts, self.longest = words, [], 0.0

    def check(self, settings):
        assert settings.beam == 1

    def transcribe(self, recordings, settings):
        (samples,) = recordings
        self.prompts.append(settings.prompt)
        self.longest = max(self.longest, len(samples) / SAMPLE_RATE)
        # A word's number is its loudness, and it is heard where most of its second is there.
        edges = [0, *(np.flatnonzero(np.diff(samples)) + 1).tolist(), len(samples)]
        spoken = []
        for first, last in itertools.pairwise(edges):
            number = round(float(samples[first]) * 1000) - 100
            if 0 <= number < len(self.words) and last - first > SAMPLE_RATE // 2:
                start, end = first / SAMPLE_RATE, last / SAMPLE_RATE
                spoken.append(Word(f" {self.words[number]}", start, end, 0.9))
        if spoken and samples[-1]:
            spoken[-1] = Word(" wrong", spoken[-1].start, spoken[-1].end, 0.1)
        text = "".join(word.text for word in spoken)
        segment = Segment(0.0, len(samples) / SAMPLE_RATE, text, (), -0.1, 1.0, 0.0, 0.0, tuple(spoken))
        yield Transcript("en", len(samples) / SAMPLE_RATE, (segment,) if spoken else ())


def speech(*numbers: int | None) -> np.ndarray:
    """Seconds of sound; None is quiet."""
    parts = [np.full(SAMPLE_RATE, 0.0 if n is None else (100 + n) / 1000, np.float32) for n in numbers]
    return np.concatenate(parts)


def listen(ears, sound, size):
    live, found = LiveTranscriber(ears, TranscriptionSettings()), []
    for start in range(0, len(sound), size):
        found += live.push(sound[start : start + size])
    return found + live.finish()


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.mark.parametrize("size", [999, SAMPLE_RATE, 5 * SAMPLE_RATE])
def test_each_word_is_said_once_whatever_the_pieces(size):
    sound = speech(None, 0, 1, 2, 3, 4, None, None, 5, 6, 7, None)
    settled = listen(Ears(WORDS), sound, size)
    assert "".join(one.text for one in settled).split() == WORDS[:8]
    assert [one.ends for one in settled].count(True) == 2
    assert settled[0].start == pytest.approx(1.0, abs=0.7)
    assert all(a.end <= b.start + 0.2 for a, b in itertools.pairwise(settled))


def test_words_come_before_the_phrase_ends():
    live = LiveTranscriber(Ears(WORDS), TranscriptionSettings())
    settled = live.push(speech(None, 0, 1, 2, 3))
    assert "".join(one.text for one in settled).split() == WORDS[:2]
    assert live.provisional.split() == ["three", "wrong"]


def test_memory_and_what_is_read_again_stay_small():
    ears = Ears([f"w{n}" for n in range(90)])
    live, found = LiveTranscriber(ears, TranscriptionSettings()), []
    for n in [None, *range(90), None]:
        found += live.push(speech(n))
    found += live.finish()
    assert ears.longest <= LONGEST_SECONDS + 2
    assert "".join(one.text for one in found).split() == ears.words
    assert max(len(prompt or "") for prompt in ears.prompts) <= 200


def test_quiet_is_not_read():
    ears = Ears(WORDS)
    assert listen(ears, speech(*[None] * 20), 4000) == []
    assert ears.prompts == []
    assert ears.longest == 0


@pytest.mark.parametrize(
    ("settled", "words", "count"),
    [
        ([], ["a"], 0),
        (["a", "b"], ["a", "b", "c"], 2),
        (["a", "b"], ["a", "x", "b", "c"], 3),
        (["a", "b", "c"], ["a", "c", "d"], 2),
        (["a"], [], 0),
    ],
)
def test_where_a_reading_goes_on(settled, words, count):
    assert _settled_part(settled, words) == count


@pytest.mark.slow
def test_real_speech_is_close_to_what_is_read_as_a_whole(whisper_folder, spoken_prompts):
    model = craton.load(whisper_folder)
    pause = np.zeros(SAMPLE_RATE, np.float32)
    chosen = [path for path, _ in spoken_prompts if path.stem in ("vm-tmpexists", "vm-review", "conf-adminmenu")]
    sound = np.concatenate([part for path in chosen for part in (read_audio(path), pause)])
    live = LiveTranscriber(model.transcriber, TranscriptionSettings())
    settled = [one for start in range(0, len(sound), 1600) for one in live.push(sound[start : start + 1600])]
    text = "".join(one.text for one in settled + live.finish())
    plain = SimpleNamespace(live=_words(text), whole=_words(model.transcribe(sound).text))
    costs = list(range(len(plain.whole) + 1))
    for count, old in enumerate(plain.live, 1):
        last, costs[0] = costs[0], count
        for place, new in enumerate(plain.whole, 1):
            last, costs[place] = costs[place], min(costs[place] + 1, costs[place - 1] + 1, last + (old != new))
    assert costs[-1] / len(plain.whole) <= 0.15


def _words(text: str) -> list[str]:
    return "".join(c for c in text.lower().replace("-", " ") if c.isalnum() or c == " ").split()
