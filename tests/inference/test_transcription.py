"""Whole transcriptions: the loop over windows by a scripted decoder, and Whisper tiny.en on real speech."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest

import craton
from craton.errors import UnknownName, UsageError
from craton.inference.model import Model
from craton.inference.transcription import Segment, Transcriber, Transcript
from craton.inference.transcription_decoding import Written
from craton.inference.transcription_formats import write_transcript
from craton.inference.transcription_settings import TranscriptionSettings
from craton.inference.transcription_times import Word
from craton.modalities.audio import read_audio

pytest.importorskip("soundfile")
pytest.importorskip("soxr")


@pytest.fixture(scope="module")
def whisper(whisper_folder) -> Model:
    return craton.load(whisper_folder)


@pytest.fixture(scope="module")
def by_name(spoken_prompts) -> dict[str, np.ndarray]:
    return {path.stem: read_audio(path) for path, _ in spoken_prompts}


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * 16_000), np.float32)


def noise(seconds: float, level: float) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(int(seconds * 16_000)) * level).astype(np.float32)


# --- formats ------------------------------------------------------------------------------------------------------

TWO = Transcript(
    "en",
    3725.5,
    (
        Segment(0.0, 1.25, " Hello & <b>.", (1, 2), -0.1, 1.0, 0.01, 0.0),
        Segment(3723.004, 3724.9, " A --> b", (3,), -0.2, 1.0, 0.01, 0.0),
    ),
)


def test_subtitles():
    assert write_transcript(TWO, "txt") == "Hello & <b>.\nA --> b\n"
    assert write_transcript(TWO, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,250\nHello & <b>.\n\n2\n01:02:03,004 --> 01:02:04,900\nA -> b\n"
    )
    assert write_transcript(TWO, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\nHello &amp; &lt;b&gt;.\n\n01:02:03.004 --> 01:02:04.900\nA -&gt; b\n"
    )
    read = json.loads(write_transcript(TWO, "json"))
    assert (read["text"], read["language"], read["segments"][1]["start"]) == (TWO.text, "en", 3723.004)


def test_subtitles_of_words():
    words = (Word(" Hello", 0.0, 0.5, 0.9), Word(" there.", 0.5, 1.25, 0.8))
    one = Transcript("en", 2.0, (Segment(0.0, 1.25, " Hello there.", (1, 2), -0.1, 1.0, 0.01, 0.0, words),))
    assert write_transcript(one, "srt").count("-->") == 2
    assert json.loads(write_transcript(one, "json"))["segments"][0]["words"][1]["word"] == " there."


def test_nothing_said_is_an_empty_file():
    nothing = Transcript("en", 2.0, ())
    assert [write_transcript(nothing, format) for format in ("txt", "srt", "vtt")] == ["", "", "WEBVTT\n\n"]


# --- the loop over windows ----------------------------------------------------------------------------------------


class Script:
    """Stands for the decoder: gives what a function says for each job, and writes down what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked, self.threads = answer, [], contextlib.nullcontext

    def write(self, context, jobs, *, temperature, width, seed):
        self.asked.append((temperature, width, [job.name for job in jobs], [list(job.prompt) for job in jobs]))
        return [self.answer(job, temperature) for job in jobs]


def written(whisper: Model, *parts: float | str, logprob: float = -0.3, no_speech: float = 0.0, at: float = 0.0):
    """A text of times (numbers) and words."""
    first, tokens = whisper.transcriber.tokens.first_time, []
    for part in parts:
        if isinstance(part, str):
            tokens += whisper.tokenizer.encode(part, add_special_tokens=False)
        else:
            tokens.append(first + round(part / 0.02))
    return Written(tokens, logprob, no_speech, at)


def scripted(whisper: Model, answer) -> tuple[Transcriber, Script]:
    ears = whisper.transcriber
    fresh = Transcriber(ears.module, ears.tokenizer, ears.tokens, (), ears.dtype)
    script = Script(answer)
    fresh._decoder = script  # type: ignore[assignment]
    return fresh, script


def run(transcriber: Transcriber, samples: np.ndarray, **settings) -> Transcript:
    return next(transcriber.transcribe([samples], TranscriptionSettings(skip_silence=False, **settings)))


def test_a_window_begins_where_the_last_time_of_the_one_before_says(whisper):
    def answer(job, temperature):
        if job.name == "0:0":
            return written(whisper, 0.0, " One.", 4.0, 4.0, " Two.", 11.5, 11.5, " Thr")
        return written(whisper, 0.0, " Three.", 5.0)

    transcriber, script = scripted(whisper, answer)
    found = run(transcriber, noise(20, 0.1), previous_text=True)
    assert [(s.start, s.end, s.text) for s in found.segments] == [
        (0.0, 4.0, " One."),
        (4.0, 11.5, " Two."),
        (11.5, 16.5, " Three."),
    ]
    assert [asked[2] for asked in script.asked] == [["0:0"], ["0:1150"]]


def test_the_text_before_is_the_beginning_of_the_next_prompt(whisper):
    transcriber, script = scripted(whisper, lambda job, t: written(whisper, 0.0, " Hello there.", 3.0, 3.0))
    run(transcriber, noise(5, 0.1), previous_text=True, prompt="Craton")
    first, second = script.asked[0][3][0], script.asked[1][3][0]
    tokens = whisper.transcriber.tokens
    assert first[0] == second[0] == tokens.previous
    assert first[-1] == second[-1] == tokens.start
    assert whisper.tokenizer.decode(first[1:-1]) == " Craton"
    assert whisper.tokenizer.decode([t for t in second[1:-1] if t < tokens.first_time]) == " Craton Hello there."
    assert [tokens.seconds(t) for t in second if t >= tokens.first_time] == [0.0, 3.0]


@pytest.mark.parametrize(
    ("bad", "why"),
    [({"logprob": -1.5}, "unlikely"), ({"words": " ha" * 60}, "repeats itself")],
    ids=["unlikely", "repeats itself"],
)
def test_a_bad_text_is_written_again_and_warmer(whisper, bad, why):
    def answer(job, temperature):
        if temperature < 0.4:
            return written(whisper, 0.0, bad.get("words", " Bad."), 2.0, logprob=bad.get("logprob", -0.3))
        return written(whisper, 0.0, " Good.", 2.0, at=temperature)

    transcriber, script = scripted(whisper, answer)
    found = run(transcriber, noise(4, 0.1), beam=2, best_of=3)
    assert found.text == "Good."
    assert found.segments[0].temperature == 0.4
    assert [(t, width) for t, width, *_ in script.asked] == [(0.0, 2), (0.2, 3), (0.4, 3)]


def test_the_last_temperature_is_kept_whatever_it_gives(whisper):
    transcriber, script = scripted(whisper, lambda job, t: written(whisper, 0.0, " Bad.", 2.0, logprob=-3.0, at=t))
    assert run(transcriber, noise(4, 0.1)).segments[0].temperature == 1.0
    assert len(script.asked) == 6


def test_silence_is_neither_written_down_nor_tried_again(whisper):
    transcriber, script = scripted(
        whisper, lambda job, t: written(whisper, 0.0, " Thank you.", 2.0, logprob=-1.5, no_speech=0.9)
    )
    assert run(transcriber, noise(4, 0.1)).segments == ()
    assert len(script.asked) == 1
    assert run(transcriber, noise(4, 0.1), no_speech=None, temperatures=(0.0,)).text == "Thank you."


@pytest.mark.parametrize(
    "parts",
    [(0.0,), (0.0, " A.", 0.0, 0.0), (" A.",), (29.98, 29.98), (0.0, " A.", 29.0, 29.0, " B.", 29.98)],
)
def test_every_text_moves_on_to_the_end(whisper, parts):
    transcriber, script = scripted(whisper, lambda job, t: written(whisper, *parts))
    found = run(transcriber, noise(70, 0.1), previous_text=True)
    assert len(script.asked) <= 5
    assert all(0 <= s.start < s.end for s in found.segments)


def test_only_what_is_wrong_is_written_again(whisper):
    def answer(job, temperature):
        late = job.name.startswith("1:")
        return written(whisper, 0.0, " Ok.", 2.0, logprob=-2.0 if late and temperature == 0 else -0.1, at=temperature)

    transcriber, script = scripted(whisper, answer)
    recordings = [noise(3, 0.1) for _ in range(3)]
    list(transcriber.transcribe(recordings, TranscriptionSettings(skip_silence=False)))
    assert [asked[2] for asked in script.asked] == [["0:0", "1:0", "2:0"], ["1:0"]]


def test_recordings_are_taken_as_they_are_needed(whisper):
    transcriber, script = scripted(whisper, lambda job, t: written(whisper, 0.0, " Ok.", 2.0))
    taken = []

    def recordings():
        for number in range(6):
            taken.append(number)
            yield noise(3, 0.1)

    for number, _ in enumerate(transcriber.transcribe(recordings(), TranscriptionSettings(batch=2))):
        assert len(taken) <= number + 2 + number % 2
    assert [len(asked[2]) for asked in script.asked] == [2, 2, 2]


def test_languages_and_translation(whisper):
    """As a multilingual model would be told: the language is found once, by the recording's first window."""
    transcriber, script = scripted(whisper, lambda job, t: written(whisper, 0.0, " Salam.", 2.0, 2.0))
    tokens = replace(transcriber.tokens, languages={"en": 50258, "fa": 50299})
    transcriber.tokens = tokens
    script.detect_language = lambda context, contexts: ["fa"] * len(contexts)
    found = run(transcriber, noise(3, 0.1), translate=True)
    assert found.language == "fa"
    assert script.asked[0][3][0] == [tokens.start, 50299, tokens.translate]
    run(transcriber, noise(3, 0.1), language="en")
    assert script.asked[-1][3][0] == [tokens.start, 50258, tokens.transcribe]
    with pytest.raises(UnknownName, match="unknown language 'xx'"):
        run(transcriber, noise(3, 0.1), language="xx")


def test_settings_that_the_model_cannot_follow(whisper):
    for wrong in ({"language": "fa"}, {"translate": True}):
        with pytest.raises(UsageError, match="English alone"):
            whisper.transcribe(noise(1, 0.1), **wrong)
    with pytest.raises(UnknownName, match="unknown setting 'beams'"):
        whisper.transcribe(noise(1, 0.1), beams=2)
    with pytest.raises(UsageError, match="use transcribe"):
        whisper.generate("Hello")
    with pytest.raises(UsageError, match="reads no text"):
        whisper.embed("Hello")


# --- real speech --------------------------------------------------------------------------------------------------


def test_a_sentence(whisper, by_name):
    found = whisper.transcribe(by_name["basic-pbx-ivr-main"], word_times=True)
    assert found.text.startswith("Thank you for calling Super Awesome Company.")
    assert found.text.endswith("For an operator, press 0.")
    assert len(found.segments) > 3
    words = [word for segment in found.segments for word in segment.words]
    assert " ".join(word.text.strip() for word in words) == " ".join(found.text.split())
    starts = [word.start for word in words]
    assert starts == sorted(starts)
    assert all(word.start <= word.end <= found.seconds for word in words)
    # Times of a reference implementation (faster-whisper 1.2.1, fp32), to 100 ms.
    for text, start, end in ((" Thank", 0.0, 0.5), (" calling", 0.8, 1.24), (" Super", 1.24, 1.84), (" zero", 0, 0)):
        if word := next((w for w in words if w.text == text), None):
            assert word.start == pytest.approx(start, abs=0.1)
            assert word.end == pytest.approx(end, abs=0.1)


def test_long_pauses_move_the_times_and_write_nothing(whisper, by_name):
    names = ["agent-user", "vm-tmpexists", "conf-getpin"]
    gap = 20.0
    parts, starts, at = [], [], 0.0
    for name in names:
        parts += [silence(gap), by_name[name]]
        starts.append(at + gap)
        at += gap + len(by_name[name]) / 16_000
    found = whisper.transcribe(np.concatenate([*parts, silence(gap)]))
    alone = [whisper.transcribe(by_name[name]) for name in names]
    assert found.text.lower() == " ".join(transcript.text for transcript in alone).lower()
    for start in starts:
        assert min(abs(segment.start - start) for segment in found.segments) < 0.8  # the margin, and the model


def test_batches_change_nothing(whisper, by_name):
    some = [by_name[name] for name in list(by_name)[:5]]
    texts = [
        [t.text for t in whisper.transcriber.transcribe(some, TranscriptionSettings(batch=batch))] for batch in (1, 5)
    ]
    same = sum(one == other for one, other in zip(*texts, strict=True))
    assert same >= 4  # bfloat16 products of other shapes may round another way


@pytest.mark.parametrize("level", [0.0, 1e-5, 1e-2])
def test_nobody_speaks(whisper, level):
    assert whisper.transcribe(noise(8, level)).text == ""


def test_one_word_and_less(whisper):
    assert whisper.transcribe(noise(0.001, 0.1)).seconds < 0.01


def test_vectors_of_recordings(whisper, by_name):
    names = ["agent-user", "vm-tmpexists"]
    vectors = whisper.embed_audio([by_name[name] for name in names])
    assert vectors.shape == (2, 384)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1])
    again = whisper.embed_audio([np.concatenate((by_name[names[0]], noise(0.1, 1e-3)))])
    assert float(again[0] @ vectors[0]) > float(again[0] @ vectors[1])


@pytest.mark.slow
def test_the_word_error_rate_over_sixty_prompts(whisper, spoken_prompts):
    normalizer = pytest.importorskip("transformers.models.whisper.english_normalizer").EnglishTextNormalizer({})

    def words(text: str) -> list[str]:
        return normalizer(text.replace("*", "star").replace("#", "pound")).split()

    chosen = [spoken_prompts[i * len(spoken_prompts) // 60] for i in range(60)]
    texts = whisper.transcriber.transcribe(read_audio(path) for path, _ in chosen)
    wrong = total = 0
    for (_, text), found in zip(chosen, texts, strict=True):
        wrong += edits(words(text), words(found.text))
        total += len(words(text))
    assert wrong / total <= 0.05


def edits(one: list[str], other: list[str]) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


@pytest.mark.slow
@pytest.mark.peer
def test_the_text_of_a_reference_implementation(whisper_folder, spoken_prompts, tmp_path):
    transformers = pytest.importorskip("transformers")
    from craton.checkpoints.families.whisper_generation import read_generation, write_generation
    from craton.checkpoints.save import save_checkpoint

    ours = craton.load(whisper_folder, dtype="float32")
    save_checkpoint(ours.module, ours.checkpoint.family, tmp_path, tokenizer=ours.tokenizer)
    heads = read_generation(whisper_folder).alignment_heads
    write_generation(tmp_path, ours.module.config, ours.transcriber.tokens, heads)
    again = read_generation(tmp_path)
    assert again.tokens(ours.tokenizer, ours.module.config.vocab) == ours.transcriber.tokens
    assert again.alignment_heads == heads
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path)
    tokens = ours.transcriber.tokens
    features = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path)
    for path, _ in spoken_prompts[::20]:
        samples = read_audio(path)
        if len(samples) > 30 * 16_000:
            continue
        mel = features(samples, sampling_rate=16_000, return_tensors="pt").input_features
        ids = theirs.generate(mel, return_timestamps=True)[0]
        expected = ours.tokenizer.decode([i for i in ids.tolist() if i < tokens.end]).strip()
        found = ours.transcribe(samples, skip_silence=False).text
        assert re.sub(r"\s+", " ", found) == re.sub(r"\s+", " ", expected), path.name
