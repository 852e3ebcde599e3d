"""Steps of recordings: what chance changes is a function of (seed, epoch, recording), and tokens are Whisper's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.data.example import UNTRAINED
from craton.data.speech import SpeechSet
from craton.data.speech_batches import DRAWS, SpeechAugmentSettings, SpeechLoader, SpeechWriter, changed_sound, hide
from craton.errors import UsageError
from craton.modalities.audio import SpeechTokens, log_mel

TOKENS = SpeechTokens(
    start=11, end=10, previous=14, no_speech=15, no_times=16, transcribe=13, translate=12, languages={},
    suppressed=(), suppressed_first=(),
)  # fmt: skip
ALL = SpeechAugmentSettings(speed=0.2, gain=10, noise=0.5, snr=5, shift=0.2, hide_mels=0.2, hide_frames=0.2)
NONE = SpeechAugmentSettings()


def some(count=5, longest=9000):
    rng = np.random.default_rng(0)
    sizes = [longest if n == 0 else int(rng.integers(500, longest)) for n in range(count)]
    sounds = tuple(rng.integers(-9000, 9000, size).astype(np.int16) for size in sizes)
    return SpeechSet(sounds, tuple(map(str, range(count))), tuple(map(str, range(count))))


def loader(count=5, **changes):
    told = {"batch": 3, "micro": 2, "mels": 20, "vectors": 50, "seed": 1, "augment": ALL} | changes
    texts = [[n] * (1 + n % 3) for n in range(count)]
    return SpeechLoader(some(count), texts, SpeechWriter(TOKENS), **told)


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("mel_BMF", "ids_T", "targets_T", "labels_N")
    ) and (one.rows, one.label_counts) == (other.rows, other.label_counts)


def test_a_sentence_is_written_as_whisper_writes_it():
    ids, targets = SpeechWriter(TOKENS).sentence([3, 4], 0.5)
    assert ids == [11, 17, 3, 4, 17 + 25]
    assert targets == [17, 3, 4, 17 + 25, 10]
    ids, targets = SpeechWriter(TOKENS).sentence([3, 4], None)
    assert ids == [11, 16, 3, 4]
    assert targets == [UNTRAINED, 3, 4, 10]


def test_a_model_of_several_languages_is_told_which():
    tokens = SpeechTokens(**{**TOKENS.__dict__, "languages": {"en": 20, "fa": 21}})
    ids, targets = SpeechWriter(tokens, "fa").sentence([3], 0.001)
    assert ids == [11, 21, 13, 17, 3, 18]  # a text is never of no length
    assert targets == [UNTRAINED, UNTRAINED, 17, 3, 18, 10]


def test_steps_are_a_function_of_their_number():
    first, again = loader(), loader()
    assert first.steps_per_epoch == 2
    for step in (3, 0, 1, 3):
        assert all(same(a, b) for a, b in zip(first.step(step), again.step(step), strict=True))
    # Each epoch holds every recording once, and none of them as it was before.
    assert sorted(np.concatenate([first.indices(2), first.indices(3)])) == list(range(5))
    one = np.array([2])
    assert not same(first.make(one, 0), first.make(one, 1))
    assert not same(first.make(one, 0), loader(seed=2).make(one, 0))
    # What a recording becomes does not depend on the others in its batch.
    assert torch.equal(
        loader(augment=NONE).make(np.array([2])).mel_BMF[0], loader(augment=None).make(np.array([2, 0])).mel_BMF[1]
    )


def test_batches_know_their_sizes():
    batch = loader(augment=None).make(np.arange(5))
    assert batch.mel_BMF.shape == (5, 20, 100)
    assert batch.rows == tuple(sorted(batch.rows))
    assert len(batch.ids_T) == len(batch.targets_T) == sum(batch.rows) == batch.trained
    assert batch.tokens == sum(batch.lengths) == 250 + sum(batch.rows)
    assert len(batch.labels_N) == sum(batch.label_counts)
    assert same(batch.to("cpu"), batch)


def test_ranks_share_a_step():
    parts = [loader(rank=rank, world=2, micro=1).step(1) for rank in range(2)]  # two recordings are left for two ranks
    assert [len(part) for part in parts] == [1, 1]
    parts = [loader(rank=rank, world=4, micro=1).step(1) for rank in range(4)]
    assert [part[0].trained > 0 for part in parts] == [True, True, False, False]
    assert (parts[3][0].targets_T == UNTRAINED).all()
    assert parts[3][0].label_counts == (0,)


def test_measuring_covers_every_recording_once():
    batches = [batch for rank in range(2) for batch in loader(rank=rank, world=2, augment=None).all(2)]
    assert sum(len(batch.rows) for batch in batches) == 5


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 16_000), seed=st.integers(0, 1000), speed=st.sampled_from([0.0, 0.2, 0.5]),
    gain=st.sampled_from([0.0, 40.0]), noise=st.sampled_from([0.0, 1.0]), shift=st.sampled_from([0.0, 0.3, 30.0]),
)  # fmt: skip
def test_a_changed_recording_stays_in_its_window(size, seed, speed, gain, noise, shift):
    source = np.random.Philox(seed)
    rng = np.random.default_rng(seed)
    how = SpeechAugmentSettings(speed=speed, gain=gain, noise=noise, shift=shift, hide_mels=0.5, hide_frames=0.5)
    samples = rng.uniform(-1, 1, size).astype(np.float32)
    draws = rng.uniform(0, 1, DRAWS)
    window, start, end = changed_sound(samples, 16_000, draws, how, source)
    assert window.shape == (16_000,)
    assert window.dtype == np.float32
    assert np.isfinite(window).all()
    assert 0 <= start <= end <= 16_000
    assert size / (1 + speed) - 1 <= end - start <= size * (1 + speed) + 1
    mel_MF = log_mel(window, 20)
    hide(mel_MF, start // 160, -(-end // 160), draws, how)
    assert np.isfinite(mel_MF).all()


def test_noise_is_as_loud_as_was_drawn():
    samples = np.sin(np.arange(16_000) / 5).astype(np.float32)
    draws = np.zeros(DRAWS)
    how = SpeechAugmentSettings(noise=1.0, snr=5.0)
    window, _, _ = changed_sound(samples, 16_000, draws, how, np.random.Philox(0))
    snr = 10 * np.log10(np.square(samples).mean() / np.square(window - samples).mean())
    assert snr == pytest.approx(5.0, abs=0.01)


def test_nothing_is_changed_where_nothing_is_asked_for():
    samples = np.sin(np.arange(8000) / 5).astype(np.float32)
    window, start, end = changed_sound(samples, 16_000, np.full(DRAWS, 0.99), NONE, np.random.Philox(0))
    assert (start, end) == (0, 8000)
    assert np.array_equal(window[:8000], samples)
    mel_MF = log_mel(window, 20)
    before = mel_MF.copy()
    hide(mel_MF, 0, 50, np.full(DRAWS, 0.99), NONE)
    assert np.array_equal(mel_MF, before)


@pytest.mark.parametrize("changes", [{"batch": 0}, {"micro": 0}, {"vectors": 20}])
def test_wrong_use(changes):
    with pytest.raises(UsageError):
        loader(**changes)


def test_no_recordings():
    with pytest.raises(UsageError, match="nothing to train on"):
        SpeechLoader(SpeechSet((), (), ()), [], SpeechWriter(TOKENS), batch=1, micro=1, mels=20, vectors=50, seed=0)
