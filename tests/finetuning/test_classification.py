"""The classification objective: its value, what it counts, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from craton.data.batch import collate
from craton.data.example import Example, untrained
from craton.errors import UsageError
from craton.finetuning.objectives.classification import Classification
from craton.models import CausalLM, CausalLMConfig, Classifier
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig

LABELS = ["even", "odd", "none"]


def tiny(dropout: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=1, head_size=8, rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=24, activation="silu", gated=True),
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=16, layers=(layer,) * 2, final_norm=NormConfig(kind="rms"))
    model = CausalLM(CausalLMConfig(vocab=50, context=48, trunk=trunk, tied=True))
    return Classifier.over(model, LABELS, dropout=dropout)


def texts(count: int, seed: int = 0) -> list[Example]:
    """Texts of unequal lengths whose class is told by their first token, far from the last."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 50, rng.integers(1, 9)) for _ in range(count)]
    return [Example((untrained(text),), 2 if text[0] < 10 else int(text[0]) % 2) for text in ids]


def test_it_is_the_sum_of_minus_log_p() -> None:
    model, examples = tiny().eval(), texts(6)
    parts = Classification()(model, collate(examples))
    expected, correct = 0.0, 0
    for example in examples:
        batch = collate([example])
        p = model(batch.ids_T, batch.positions_T, batch.segments_T, batch.lengths).double().softmax(-1)[0]
        assert example.label is not None
        expected -= float(p[example.label].log().detach())
        correct += int(p.argmax()) == example.label
    assert parts.loss_sum.item() == pytest.approx(expected, rel=1e-5)
    assert parts.loss_sum.dtype == torch.float32
    assert (parts.count, float(parts.metrics["correct"])) == (6, correct)


def test_the_gradient_of_a_batch_is_the_sum_of_those_of_its_parts() -> None:
    examples = texts(7)
    gradients = []
    for size in (7, 3, 1):
        model = tiny().eval()
        for start in range(0, 7, size):
            Classification()(model, collate(examples[start : start + size])).loss_sum.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        for ours, theirs in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_texts_without_a_label_are_not_counted() -> None:
    model, (first, second) = tiny().eval(), texts(2)
    without = Example(second.sequences)
    both, one = (Classification()(model, collate(part)) for part in ([first, without], [first]))
    torch.testing.assert_close(both.loss_sum, one.loss_sum)
    assert both.count == 1
    none = Classification()(model, collate([without]))
    none.loss_sum.backward()
    assert (none.loss_sum.item(), none.count, float(none.metrics["correct"])) == (0.0, 0, 0.0)
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_pairs_of_texts_are_refused() -> None:
    (example,) = texts(1)
    with pytest.raises(UsageError, match="one text"):
        Classification()(tiny(), collate([Example(example.sequences * 2, 1)]))


def test_it_learns() -> None:
    model, objective = tiny(), Classification()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(150):
        parts = objective(model, collate(texts(32, seed=step)))
        optimizer.zero_grad()
        (parts.loss_sum / parts.count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    unseen = objective(model.eval(), collate(texts(200, seed=1000)))
    assert float(unseen.metrics["correct"]) / unseen.count > 0.9
