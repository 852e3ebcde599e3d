"""The spectrogram against the published feature extractor."""

from __future__ import annotations

import numpy as np
import pytest

from craton.modalities.audio.log_mel import log_mel, mel_filters

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer


def sounds():
    dice = np.random.default_rng(0)
    time = np.arange(480_000) / 16_000
    yield "noise", dice.standard_normal(480_000).astype(np.float32) * 0.1
    yield "a rising tone", np.sin(2 * np.pi * 200 * time * (1 + time / 10)).astype(np.float32)
    quiet = np.zeros(480_000, np.float32)
    quiet[50_000:60_000] = 0.5 * np.sin(2 * np.pi * 440 * time[:10_000])
    yield "a tone in silence", quiet
    yield "silence", np.zeros(480_000, np.float32)


@pytest.mark.parametrize(("name", "samples"), list(sounds()), ids=[name for name, _ in sounds()])
@pytest.mark.parametrize("mels", [80, 128])
def test_as_published(name, samples, mels):
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels)
    # In numpy: its other way, through torch's fp32 transform, is off by 2e-5 on real speech.
    expected = theirs._np_extract_fbank_features(samples[None], "cpu")[0]
    found = log_mel(samples, mels)
    assert found.shape == expected.shape == (mels, 3000)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - theirs(samples, sampling_rate=16_000)["input_features"][0]).max() < 1e-4


@pytest.mark.parametrize("mels", [80, 128])
def test_the_published_filter_bank(mels):
    expected = transformers.WhisperFeatureExtractor(feature_size=mels).mel_filters
    assert np.abs(mel_filters(mels) - expected).max() < 1e-8


def test_a_long_recording_is_transformed_in_blocks():
    samples = np.random.default_rng(1).standard_normal(3 * 480_000).astype(np.float32)
    whole = log_mel(samples, 80)
    # The middle of it, where no end is mirrored; both have the same loudest bin or nearly so.
    part = log_mel(samples[480_000 : 480_000 + 480_000], 80)
    assert whole.shape == (80, 9000)
    shift = 480_000 // 160
    assert np.abs(whole[:, shift + 2 : shift + 2998] - part[:, 2:2998])[part[:, 2:2998] > 0].max() < 1e-4
