"""The sampler against explicit formulas, and its independence of everything but its seed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.config import parse
from craton.errors import UnknownName, UsageError
from craton.inference.sampling import Sampler, log_probabilities
from craton.inference.settings import SamplingSettings

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]))


def sampler(prompt: list[int] = [], seed: int = 0, **fields) -> Sampler:  # noqa: B006
    return Sampler(SamplingSettings(**fields), prompt, seed)


def frequencies(draws: int = 3000, **fields) -> torch.Tensor:
    chooser = sampler(**fields)
    counts = torch.zeros(5)
    for _ in range(draws):
        counts[chooser(LOGITS)] += 1
    return counts / draws


def test_temperature_zero_is_the_likeliest():
    assert sampler()(LOGITS) == 0


def test_temperature_one_draws_the_distribution():
    assert torch.allclose(frequencies(temperature=1.0), LOGITS.exp(), atol=0.03)


def test_temperature_sharpens():
    expected = (LOGITS / 0.5).softmax(0)
    assert torch.allclose(frequencies(temperature=0.5), expected, atol=0.03)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 2}, [0.4, 0.3]),
        ({"top_p": 0.75}, [0.4, 0.3, 0.15]),
        ({"top_p": 0.7}, [0.4, 0.3]),
        ({"top_p": 1e-9}, [0.4]),
        ({"min_p": 0.3}, [0.4, 0.3, 0.15]),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, [0.4, 0.3]),
    ],
)
def test_filters_keep_the_right_tokens_in_the_right_proportions(fields, kept):
    expected = torch.zeros(5)
    expected[: len(kept)] = torch.tensor(kept) / sum(kept)
    assert torch.allclose(frequencies(temperature=1.0, **fields), expected, atol=0.03)


@given(seed=st.integers(0, 2**62), p=st.floats(0.05, 0.999), vocab=st.integers(1100, 3000))
@settings(max_examples=25, deadline=None)
def test_top_p_over_few_candidates_equals_top_p_over_all(seed, p, vocab):
    generator = torch.Generator().manual_seed(seed % 2**31)
    # Flat enough that 1024 candidates do not always reach p.
    logits = torch.randn(vocab, generator=generator) * 0.5
    token = sampler(seed=seed, temperature=1.0, top_p=p)(logits)
    probabilities, order = logits.double().softmax(0).sort(descending=True)
    keep = probabilities.cumsum(0) - probabilities < p
    cumulative = torch.where(keep, probabilities, 0.0).cumsum(0)
    point = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * cumulative[-1]
    expected = int(torch.searchsorted(cumulative, point, right=True))
    # Ties and the last bit of a sum may move the border by one rank.
    rank = int((order == token).nonzero())
    assert abs(rank - expected) <= 1
    assert keep[rank]


def test_repetition_penalty_counts_the_prompt():
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert sampler(prompt=[0], repetition_penalty=2.0)(logits) == 1
    negative = torch.tensor([-1.0, -1.5])
    assert sampler(prompt=[0], repetition_penalty=2.0)(negative) == 1


def test_presence_and_frequency_count_only_what_was_generated():
    logits = torch.tensor([1.0, 0.9, 0.0])
    chooser = sampler(prompt=[0, 0, 0], presence_penalty=0.05, frequency_penalty=0.04)
    # 0: 1.0, then 0.91, then 0.87; 1: 0.9, then 0.81.
    assert [chooser(logits) for _ in range(4)] == [0, 0, 1, 0]


def test_logit_bias_can_forbid_and_force():
    assert sampler(logit_bias={0: -100.0})(LOGITS) == 1
    assert sampler(logit_bias={4: 100.0})(LOGITS) == 4


def test_penalties_leave_the_caller_s_logits_alone():
    logits = torch.tensor([2.0, 1.0])
    sampler(prompt=[0], repetition_penalty=2.0, logit_bias={1: 5.0})(logits)
    assert logits.tolist() == [2.0, 1.0]


def test_the_same_seed_gives_the_same_tokens():
    runs = [[chooser(LOGITS) for _ in range(50)] for chooser in (sampler(seed=s, temperature=1.0) for s in (7, 7, 8))]
    assert runs[0] == runs[1] != runs[2]


def test_log_probabilities_are_of_the_unmodified_model():
    logprob, top = log_probabilities(LOGITS, 2, 3)
    assert math.isclose(logprob, math.log(0.15), rel_tol=1e-6)
    assert [token for token, _ in top] == [0, 1, 2]
    assert math.isclose(top[0][1], math.log(0.4), rel_tol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_tokens": 0},
        {"n": 10**9},
        {"seed": -1},
        {"logprobs": 10**6},
        {"stop": ("",)},
        {"stop": ("x",) * 17},
        {"temperature": "hot"},
    ],
)
def test_absurd_settings_are_refused_with_their_name(fields):
    with pytest.raises(UsageError) as caught:
        parse(SamplingSettings, fields, where="a test")
    assert next(iter(fields)) in caught.value.what


def test_an_unknown_setting_is_refused_with_the_nearest_one():
    with pytest.raises(UnknownName) as caught:
        parse(SamplingSettings, {"temprature": 1}, where="a test")
    assert caught.value.remedy is not None
    assert "temperature" in caught.value.remedy
