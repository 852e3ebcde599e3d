"""Quantising and pruning speech models: the encoder first, then the decoder over what the encoder has become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import craton
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.whisper import WHISPER
from craton.checkpoints.families.whisper_generation import read_generation, write_generation
from craton.checkpoints.save import save_checkpoint
from craton.compression.blocks import open_source
from craton.compression.job import Watch
from craton.compression.material_sounds import SoundMaterial
from craton.compression.prune import prune
from craton.compression.quantize import quantize, resume
from craton.compression.quantize_settings import CalibrationSettings, PruneSettings, QuantizeSettings
from craton.errors import DataError, UsageError
from craton.finetuning.speech.fresh import fresh_model, speech_config, speech_tokenizer
from craton.modalities.audio import SpeechTokens
from craton.store import find
from craton.store.models import list_models
from craton.store.runs import list_runs

soundfile = pytest.importorskip("soundfile")

SAMPLES = 4


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random speech model in fp16 that hears a second, as a published one lies on the disk."""
    tokenizer = speech_tokenizer(["low middle high tones"] * 9, 300, 1)
    vocab = tokenizer.backend.get_vocab_size()
    model = fresh_model(speech_config(100_000, seconds=1, mels=20, vocab=vocab, context=24), 0)
    for parameter in model.parameters():  # as large as in a trained model, so that rounding is seen
        if parameter.dim() == 2 and len(parameter) < vocab:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    folder = tmp_path_factory.mktemp("hearing")
    save_checkpoint(model.half(), WHISPER, folder, tokenizer=tokenizer)
    tokens = SpeechTokens.of(tokenizer, vocab, suppressed=(5, 6), multilingual=False)
    write_generation(folder, model.config, tokens, ((0, 0), (1, 1)))
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones of different lengths, some of them longer than a window."""
    folder, draw = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for number in range(SAMPLES + 16):
        times = np.arange(int(draw.uniform(0.3, 1.4) * 16_000)) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * draw.uniform(200, 3000) * times) + 0.01 * draw.standard_normal(len(times))
        soundfile.write(folder / f"{number}.wav", tone, 16_000)
    return folder


def settings(sounds: Path, **values: Any) -> QuantizeSettings:
    return QuantizeSettings(**{"calibration": (str(sounds),), "samples": SAMPLES, **values})


@pytest.mark.parametrize(("method", "bits"), [("rtn", 8), ("gptq", 4), ("awq", 4)])
def test_what_is_published_is_what_was_made(hearing: Path, sounds: Path, method: str, bits: int) -> None:
    outcome = quantize(str(hearing), settings(sounds, method=method, bits=bits), {}, "small")
    assert outcome.difference < 1e-4
    config = Checkpoint.open(hearing).config
    layers = len(config.encoder.layers), len(config.decoder.layers)  # type: ignore[union-attr]
    assert len(outcome.rows) == 6 * layers[0] + 10 * layers[1]
    assert all((row["tokens"] is not None) == (method != "rtn") for row in outcome.rows)
    measured = outcome.measured.as_dict()
    assert abs(measured["loss_after"] - measured["loss_before"]) < (0.05 if bits == 8 else 1)
    path = find("small").path
    assert Checkpoint.open(path).quantized_kinds() == {"Q8_0" if bits == 8 else "Q4_0"}
    before, after = read_generation(hearing), read_generation(path)
    assert (before.alignment_heads, before.suppressed) == (after.alignment_heads, after.suppressed)
    first = next(sounds.glob("*.wav"))
    ours, theirs = craton.load("small", threads=1), craton.load(hearing, threads=1)
    assert isinstance(ours.transcribe(first, temperatures=(0.0,), skip_silence=False).text, str)
    likeness = float((ours.embed_audio([first]) * theirs.embed_audio([first])).sum())
    assert likeness > (0.999 if bits == 8 else 0.9)


def test_the_hidden_states_are_the_models_own(hearing: Path, sounds: Path) -> None:
    checkpoint = Checkpoint.open(hearing)
    source = open_source(checkpoint)
    chosen = CalibrationSettings(calibration=(str(sounds),), samples=SAMPLES)
    material = SoundMaterial.read(checkpoint, chosen)
    done = {}
    for tower in source.towers:
        done[tower.name] = flow = material.flow(source, tower, held_out=True, done=done)
        for number, block in enumerate(tower.trunk.layers):
            flow.advance(block, number)  # type: ignore[arg-type]
    [ours], [theirs] = material.expected(source.model, done), material.given(source.model)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(hearing: Path, sounds: Path) -> None:
    quantize(str(hearing), settings(sounds), {}, "whole")
    last = len(open_source(Checkpoint.open(hearing)).towers[0].trunk.layers) + 2

    def stop(doing: str) -> None:
        if doing.startswith(f"block {last} of {last}"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(str(hearing), settings(sounds), {}, "stopped", Watch(on_progress=stop))
    resume(next(one for one in list_runs() if one.name == "stopped"))
    files = [(find(name).path / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_zeros_are_saved_in_a_plain_checkpoint(hearing: Path, sounds: Path) -> None:
    chosen = PruneSettings(calibration=(str(sounds),), samples=SAMPLES, sparsity="2:4")
    outcome = prune(str(hearing), chosen, {}, "sparse")
    assert outcome.facts["zeros"] == pytest.approx(0.5, abs=0.01)
    assert Checkpoint.open(find("sparse").path).stored_kind() == "F16"
    assert craton.load("sparse", threads=1).transcriber.tokens.suppressed


def test_refusals_leave_nothing(hearing: Path, sounds: Path) -> None:
    for values, error, words in (
        ({"calibration": ()}, UsageError, "judged by recordings"),
        ({"samples": 64}, DataError, "there are 20 recordings; 64 to calibrate with"),
        ({"tune": 5}, UsageError, "--tune is for models of text"),
    ):
        with pytest.raises(error, match=words):
            quantize(str(hearing), settings(sounds, **values), {}, "small")
    assert list_models() == []
    assert list_runs() == []
