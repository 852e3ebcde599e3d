"""Runs of `craton pretrain-speech`: from sound to a model that writes it down, resume, and what transformers makes of
the result."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import craton as library
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.whisper_generation import read_generation
from craton.checkpoints.safetensors import open_weights
from craton.errors import TrainingError
from craton.finetuning.speech.train import CTC_HEAD_NAME, resume
from craton.modalities.audio import log_mel
from craton.store import find
from craton.store.runs import Run

soundfile = pytest.importorskip("soundfile")

NOTES = {"low": 300, "middle": 900, "high": 2700}


def note(name, seconds=0.5, phase=0.0):
    times = np.arange(int(seconds * 16_000)) / 16_000
    return (0.3 * np.sin(2 * np.pi * NOTES[name] * times + phase)).astype(np.float32)


@pytest.fixture
def notes(tmp_path):
    """A table of notes, whose texts say how high they are."""
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    lines = []
    for number in range(24):
        name = list(NOTES)[number % 3]
        soundfile.write(folder / f"{number}.wav", note(name, rng.uniform(0.3, 0.7), rng.uniform(0, 6)), 16_000)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": name}))
    table = folder / "notes.jsonl"
    table.write_text("\n".join(lines))
    return table


def small(**changes: object) -> list[str]:
    """Flags of a run of a few seconds."""
    flags = {
        "window": 1, "mels": 20, "size": "100k", "holdout": 0.25, "batch": 6, "steps": 6, "threads": 1, "context": 16,
        "vocab": 300,
    } | changes  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def equal(one, other):
    whole, again = open_weights(one), open_weights(other)
    assert set(whole.tensors) == set(again.tensors)
    return all(torch.equal(whole.tensor(name), again.tensor(name)) for name in whole.tensors)


@pytest.mark.parametrize("objective", ["seq2seq", "both"])
def test_a_run_ends_in_a_model_that_writes_down_what_it_hears(craton, notes, objective):
    flags = small(objective=objective, steps=120, learning_rate=3e-3, speed=0.05, name="notes")
    status, out, err = craton("pretrain-speech", notes, *flags, "--json")
    assert status == 0, err
    assert json.loads(out)["evaluation"]["targets"] == 6 * 4
    model = library.load("notes", dtype="float32")
    assert model.module.config.frames == 50
    # A steady tone is no speech to who looks for pauses.
    assert [model.transcribe(note(name), skip_silence=False).text for name in NOTES] == list(NOTES)
    assert (find("notes").path / CTC_HEAD_NAME).is_file() == (objective == "both")
    # It goes on, and hears no longer than before.
    status, _, err = craton("pretrain-speech", notes, *small(model="notes", objective=objective, name="more"))
    assert status == 0, err
    assert "notes" in json.dumps(json.loads(craton("show", "more", "--json")[1]))
    status, _, err = craton("pretrain-speech", notes, *small(model="notes", window=2))
    assert status == 2
    assert "hears 1 s at once" in err


def test_ctc_alone_trains_the_encoder_and_is_gone_on_with(craton, notes):
    flags = small(objective="ctc", steps=40, learning_rate=3e-3, name="heard")
    status, out, err = craton("pretrain-speech", notes, *flags, "--json")
    assert status == 0, err
    first = json.loads(out)["evaluation"]["loss"]
    head = open_weights(find("heard").path / CTC_HEAD_NAME)
    assert set(head.tensors) == {"weight", "bias"}
    flags = small(objective="ctc", steps=1, learning_rate=1e-6, model="heard", name="again")
    status, out, err = craton("pretrain-speech", notes, *flags, "--json")
    assert status == 0, err
    # With the head that was saved: a fresh one would know nothing.
    assert json.loads(out)["evaluation"]["loss"] == pytest.approx(first, rel=1e-2)
    assert craton("pretrain-speech", notes, *small(model="heard", objective="both", name="both"))[0] == 0


def test_an_adapter_changes_what_it_is_put_on_and_is_merged_in(craton, notes):
    assert craton("pretrain-speech", notes, *small(name="notes"))[0] == 0
    flags = small(model="notes", method="lora", targets="q,v", learning_rate=1e-2, name="adapted")
    status, _, err = craton("pretrain-speech", notes, *flags)
    assert status == 0, err
    assert "an adapter on" in err
    before, after = open_weights(find("notes").path), open_weights(find("adapted").path)
    assert set(before.tensors) == set(after.tensors)
    changed = {name for name in before.tensors if not torch.equal(before.tensor(name), after.tensor(name))}
    assert changed
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)


@pytest.mark.parametrize("objective", ["seq2seq", "ctc", "both"])
def test_a_run_that_was_stopped_is_the_run_that_was_not(craton, notes, objective):
    # Micro-batches of 2, in two epochs.
    flags = {"evaluate_every": 2, "save_every": 3, "keep_last": 9, "micro_tokens": 100, "objective": objective}
    for name in ("whole", "cut"):
        status, _, err = craton("pretrain-speech", notes, *small(**flags, name=name))
        assert status == 0, err
    run = Run.open("cut")
    shutil.rmtree(run.checkpoints_folder / "step-00000006")
    result = resume(run)
    assert equal(find("whole").path, result.model.path)
    if objective != "seq2seq":
        assert equal(find("whole").path / CTC_HEAD_NAME, result.model.path / CTC_HEAD_NAME)
    assert craton("runs", "resume", run.id)[0] == 2  # it is done


def test_other_texts_are_not_gone_on_with(craton, notes):
    assert craton("pretrain-speech", notes, *small(save_every=3, keep_last=9, name="notes"))[0] == 0
    run = Run.open("notes")
    shutil.rmtree(run.checkpoints_folder / "step-00000006")
    notes.write_text(notes.read_text().replace("high", "tall"))
    with pytest.raises(TrainingError, match="changed"):
        resume(run)


def test_a_dry_run_says_what_is_left_out_and_keeps_nothing(craton, notes):
    folder = notes.parent
    soundfile.write(folder / "long.wav", np.zeros(20_000), 16_000)
    lines = [
        json.dumps({"audio": "long.wav", "text": "long"}),
        json.dumps({"audio": "0.wav", "text": "many words " * 9}),
    ]
    notes.write_text("\n".join([notes.read_text(), *lines]))
    status, _, err = craton("pretrain-speech", notes, *small(holdout=0), "--dry-run")
    assert status == 0, err
    assert "1 recordings longer than 1 s are left out" in err
    assert "1 recordings with a longer text than the model can write are left out" in err
    assert json.loads(craton("runs", "--json")[1])["runs"] == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "no recordings to train on"),
        (("DATA", *small(vocab=100)), "too few"),
        (("DATA", *small(size="big")), "size"),
        (("DATA", *small(method="lora")), "needs a model"),
        (("DATA", *small(dtype="bfloat16")), "float32"),
        (("DATA", *small(name="No Name")), "name"),
        (("DATA", *small(model="nobody")), "nobody"),
        (("DATA", *small(objective="rnn-t")), "objective"),
        (("DATA", *small(window=31)), "window"),
    ],
)
def test_wrong_use(craton, notes, arguments, match):
    status, _, err = craton("pretrain-speech", *(notes if word == "DATA" else word for word in arguments))
    assert status == 2
    assert match in err


@pytest.mark.peer
def test_what_is_published_opens_in_transformers(craton, notes):
    transformers = pytest.importorskip("transformers")
    flags = small(steps=60, learning_rate=3e-3, speed=0.05, name="notes")
    assert craton("pretrain-speech", notes, *flags)[0] == 0
    folder = find("notes").path
    ours = Checkpoint.open(folder).load(torch.float32)
    theirs, info = transformers.WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    sounds = [note(name) for name in NOTES]
    features = extractor(sounds, sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert features.shape == (3, 20, 100)
    own = log_mel(np.pad(sounds[0], (0, 16_000 - len(sounds[0]))), 20)
    np.testing.assert_allclose(features[0].numpy(), own, atol=1e-4)
    ids = torch.tensor([[0, 5, 9]] * 3)
    with torch.inference_mode():
        torch.testing.assert_close(
            ours(features, ids), theirs(features, decoder_input_ids=ids).logits, atol=2e-4, rtol=1e-4
        )
        # Told to write no times: the other form that was trained.
        tokens = read_generation(folder).tokens(Checkpoint.open(folder).tokenizer(), ours.config.vocab)
        start = torch.tensor([[tokens.start, tokens.no_times]] * 3)
        written = theirs.generate(features, decoder_input_ids=start, max_new_tokens=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)] == list(NOTES)


@pytest.mark.slow
def test_a_published_whisper_goes_on_with_a_window_of_its_own(craton, notes, whisper_folder):
    flags = {"window": 1, "holdout": 0.25, "batch": 6, "steps": 2, "threads": 1, "name": "tiny"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    for method in ("full", "lora"):
        status, _, err = craton("pretrain-speech", notes, "--model", whisper_folder, "--method", method, *words)
        assert status == 0, err
    model = library.load("tiny", dtype="float32")
    assert model.module.config.frames == 50
    assert isinstance(model.transcribe(note("low")).text, str)
