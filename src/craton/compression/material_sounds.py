"""Recordings to calibrate a speech model with, and the text that it writes of them itself."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.whisper_generation import read_generation
from craton.compression.blocks import Flow, Source, Tower
from craton.compression.calibration import HELD_OUT
from craton.compression.material import LOSS, Material
from craton.compression.quantize_settings import CalibrationSettings
from craton.data.records import read_records
from craton.data.speech import SOUNDS, TABLES
from craton.errors import DataError, UsageError
from craton.inference.transcription import Transcriber
from craton.inference.transcription_settings import TranscriptionSettings
from craton.modalities.audio import HOP, log_mel, read_audio
from craton.models import AnyModel, Seq2Seq
from craton.trunk import Context

TOGETHER: Final = 2  # windows of 30 s that go through a block at once


class SoundMaterial(Material):
    """calibration, held_out: the spectrogram of each recording's first window, [N, mels, columns]; texts,
    held_out_texts: what the model writes of them, ids behind the control tokens, filled up with -1."""

    @classmethod
    def read(cls, checkpoint: Checkpoint, settings: CalibrationSettings) -> SoundMaterial:
        """Raises UsageError where no recordings are named, DataError for too few, and what reading them raises."""
        if not settings.calibration:
            raise UsageError(
                "a speech model is judged by recordings",
                where="--calibration",
                remedy="name a folder of recordings like those that it will hear: --calibration FOLDER",
            )
        wanted = settings.samples + HELD_OUT
        files = [path for source in settings.calibration for path in _files(Path(source).expanduser())]
        if len(files) < wanted:
            raise DataError(
                f"there are {len(files)} recordings; {settings.samples} to calibrate with and {HELD_OUT} to judge by "
                "are needed",
                where=", ".join(settings.calibration),
                remedy="name more recordings, or lower --samples",
            )
        chosen = random.Random(settings.seed).sample(files, wanted)
        model, tokenizer = checkpoint.load(torch.float32), checkpoint.tokenizer()
        assert isinstance(model, Seq2Seq)
        config = model.config
        recordings = [read_audio(path)[: 2 * config.frames * HOP] for path in chosen]
        tokens = read_generation(checkpoint.folder).tokens(tokenizer, config.vocab)
        plainly = TranscriptionSettings(temperatures=(0.0,), skip_silence=False)
        texts = []
        for transcript in Transcriber(model, tokenizer, tokens).transcribe(recordings, plainly):
            start = [tokens.start]
            if tokens.languages:
                start += [tokens.languages[transcript.language], tokens.transcribe]
            written = [token for segment in transcript.segments for token in segment.tokens]
            texts.append([*start, tokens.no_times, *written[: config.context - len(start) - 2], tokens.end])
        mel_NMF = torch.stack([_spectrogram(samples, config.mels, 2 * config.frames) for samples in recordings])
        longest = max(map(len, texts))
        ids_NT = torch.tensor([[*ids, *[-1] * (longest - len(ids))] for ids in texts])
        tensors = {
            "calibration": mel_NMF[: settings.samples],
            "held_out": mel_NMF[settings.samples :],
            "texts": ids_NT[: settings.samples],
            "held_out_texts": ids_NT[settings.samples :],
            "start": torch.tensor([len(start) + 1]),  # control tokens before the text, which are no one's guess
        }
        facts = {
            "sounds": list(settings.calibration),
            "sounds_sha256": hashlib.sha256(mel_NMF.numpy().tobytes()).hexdigest(),
            "samples": settings.samples,
            "held_out_sounds": HELD_OUT,
            "tokens": sum(map(len, texts[: settings.samples])),
            "seed": settings.seed,
        }
        return cls(checkpoint, tensors, facts)

    def flow(self, source: Source, tower: Tower, *, held_out: bool, done: Mapping[str, Flow]) -> Flow:
        """Of the sounds; of the texts, which attend to what the encoder has made of the sounds."""
        model = source.model
        assert isinstance(model, Seq2Seq)
        mel_NMF, texts = self._held_out() if held_out else (self.tensors["calibration"], self._ids("texts"))
        if tower.trunk is model.encoder:
            front = copy.deepcopy(model.front).float()
            parts = [front(part_BMF) for part_BMF in mel_NMF.split(TOGETHER)]
            return Flow(tower.trunk, [partial(_encode, model, x_BSD) for x_BSD in parts])
        sounds_NSW = self._sounds(model, done["encoder"].hidden_TD, len(mel_NMF))
        batches = [slice(first, first + TOGETHER) for first in range(0, len(texts), TOGETHER)]
        passes = [partial(_decode, model, texts[batch], Context([])) for batch in batches]
        return Flow(tower.trunk, passes, [sounds_NSW[batch] for batch in batches])

    @torch.inference_mode()
    def judge(self, model: AnyModel) -> dict[str, Tensor]:
        """The loss of what the model as it was wrote."""
        assert isinstance(model, Seq2Seq)
        total, count = 0.0, 0
        for logits_TV, ids_T in self._answers(model):
            first = int(self.tensors["start"])
            total += float(F.cross_entropy(logits_TV[first - 1 : -1], ids_T[first:], reduction="sum"))
            count += len(ids_T) - first
        return {LOSS: torch.tensor([total / count], dtype=torch.float64)}

    @torch.inference_mode()
    def expected(self, model: AnyModel, done: Mapping[str, Flow]) -> list[Tensor]:
        """The logits of the first text."""
        assert isinstance(model, Seq2Seq)
        hidden_TD = done["decoder"].hidden_TD[: len(self._ids("held_out_texts")[0])]
        norm = model.decoder.final_norm
        return [model.logits(hidden_TD if norm is None else norm(hidden_TD))]

    @torch.inference_mode()
    def given(self, model: AnyModel) -> list[Tensor]:
        """See `expected`."""
        assert isinstance(model, Seq2Seq)
        return [next(self._answers(model))[0]]

    def _answers(self, model: Seq2Seq) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits [T, vocab] of each text that is held out, with its ids."""
        front = copy.deepcopy(model.front).float()
        for mel_MF, ids in zip(*self._held_out(), strict=True):
            context = model.decoder.read(_encode(model, front(mel_MF[None])))
            yield model.logits(_decode(model, [ids], context)).float(), torch.tensor(ids)

    def _held_out(self) -> tuple[Tensor, list[list[int]]]:
        return self.tensors["held_out"], self._ids("held_out_texts")

    def _ids(self, name: str) -> list[list[int]]:
        return [[token for token in ids if token >= 0] for ids in self.tensors[name].tolist()]

    def _sounds(self, model: Seq2Seq, hidden_TD: Tensor, count: int) -> Tensor:
        """What the decoder reads: [N, frames, width], from the hidden states behind the encoder's last block."""
        norm = model.encoder.final_norm
        return (hidden_TD if norm is None else norm(hidden_TD)).unflatten(0, (count, -1))


# The model's own passes, in fp32 whatever its weights are in.


def _encode(model: Seq2Seq, x_BSD: Tensor) -> Tensor:
    count, frames = x_BSD.shape[:2]
    return model.encoder(x_BSD.flatten(0, 1), torch.arange(frames).repeat(count), row=frames).view_as(x_BSD)


def _decode(model: Seq2Seq, texts: Sequence[Sequence[int]], context: Context) -> Tensor:
    """Final hidden states [T, width] of texts; number n of them attends to the n-th context."""
    numbers = [number for number, ids in enumerate(texts) for _ in ids]
    x_TD = model.embedding(torch.tensor([token for ids in texts for token in ids])).float()
    positions_T = torch.cat([torch.arange(len(ids)) for ids in texts])
    return model.decoder(x_TD, positions_T, torch.tensor(numbers), context=context.view(numbers))


def _spectrogram(samples: np.ndarray, mels: int, columns: int) -> Tensor:
    """[mels, columns]: silence behind what is shorter, as in transcribing."""
    whole = np.concatenate((samples, np.zeros(columns * HOP, np.float32)))
    return torch.from_numpy(log_mel(whole, mels)[:, :columns].copy())


def _files(source: Path) -> Iterator[Path]:
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if path.suffix.lower() in SOUNDS and path.is_file() and not hidden:
                yield path
    elif not source.is_file():
        raise UsageError("there is no such file or folder", where=str(source), remedy="check the path")
    elif source.suffix.lower() in TABLES:
        for record in read_records(source):
            audio = record.value.get("audio")
            if not isinstance(audio, str):
                raise DataError(
                    "a record of a recording names its file", where=record.origin, remedy='write {"audio": "a.wav"}'
                )
            yield source.parent / audio
    else:
        yield source
