"""Recordings to batches: which ones form a step, how each is changed by chance, and the tokens that it shall become.
All of it is a pure function of (seed, epoch, recording), so a resumed run hears what it would have heard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from craton.config import Settings
from craton.data.example import UNTRAINED
from craton.data.plan import Indices, cut_rows, permutation
from craton.data.speech import SpeechSet
from craton.errors import UsageError
from craton.modalities.audio import HOP, SAMPLE_RATE, SpeechTokens, log_mel
from craton.modalities.audio.speech_tokens import SECONDS_PER_TIME

DRAWS: Final = 16  # random numbers for each recording, before those of its noise
MASKS: Final = 2  # of SpecAugment, in each direction
FRAMES_PER_VECTOR: Final = 2  # of the spectrogram, for each vector of the encoder
LOUDEST_TILT: Final = 1.0  # noise falls by at most 6 dB an octave, which is how rooms sound
CLEANEST_DB: Final = 40.0

Samples = NDArray[np.float32]


class SpeechAugmentSettings(Settings):
    """How training changes a recording, each time anew. Nothing is changed when a model is measured."""

    speed: float = Field(
        default=0.0, ge=0, le=0.5, description="played at most this share faster or slower, so higher or deeper too"
    )
    gain: float = Field(default=0.0, ge=0, le=40, description="louder or softer by at most so many decibels")
    noise: float = Field(default=0.0, ge=0, le=1, description="share of them that noise is added to")
    snr: float = Field(default=5.0, ge=-20, le=40, description="decibels that the loudest noise is below the speech")
    shift: float = Field(default=0.0, ge=0, le=30, description="begins at most so many seconds later in the window")
    hide_mels: float = Field(
        default=0.0, ge=0, le=0.5, description="two bands of at most this share of the mels are hidden"
    )
    hide_frames: float = Field(
        default=0.0, ge=0, le=0.5, description="two stretches of at most this share of the speech are hidden"
    )


class Sentence(NamedTuple):
    """One recording as the decoder learns it. ids are read, targets written; the first of them stand for the prompt and
    are UNTRAINED."""

    ids: list[int]
    targets: list[int]


@dataclass(frozen=True)
class SpeechBatch:
    """mel [B, mels, frames of the window], fp32. ids, targets [T]: the texts one after another, rows of each in `rows`.
    labels [N]: the texts' plain tokens for CTC, `label_counts` of each. vectors: that the encoder makes of a window."""

    mel_BMF: Tensor
    ids_T: Tensor
    targets_T: Tensor
    labels_N: Tensor
    rows: tuple[int, ...]
    label_counts: tuple[int, ...]
    trained: int
    vectors: int

    @property
    def tokens(self) -> int:
        """Vectors of the encoder and tokens of the texts."""
        return sum(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Vectors and tokens of each recording."""
        return tuple(self.vectors + rows for rows in self.rows)

    def to(self, device: torch.device | str) -> SpeechBatch:
        """The same batch on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("mel_BMF", "ids_T", "targets_T", "labels_N")}
        return replace(self, **tensors)


class SpeechWriter:
    """Texts to what the decoder learns: start, (language and task), times or none, text, end (Radford 2022, fig. 1)."""

    def __init__(self, tokens: SpeechTokens, language: str = "en") -> None:
        self.tokens = tokens
        self._prompt = [tokens.start]
        if tokens.languages:
            self._prompt += [tokens.languages[language], tokens.transcribe]

    def sentence(self, text: Sequence[int], end_seconds: float | None) -> Sentence:
        """A text's tokens; with a time before and behind it, or (None) told to write none. The text begins with its
        window."""
        tokens, prompt = self.tokens, self._prompt
        if end_seconds is None:
            whole = [*prompt, tokens.no_times, *text, tokens.end]
            fixed = len(prompt)
        else:
            last = tokens.first_time + max(1, round(end_seconds / SECONDS_PER_TIME))
            whole = [*prompt, tokens.first_time, *text, last, tokens.end]
            fixed = len(prompt) - 1
        return Sentence(whole[:-1], [UNTRAINED] * fixed + whole[fixed + 1 :])


class SpeechLoader:
    """The micro-batches of every step for one rank.

    texts: the plain tokens of each recording. batch: recordings of a global step; the last one of an epoch may hold
    fewer. micro: at most so many at once. mels, vectors: of the model; a window is of twice as many frames as it has
    vectors. augment: none for measuring, where every text has its times.

    Raises UsageError where there are no recordings, a number makes no sense, or a recording is longer than the window.
    """

    def __init__(
        self,
        speech: SpeechSet,
        texts: Sequence[Sequence[int]],
        writer: SpeechWriter,
        *,
        batch: int,
        micro: int,
        mels: int,
        vectors: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        augment: SpeechAugmentSettings | None = None,
    ) -> None:
        if not len(speech):
            raise UsageError("there is nothing to train on: the data holds no recording")
        for name, value in (("batch", batch), ("micro", micro)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1 (got {value})")
        self.window = FRAMES_PER_VECTOR * vectors * HOP  # samples
        longest = max(map(len, speech.recordings))
        if longest > self.window:
            raise UsageError(f"a recording of {longest} samples does not fit a window of {self.window}")
        self.speech, self.texts, self.writer = speech, texts, writer
        self.batch, self.micro, self.mels, self.vectors = batch, micro, mels, vectors
        self.seed, self.rank, self.world, self.augment = seed, rank, world, augment
        self.steps_per_epoch = -(-len(speech) // batch)
        self._order = lru_cache(maxsize=1)(self._make_order)  # a memory of the last epoch, not a state

    def indices(self, step: int) -> Indices:
        """The recordings of a global step, of all ranks."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[within * self.batch : (within + 1) * self.batch]

    def step(self, index: int) -> list[SpeechBatch]:
        """This rank's micro-batches of a global step (from 0, over all epochs)."""
        chosen = self.indices(index)
        cuts = cut_rows(len(chosen), self.world, self.micro)
        epoch, most = index // self.steps_per_epoch, max(len(parts) for parts in cuts)
        found = [self.make(chosen[part], epoch) for part in cuts[self.rank]]
        return found + [self._nothing()] * (most - len(found))

    def make(self, indices: Indices, epoch: int = 0) -> SpeechBatch:
        """The batch of these recordings, as they are in this epoch; texts of equal length stand together."""
        found = [(*self._one(int(i), epoch), list(self.texts[i])) for i in indices]
        found.sort(key=lambda one: len(one[1].ids))
        sentences = [one[1] for one in found]
        targets = [target for sentence in sentences for target in sentence.targets]
        return SpeechBatch(
            torch.from_numpy(np.stack([one[0] for one in found])),
            torch.tensor([i for sentence in sentences for i in sentence.ids]),
            torch.tensor(targets),
            torch.tensor([label for one in found for label in one[2]], dtype=torch.long),
            tuple(len(sentence.ids) for sentence in sentences),
            tuple(len(one[2]) for one in found),
            sum(target != UNTRAINED for target in targets),
            self.vectors,
        )

    def all(self, most: int = 64) -> list[SpeechBatch]:
        """This rank's share of all recordings, in order, in batches of at most `most`: for measuring."""
        mine = np.arange(self.rank, len(self.speech), self.world)
        return [self.make(mine[start : start + most]) for start in range(0, len(mine), most)]

    def _one(self, index: int, epoch: int) -> tuple[NDArray[np.float32], Sentence]:
        samples: Samples = self.speech.recordings[index].astype(np.float32) / np.float32(32768)
        text, times = self.texts[index], True
        if self.augment is None:
            window = np.zeros(self.window, np.float32)
            window[: len(samples)] = samples
            mel_MF, end = log_mel(window, self.mels), len(samples)
        else:
            source = np.random.Philox(np.random.SeedSequence((self.seed, 79, epoch, index)))
            draws = _uniform(source, DRAWS)
            window, start, end = changed_sound(samples, self.window, draws, self.augment, source)
            mel_MF = log_mel(window, self.mels)
            hide(mel_MF, start // HOP, -(-end // HOP), draws, self.augment)
            times = bool(draws[0] < 0.5)  # half of them, as Whisper learnt both forms
        return mel_MF, self.writer.sentence(text, end / SAMPLE_RATE if times else None)

    def _make_order(self, epoch: int) -> Indices:
        return permutation(len(self.speech), self.seed, epoch)

    def _nothing(self) -> SpeechBatch:
        # What a rank runs beside others that still have recordings: one of which nothing is learnt.
        batch = self.make(np.zeros(1, np.int64))
        nothing = torch.full_like(batch.targets_T, UNTRAINED)
        return replace(batch, targets_T=nothing, labels_N=batch.labels_N[:0], label_counts=(0,), trained=0)


def changed_sound(
    samples: Samples, window: int, draws: NDArray[np.float64], how: SpeechAugmentSettings, source: np.random.Philox
) -> tuple[Samples, int, int]:
    """(a window [window], the sample at which the recording begins in it, and at which it ends). draws [DRAWS]: 0 to 1.

    Speed, gain, place, noise, in this order. Speed is changed as a tape's is (Ko 2015, Interspeech, "Audio augmentation
    for speech recognition"): pitch and formants go with it, so that one speaker sounds like several.
    """
    if how.speed:
        factor = max((1 + how.speed) ** (2 * draws[1] - 1), len(samples) / window)
        count = max(1, int(len(samples) / factor))
        # Straight lines between samples: what is lost lies above the pitches that a mel's bins tell apart.
        samples = np.interp(np.arange(count) * factor, np.arange(len(samples)), samples).astype(np.float32)
    if how.gain:
        samples = np.clip(samples * np.float32(10 ** (how.gain * (2 * draws[2] - 1) / 20)), -1, 1)
    room = min(window - len(samples), int(how.shift * SAMPLE_RATE))
    start = int(draws[3] * (room + 1))
    end = start + len(samples)
    whole = np.zeros(window, np.float32)
    whole[start:end] = samples
    if draws[4] < how.noise:
        noise = 2 * _uniform(source, window) - 1
        spectrum = np.fft.rfft(noise)
        spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** (-LOUDEST_TILT * draws[5])
        noise = np.fft.irfft(spectrum, window)
        snr = how.snr + (CLEANEST_DB - how.snr) * draws[6]
        power, loudness = float(np.square(samples).mean()), float(np.square(noise).mean())
        whole += (noise * np.sqrt(power / max(loudness, 1e-20) * 10 ** (-snr / 10))).astype(np.float32)
    return whole, start, end


def hide(
    mel_MF: NDArray[np.float32], start: int, end: int, draws: NDArray[np.float64], how: SpeechAugmentSettings
) -> None:
    """Hide bands and stretches of a spectrogram in place, by its mean (SpecAugment, Park 2019, arXiv 1904.08779).
    start, end: the frames that hold speech."""
    mean, (mels, _) = mel_MF.mean(), mel_MF.shape
    for number in range(MASKS):
        wide, at, long, when = draws[8 + 4 * number : 12 + 4 * number]
        width = int(wide * (how.hide_mels * mels + 1)) if how.hide_mels else 0
        low = int(at * (mels - width + 1))
        mel_MF[low : low + width] = mean
        length = int(long * (how.hide_frames * (end - start) + 1)) if how.hide_frames else 0
        first = start + int(when * (end - start - length + 1))
        mel_MF[:, first : first + length] = mean


def _uniform(source: np.random.Philox, count: int) -> NDArray[np.float64]:
    # The raw stream, which numpy promises to keep: see craton.data.plan.permutation.
    raw = source.random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
