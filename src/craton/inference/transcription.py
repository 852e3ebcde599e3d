"""Sound to text: which windows of 30 s are read, what is tried again, and where one window ends and the next begins.

A recording is cut at its pauses into regions, and a region is read window by window: each begins where the last time
that the model wrote in the one before it says. Windows of different regions are read together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from craton.errors import UnknownName, UsageError
from craton.inference.transcription_decoding import Job, TextDecoder, Written
from craton.inference.transcription_settings import TranscriptionSettings
from craton.inference.transcription_times import Word, WordAligner
from craton.modalities.audio import FRAMES_PER_SECOND, HOP, SAMPLE_RATE, SpeechTokens, find_speech, log_mel
from craton.modalities.audio.activity import quietest
from craton.modalities.text import Tokenizer
from craton.models import Seq2Seq
from craton.trunk import Context

FRAMES_PER_TIME = 2  # frames of the spectrogram between one time token and the next
SHORTEST_REST = 50  # frames: what is left of a region behind a time that the model wrote is at least so long, or done
RESET_TEMPERATURE = 0.5  # a text drawn above it is no good beginning for the next

Samples = NDArray[np.float32]
Progress = Callable[[float, float], None]
"""Called as progress(seconds read, seconds in all so far)."""


@dataclass(frozen=True)
class Segment:
    """A piece of text and when it is spoken, in seconds. The figures are those of the window that it comes from."""

    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    mean_logprob: float
    compression: float
    no_speech: float
    temperature: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """The text of one recording. language: as asked for or found out. seconds: of the recording."""

    language: str
    seconds: float
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """All of it in one line."""
        return "".join(segment.text for segment in self.segments).strip()


@dataclass(frozen=True)
class Step:
    """What one batch of windows brought. segments: of these windows. transcripts: of recordings that are now whole."""

    segments: tuple[Segment, ...]
    transcripts: tuple[Transcript, ...]


@dataclass
class _Recording:
    number: int
    seconds: float
    mel_MT: NDArray[np.float32]
    language: str | None
    open_regions: int = 0
    segments: list[Segment] = field(default_factory=list)


@dataclass
class _Region:
    # Frames [seek, end) of a recording are still to be read.
    recording: _Recording
    seek: int
    end: int
    previous: list[int]  # the ids before
    begun: bool = False


@dataclass
class _Window:
    region: _Region
    frames: int  # that are of the recording; the rest of the window is silence
    written: Written


class Transcriber:
    """Transcribes with one model. alignment_heads: see `WordAligner`."""

    def __init__(
        self,
        module: Seq2Seq,
        tokenizer: Tokenizer,
        tokens: SpeechTokens,
        alignment_heads: Sequence[tuple[int, int]] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module, self.tokenizer, self.tokens, self.dtype = module, tokenizer, tokens, dtype
        self.window = 2 * module.config.frames  # frames of the spectrogram
        self._decoder = TextDecoder(module, tokens, dtype)
        self._aligner = WordAligner(module, tokenizer, tokens, alignment_heads)

    def check(self, settings: TranscriptionSettings) -> None:
        """Refuse what this model cannot do. Raises UnknownName or UsageError."""
        if not self.tokens.languages:
            if settings.translate or settings.language not in (None, "en"):
                raise UsageError(
                    "this model knows English alone", remedy="take a multilingual one (its name does not end in .en)"
                )
        elif settings.language is not None and settings.language not in self.tokens.languages:
            raise UnknownName("language", settings.language, self.tokens.languages)

    def transcribe(
        self,
        recordings: Iterable[Samples],
        settings: TranscriptionSettings = TranscriptionSettings(),  # noqa: B008  (immutable)
        progress: Progress | None = None,
    ) -> Iterator[Transcript]:
        """The transcripts of recordings (mono, 16 kHz), in their order. They are taken one by one, as they are needed
        to fill a batch of windows.

        progress: told after every batch how many seconds are done, of the recordings that were taken so far.
        """
        for step in self.steps(recordings, settings, progress):
            yield from step.transcripts

    def steps(
        self,
        recordings: Iterable[Samples],
        settings: TranscriptionSettings = TranscriptionSettings(),  # noqa: B008  (immutable)
        progress: Progress | None = None,
    ) -> Iterator[Step]:
        """`transcribe`, batch of windows by batch, for who does other things between two of them."""
        self.check(settings)
        waiting, source = iter(recordings), list[_Recording]()
        regions: list[_Region] = []
        taken, more = 0, True
        while True:
            while more and len(regions) < settings.batch:
                samples = next(waiting, None)
                if samples is None:
                    more = False
                    break
                recording, cut = self._open(samples, taken, settings)
                taken += 1
                source.append(recording)
                regions += cut
            if not regions and not source:
                return
            written: list[Segment] = []
            if regions:
                written = self._read(regions[: settings.batch], settings)
                regions = [region for region in regions if region.seek < region.end]
                self._report(progress, source, regions)
            whole = []
            while source and source[0].open_regions == 0:
                whole.append(self._close(source.pop(0)))
            yield Step(tuple(written), tuple(whole))

    @torch.inference_mode()
    def vector(self, samples: Samples) -> Tensor:
        """The mean of the encoder's vectors of a recording, fp32 [width], of length 1."""
        spectrum_MT = self._spectrum(samples)
        total, frames = torch.zeros(self.module.config.encoder.width), -(-len(samples) // HOP)
        for first in range(0, frames, self.window):
            mel_BMF = torch.from_numpy(spectrum_MT[None, :, first : first + self.window]).to(self.dtype)
            heard = -(-min(self.window, frames - first) // FRAMES_PER_TIME)
            total += self.module.encode(mel_BMF)[0, :heard].float().sum(0)
        return functional.normalize(total, dim=0)

    def _spectrum(self, samples: Samples) -> NDArray[np.float32]:
        # A window's worth of silence behind the recording: the last windows reach into it.
        silence = np.zeros(self.window * HOP, np.float32)
        return log_mel(np.concatenate((samples, silence)), self.module.config.mels)

    def _open(self, samples: Samples, number: int, settings: TranscriptionSettings) -> tuple[_Recording, list[_Region]]:
        mel_MT = self._spectrum(samples)
        language = settings.language if self.tokens.languages else "en"
        recording = _Recording(number, len(samples) / SAMPLE_RATE, mel_MT, language)
        spans = self._spans(samples, settings)
        prompt = self._prompt(settings)
        recording.open_regions = len(spans)
        return recording, [_Region(recording, start, end, list(prompt)) for start, end in spans]

    def _spans(self, samples: Samples, settings: TranscriptionSettings) -> list[tuple[int, int]]:
        """The frames [first, last) that are read as one region each."""
        total = -(-len(samples) // HOP)
        spans = [(0, total)]
        if settings.skip_silence:
            found = find_speech(samples, SAMPLE_RATE)
            spans = [(start // HOP, min(total, -(-end // HOP))) for start, end in found]
        if settings.previous_text:
            # One region from the first to the last sound, or the text of a window would not be there for the next.
            return [(spans[0][0], spans[-1][1])] if spans else []
        # Stretches that fit one window are read as one: a window costs the same whatever it holds, and more context
        # makes for fewer errors.
        glued: list[tuple[int, int]] = []
        for start, end in spans:
            if glued and end - glued[-1][0] <= self.window:
                glued[-1] = (glued[-1][0], end)
            else:
                glued.append((start, end))
        return [part for span in glued for part in self._cut(samples, *span)]

    def _cut(self, samples: Samples, start: int, end: int) -> Iterator[tuple[int, int]]:
        """A region as parts of at most one window, cut where it is quietest in a window's second half."""
        while end - start > self.window:
            at = quietest(samples, (start + self.window // 2) * HOP, (start + self.window) * HOP) // HOP
            yield start, at
            start = at
        yield start, end

    def _prompt(self, settings: TranscriptionSettings) -> list[int]:
        if not settings.prompt:
            return []
        return self.tokenizer.encode(" " + settings.prompt.strip(), add_special_tokens=False)

    def _read(self, regions: Sequence[_Region], settings: TranscriptionSettings) -> list[Segment]:
        """Read the next window of each of these regions; what is said in them."""
        mels, sizes = [], []
        for region in regions:
            mel_MT = region.recording.mel_MT
            frames = min(self.window, region.end - region.seek)
            # The floor of the spectrogram, which silence has.
            part_MT = np.full((len(mel_MT), self.window), mel_MT[:, -1:].min(), np.float32)
            part_MT[:, :frames] = mel_MT[:, region.seek : region.seek + frames]
            mels.append(part_MT)
            sizes.append(frames)
        with torch.inference_mode():
            mel_BMF = torch.from_numpy(np.stack(mels)).to(self.dtype)
            context = self.module.decoder.read(self.module.encode(mel_BMF))
        with self._decoder.threads():
            self._find_languages(context, regions)
            texts = self._write(context, regions, settings)
            written: list[Segment] = []
            for number, (region, frames, text) in enumerate(zip(regions, sizes, texts, strict=True)):
                written += self._settle(context, number, _Window(region, frames, text), settings)
        return written

    def _find_languages(self, context: Context, regions: Sequence[_Region]) -> None:
        unknown = [i for i, region in enumerate(regions) if region.recording.language is None]
        if unknown:
            for i, found in zip(unknown, self._decoder.detect_language(context, unknown), strict=True):
                # The first window of a recording decides.
                recording = regions[i].recording
                recording.language = recording.language or found

    def _start(self, region: _Region, settings: TranscriptionSettings) -> list[int]:
        tokens, language = self.tokens, region.recording.language
        if not tokens.languages:
            return [tokens.start]
        assert language is not None
        return [tokens.start, tokens.languages[language], tokens.translate if settings.translate else tokens.transcribe]

    def _write(self, context: Context, regions: Sequence[_Region], settings: TranscriptionSettings) -> list[Written]:
        """The text of each window: at the first temperature at which it is good enough, or at the last."""
        jobs = []
        for number, region in enumerate(regions):
            before = region.previous[-(self.module.config.context // 2 - 1) :]
            prompt = ([self.tokens.previous, *before] if before else []) + self._start(region, settings)
            jobs.append(Job(number, prompt, f"{region.recording.number}:{region.seek}"))
        texts: dict[int, Written] = {}
        todo = jobs
        for temperature in settings.temperatures:
            width = settings.best_of if temperature > 0 else settings.beam
            written = self._decoder.write(context, todo, temperature=temperature, width=width, seed=settings.seed)
            texts |= {job.context: text for job, text in zip(todo, written, strict=True)}
            todo = [job for job in todo if not self._is_good(texts[job.context], settings)]
            if not todo:
                break
        return [texts[number] for number in range(len(regions))]

    def _is_good(self, text: Written, settings: TranscriptionSettings) -> bool:
        unlikely = settings.min_logprob is not None and text.mean_logprob < settings.min_logprob
        if unlikely and settings.no_speech is not None and text.no_speech > settings.no_speech:
            return True  # nobody speaks, so no other text would be better
        repeats = settings.max_compression is not None and self._compression(text.tokens) > settings.max_compression
        return not unlikely and not repeats

    def _is_silent(self, text: Written, settings: TranscriptionSettings) -> bool:
        if settings.no_speech is None or text.no_speech <= settings.no_speech:
            return False
        return settings.min_logprob is None or text.mean_logprob < settings.min_logprob

    def _compression(self, tokens: Sequence[int]) -> float:
        text = self.tokenizer.decode(self._text(tokens)).strip().encode()
        return len(text) / len(zlib.compress(text)) if text else 0.0

    def _text(self, tokens: Sequence[int]) -> list[int]:
        return [token for token in tokens if token < self.tokens.end]

    def _settle(self, context: Context, number: int, window: _Window, settings: TranscriptionSettings) -> list[Segment]:
        """Turn a window's text into segments, and move its region on to where the next window begins."""
        region, written = window.region, window.written
        segments: list[Segment] = []
        start, region.begun = region.seek, True
        if self._is_silent(written, settings):
            region.seek += window.frames
        else:
            pieces, used = self._pieces(written.tokens, window.frames)
            region.seek += used if 0 < used <= window.frames else window.frames
            segments = self._segments(pieces, start, written)
            if settings.word_times and segments:
                segments = self._with_words(context, number, window, start, segments, settings)
            region.recording.segments += segments
            if settings.previous_text:
                # With their times: a model that sees text without them stops writing them, and loses its place.
                region.previous += [token for _, _, ids in pieces for token in ids]
                if written.temperature > RESET_TEMPERATURE:
                    region.previous = []
        if region.end - region.seek < SHORTEST_REST:
            region.seek = region.end
        if region.seek >= region.end:
            region.recording.open_regions -= 1
        return segments

    def _pieces(self, tokens: Sequence[int], frames: int) -> tuple[list[tuple[float, float, list[int]]], int]:
        """(start, end, ids) of each piece between times, in seconds of the window; and the frames that all cover."""
        first = self.tokens.first_time
        is_time = [token >= first for token in tokens]
        closed = is_time[-2:] == [False, True]  # the text ends with a time: nothing is spoken behind it
        cuts = [i for i in range(1, len(tokens)) if is_time[i - 1] and is_time[i]]
        whole = frames / FRAMES_PER_SECOND
        if not cuts:
            # Without a pair of times all of the window is one piece, up to its last time if it has one.
            times = [token for token in tokens if token >= first]
            end = self.tokens.seconds(times[-1]) if times and times[-1] != first else whole
            begin = self.tokens.seconds(times[0]) if len(times) > 1 else 0.0
            return [(begin, min(end, whole), list(tokens))], frames
        pieces, last = [], 0
        for cut in [*cuts, len(tokens)] if closed else cuts:
            part = list(tokens[last:cut])
            pieces.append((self.tokens.seconds(part[0]), self.tokens.seconds(part[-1]), part))
            last = cut
        if closed:
            return pieces, frames
        return pieces, (tokens[last - 1] - first) * FRAMES_PER_TIME

    def _segments(
        self, pieces: Sequence[tuple[float, float, list[int]]], start: int, written: Written
    ) -> list[Segment]:
        offset, compression = start / FRAMES_PER_SECOND, self._compression(written.tokens)
        segments = []
        for begin, end, ids in pieces:
            text = self._text(ids)
            segment = Segment(
                round(offset + begin, 3),
                round(offset + end, 3),
                self.tokenizer.decode(text),
                tuple(text),
                written.mean_logprob,
                compression,
                written.no_speech,
                written.temperature,
            )
            if segment.text.strip() and segment.end > segment.start:
                segments.append(segment)
        return segments

    def _with_words(
        self,
        context: Context,
        number: int,
        window: _Window,
        start: int,
        segments: list[Segment],
        settings: TranscriptionSettings,
    ) -> list[Segment]:
        offset, language = start / FRAMES_PER_SECOND, window.region.recording.language or "en"
        text = [token for segment in segments for token in segment.tokens]
        begin = self._start(window.region, settings)
        found = self._aligner.words(context, number, begin, text, window.frames // FRAMES_PER_TIME, language)
        words = [replace(word, start=round(offset + word.start, 3), end=round(offset + word.end, 3)) for word in found]
        # Words and segments are made of the same text, so each segment takes words until it has all of its own.
        out, at = [], 0
        for segment in segments:
            mine, length = [], 0
            while at < len(words) and length < len(segment.text):
                mine.append(words[at])
                length += len(words[at].text)
                at += 1
            if mine:
                segment = replace(segment, start=mine[0].start, end=max(mine[-1].end, mine[0].start), words=tuple(mine))
            out.append(segment)
        return out

    def _close(self, recording: _Recording) -> Transcript:
        segments = sorted(recording.segments, key=lambda segment: segment.start)
        return Transcript(recording.language or "en", recording.seconds, tuple(segments))

    def _report(self, progress: Progress | None, source: Sequence[_Recording], regions: Sequence[_Region]) -> None:
        if progress is not None:
            left = sum(region.end - region.seek for region in regions) / FRAMES_PER_SECOND
            total = sum(recording.seconds for recording in source)
            progress(max(0.0, total - left), total)


def as_json(transcript: Transcript) -> dict[str, Any]:
    """The JSON form, with the keys of OpenAI's `verbose_json`."""
    return {
        "text": transcript.text,
        "language": transcript.language,
        "duration": round(transcript.seconds, 3),
        "segments": [
            {
                "id": number,
                "start": segment.start,
                "end": segment.end,
                "text": segment.text,
                "tokens": list(segment.tokens),
                "temperature": segment.temperature,
                "avg_logprob": round(segment.mean_logprob, 4),
                "compression_ratio": round(segment.compression, 3),
                "no_speech_prob": round(segment.no_speech, 4),
            }
            | ({"words": [_word(word) for word in segment.words]} if segment.words else {})
            for number, segment in enumerate(transcript.segments)
        ],
    }


def _word(word: Word) -> dict[str, Any]:
    return {"word": word.text, "start": word.start, "end": word.end, "probability": round(word.probability, 4)}
