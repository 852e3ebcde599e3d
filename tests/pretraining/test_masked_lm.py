"""Masking: how often, what, and the same again; the objective; and an encoder that learns a small language."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.data.batch import collate
from craton.data.example import UNTRAINED, Example, untrained
from craton.models import EncoderConfig, MaskedLM, MaskedLMConfig
from craton.models.initialisation import initialise
from craton.pretraining.masked_lm import MaskedToken, mask_tokens, masking_generator
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, LearnedPositions, NormConfig, TrunkConfig

CLS, SEP, MASK, VOCAB = 0, 1, 2, 40
SPECIAL = (CLS, SEP, MASK)


def tiny(seed: int = 0) -> MaskedLM:
    norm = NormConfig(kind="layer", bias=True)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=2, head_size=16, mask="full"),
        feedforward=FeedForwardConfig(hidden=64, activation="gelu", bias=True),
        norm=norm,
        attention_norms=("residual",),
        feedforward_norms=("residual",),
    )
    trunk = TrunkConfig(width=32, layers=(layer,) * 2, positions=LearnedPositions(count=32), input_norm=norm)
    encoder = EncoderConfig(vocab=VOCAB, context=32, trunk=trunk)
    model = MaskedLM(MaskedLMConfig(encoder=encoder, activation="gelu", norm=norm))
    initialise(model, seed)
    return model


def masked(example: Example, seed: int = 0, epoch: int = 0, number: int = 0, **switches: float) -> Example:
    return mask_tokens(example, masking_generator(seed, epoch, number), MASK, VOCAB, SPECIAL, **switches)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(0, 2**63),
    st.floats(0.01, 1.0),
)
def test_targets_are_the_hidden_tokens_themselves(texts: list[list[int]], seed: int, probability: float) -> None:
    example = Example(tuple(untrained(text) for text in texts), 3, "train.jsonl:7")
    result = masked(example, seed, probability=probability)
    assert (result.label, result.origin) == (3, "train.jsonl:7")
    for before, after in zip(example.sequences, result.sequences, strict=True):
        chosen = after.targets != UNTRAINED
        ordinary = ~np.isin(before.ids, SPECIAL)
        assert np.array_equal(after.targets[chosen], before.ids[chosen])
        assert np.array_equal(after.ids[~chosen], before.ids[~chosen])
        assert not (chosen & ~ordinary).any()
        wanted = max(1, round(probability * ordinary.sum())) if ordinary.any() else 0
        assert chosen.sum() == wanted
        assert ((after.ids >= 0) & (after.ids < VOCAB)).all()


def test_15_per_cent_of_which_80_are_hidden_10_random_and_10_stay() -> None:
    ids = np.random.default_rng(0).integers(3, VOCAB, 100_000)
    (after,) = masked(Example((untrained(ids),))).sequences
    chosen = after.targets != UNTRAINED
    assert chosen.mean() == pytest.approx(0.15)
    hidden, stayed = after.ids[chosen] == MASK, after.ids[chosen] == ids[chosen]
    others = after.ids[chosen & (after.ids != MASK) & (after.ids != ids)]
    # Random ones are now and then the mask or the token itself, one in 40 each.
    assert hidden.mean() == pytest.approx(0.8 + 0.1 / 40, abs=0.015)
    assert stayed.mean() == pytest.approx(0.1 + 0.1 / 40, abs=0.015)
    assert others.min() == 0
    assert others.max() == VOCAB - 1


def test_masks_follow_seed_epoch_and_example_and_nothing_else() -> None:
    example = Example((untrained(range(3, 40)),))

    def ids(*key: int) -> list[int]:
        sequence: list[int] = masked(example, *key).sequences[0].ids.tolist()
        return sequence

    first = ids(1, 2, 3)
    ids(9, 9, 9)
    assert ids(1, 2, 3) == first
    assert len({tuple(ids(*key)) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2))}) == 5
    assert example.sequences[0].ids.tolist() == list(range(3, 40))


def test_a_text_of_special_tokens_has_nothing_to_predict() -> None:
    result = masked(Example((untrained([CLS, SEP]), untrained([CLS, 7, SEP]))))
    assert [int((s.targets != UNTRAINED).sum()) for s in result.sequences] == [0, 1]


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        masked(Example((untrained(rng.integers(3, VOCAB, rng.integers(1, 20))),)), seed, 0, i) for i in range(count)
    ]


def test_it_is_the_sum_of_minus_log_p_of_what_was_hidden() -> None:
    model, texts = tiny(), examples(5)
    parts = MaskedToken()(model, collate(texts))
    expected, correct, count = 0.0, 0, 0
    for text in texts:
        (sequence,) = text.sequences
        ids = torch.from_numpy(sequence.ids).long()
        log_p = model(ids, torch.arange(len(ids))).double().log_softmax(-1).detach()
        for place in np.flatnonzero(sequence.targets != UNTRAINED):
            expected -= float(log_p[place, sequence.targets[place]])
            correct += int(log_p[place].argmax()) == sequence.targets[place]
            count += 1
    assert parts.loss_sum.item() == pytest.approx(expected, rel=1e-5)
    assert (parts.count, float(parts.metrics["correct"])) == (count, correct)
    assert float(parts.metrics["bits"]) == pytest.approx(expected / math.log(2), rel=1e-5)


def test_the_gradient_of_a_batch_is_the_sum_of_those_of_its_parts() -> None:
    texts, gradients = examples(6), []
    for size in (6, 2, 1):
        model = tiny()
        for start in range(0, 6, size):
            MaskedToken()(model, collate(texts[start : start + size])).loss_sum.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        for ours, theirs in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_batch_without_targets() -> None:
    model = tiny()
    parts = MaskedToken()(model, collate([Example((untrained([3, 4, 5]),))]))
    parts.loss_sum.backward()
    assert (parts.loss_sum.item(), parts.count) == (0.0, 0)
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def language(count: int, seed: int) -> list[Example]:
    """Sentences that count up or down from a random token: each token follows from its neighbours, and alone, all 36
    are as likely."""
    rng = np.random.default_rng(seed)
    sentences = []
    for _ in range(count):
        start, step = rng.integers(36), rng.choice([-1, 1])
        words = 3 + (start + step * np.arange(rng.integers(8, 14))) % 36
        sentences.append(untrained([CLS, *words.tolist(), SEP]))
    return [Example((sentence,)) for sentence in sentences]


def test_a_small_encoder_learns() -> None:
    model, objective = tiny(), MaskedToken()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(300):
        batch = [masked(text, 0, step, i) for i, text in enumerate(language(32, step))]
        parts = objective(model, collate(batch))
        optimizer.zero_grad()
        (parts.loss_sum / parts.count).backward()
        optimizer.step()
    with torch.no_grad():
        unseen = [masked(text, 1, 0, i) for i, text in enumerate(language(100, 10_000))]
        parts = objective(model, collate(unseen))
    assert parts.loss_sum.item() / parts.count < 0.5 * math.log(36)
    assert float(parts.metrics["correct"]) / parts.count > 0.6
