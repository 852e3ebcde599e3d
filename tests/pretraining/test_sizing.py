"""The one dial: what it picks, that it picks no less for more, and that the published laws are what they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.config.sizes import parse_size
from craton.errors import UsageError
from craton.models import build
from craton.pretraining.architecture import causal_config, encoder_config
from craton.pretraining.sizing import SizeOverrides, batch_law, learning_rate_law, size

dials = st.floats(6.0, 9.48).map(lambda exponent: int(10**exponent))  # 1m to 3b
# As large a vocabulary as a model of the dial would have: up to about a third of its parameters.
vocabularies = st.sampled_from([256, 1024, 4096, 8192, 32_000, 49_152, 128_256])


def affordable(dial, vocab):
    return min(vocab, dial // 200)


def built(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


@settings(max_examples=60, deadline=None)
@given(dial=dials, vocab=vocabularies, encoder=st.booleans())
def test_the_model_has_the_parameters_of_the_dial(dial, vocab, encoder):
    vocab = affordable(dial, vocab)
    plan = size(dial, vocab=vocab, context=512, encoder=encoder)
    assert built((encoder_config if encoder else causal_config)(plan, vocab, 512)) == plan.parameters
    assert abs(plan.parameters / dial - 1) < 0.1
    assert plan.width % 64 == plan.hidden % 64 == 0
    assert plan.heads * plan.head_size == plan.width
    assert plan.heads % plan.kv_heads == 0
    assert plan.kv_heads == plan.heads or not encoder


@settings(max_examples=200, deadline=None)
@given(first=dials, second=dials, vocab=vocabularies)
def test_more_never_means_less(first, second, vocab):
    first, second = sorted((first, second))
    vocab = affordable(first, vocab)
    small, large = (size(dial, vocab=vocab, context=512) for dial in (first, second))
    for name in ("width", "layers", "tokens", "batch_tokens"):
        assert getattr(small, name) <= getattr(large, name), name
    assert small.learning_rate >= large.learning_rate


def test_shapes_of_the_usual_sizes():
    plan = size("135m", vocab=49_152, context=2048)
    assert (plan.width, plan.layers, plan.heads, plan.kv_heads) == (896, 11, 14, 7)
    assert plan.tokens == 2_700_000_000
    plan = size("3b", vocab=128_256, context=4096)
    assert (plan.width, plan.layers) == (3072, 28)  # as Llama 3.2 3B


# FLOPs by their own count (72 layers width^2 + 12 layers width length a token), published tokens a step and rate.
DEEPSEEK_7B = ((72 * 30 * 4096**2 + 12 * 30 * 4096 * 4096) * 2e12, 2304 * 4096, 4.2e-4)
DEEPSEEK_67B = ((72 * 95 * 8192**2 + 12 * 95 * 8192 * 4096) * 2e12, 4608 * 4096, 3.2e-4)


@pytest.mark.parametrize(("compute", "batch", "rate"), [DEEPSEEK_7B, DEEPSEEK_67B], ids=["7B", "67B"])
def test_the_laws_give_what_deepseek_trained_with(compute, batch, rate):
    assert batch_law(compute) == pytest.approx(batch, rel=0.1)
    assert learning_rate_law(compute) == pytest.approx(rate, rel=0.03)


def test_twenty_tokens_for_each_parameter_and_whole_sequences_in_a_batch():
    plan = size("30m", vocab=8192, context=1000)
    assert plan.tokens == 600_000_000
    assert plan.batch_tokens % 1000 == 0
    assert plan.batch_tokens == pytest.approx(batch_law(6 * 30e6 * 600e6), abs=500)


def test_overrides_hold_and_the_rest_follows():
    given_ = SizeOverrides(width=384, layers=3, heads=12, kv_heads=4, tokens=5_000_000, learning_rate=1e-3)
    plan = size("10m", vocab=4096, context=256, overrides=given_)
    assert plan.model_dump(include=set(SizeOverrides.model_fields), exclude={"hidden", "batch_tokens"}) == (
        given_.model_dump(exclude_none=True)
    )
    assert plan.parameters == pytest.approx(10e6, rel=0.1)
    assert plan.batch_tokens < size("10m", vocab=4096, context=256).batch_tokens
    assert sum(line.endswith("as given") for line in plan.decisions) == 6


def test_with_every_size_given_the_dial_gives_way():
    overrides = SizeOverrides(width=256, layers=4, hidden=1000)
    plan = size("30m", vocab=1000, context=256, overrides=overrides)
    assert plan.hidden == 1000
    assert plan.parameters == 1000 * 256 + 4 * (4 * 256**2 + 3 * 256 * 1000 + 2 * 256) + 256


def test_every_choice_is_said_with_its_source():
    text = "\n".join(size("30m", vocab=8192, context=1024).decisions)
    for part in (
        "30M",
        "512",
        "8 layers",
        "8 heads of 64",
        "2 key-value heads",
        "1664",
        "600M tokens",
        "Hoffmann 2022",
    ):
        assert part in text
    assert text.count("Bi 2024") == 2
    assert "beyond" not in text
    assert "beyond" in size("1m", vocab=4096, context=1024).decisions[-1]


def test_a_vocabulary_too_large_for_the_dial_is_refused_with_what_would_fit():
    with pytest.raises(UsageError, match="1M parameters are too few for a vocabulary of 32000") as error:
        size("1m", vocab=32_000, context=512)
    smallest, most = "2.16M", 13_824
    assert smallest in str(error.value)
    assert str(most) in str(error.value)
    assert size("2.2m", vocab=32_000, context=512).parameters == pytest.approx(2.2e6, rel=0.1)
    assert size("1m", vocab=most, context=512).parameters == pytest.approx(1e6, rel=0.1)


@pytest.mark.parametrize(
    "overrides", [{"width": 2048}, {"width": 256, "heads": 3}, {"heads": 4, "kv_heads": 3}, {"layers": 500}]
)
def test_sizes_that_make_no_model_are_refused(overrides):
    with pytest.raises(UsageError, match="no model of 5M parameters") as error:
        size("5m", vocab=4096, context=512, overrides=SizeOverrides(**overrides))
    assert all(f"{key} {value}" in str(error.value) for key, value in overrides.items())


@pytest.mark.parametrize(
    ("text", "value"),
    [("30m", 30e6), ("0.5M", 5e5), (" 1b", 1e9), ("1.7B", 1.7e9), ("250k", 25e4), ("1234567", 1234567), ("۵m", 5e6)],
)
def test_sizes_are_read(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "m", "-5m", "5mb", "0m", "5 m m", "1e6", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)
