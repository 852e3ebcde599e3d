"""Preference objectives against transparent fp64 ones: values, gradients by finite differences, where they start."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from craton.data.batch import Batch, collate
from craton.data.example import UNTRAINED, Example, TokenSequence, next_token_targets, untrained
from craton.errors import UsageError
from craton.finetuning.adapters import LoraSettings
from craton.finetuning.lora import adapter_parameters, apply_lora, disabled
from craton.finetuning.objectives.preference import (
    DPO,
    KTO,
    ORPO,
    ReferenceTable,
    exchange_answers,
    sequence_log_probabilities,
)
from craton.models import CausalLM, CausalLMConfig
from craton.training.objective import LossParts, Objective
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig

Loss64 = Callable[[nn.Module], Tensor]
CONTEXT = 48


def base_model() -> CausalLM:
    torch.manual_seed(0)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=1, head_size=8, rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=24, activation="silu", gated=True),
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=16, layers=(layer,) * 2, final_norm=NormConfig(kind="rms"))
    model = CausalLM(CausalLMConfig(vocab=50, context=CONTEXT, trunk=trunk, tied=False))
    return model.requires_grad_(False).eval()


def adapted_model(*, dropout: float = 0.0, moved: bool = True) -> CausalLM:
    """The base with an adapter: one that changes nothing yet, or one that has `moved` away from the base."""
    model = base_model()
    apply_lora(model, LoraSettings(rank=4, alpha=8, dropout=dropout))
    if moved:
        for parameter in adapter_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def answer(rng: np.random.Generator, prompt: Sequence[int], length: int) -> TokenSequence:
    completion = rng.integers(0, 50, length).tolist()
    return next_token_targets([*prompt, *completion], [False] * len(prompt) + [True] * length)


def pairs(count: int = 4) -> list[Example]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, rng.integers(1, 6)).tolist() for _ in range(count)]
    return [Example((answer(rng, prompt, 3 + i), answer(rng, prompt, 6 - i))) for i, prompt in enumerate(prompts)]


def singles(labels: Sequence[int | None]) -> list[Example]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 50, rng.integers(1, 6)).tolist() for _ in labels]
    return [
        Example((answer(rng, prompt, 2 + i),), label)
        for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True))
    ]


def log_p64(model: nn.Module, sequence: TokenSequence) -> Tensor:
    """log p of the trained tokens, one sequence alone, by the definition."""
    ids = torch.from_numpy(sequence.ids).long()
    log_p = model(ids, torch.arange(len(ids))).log_softmax(-1)
    assert log_p.dtype == torch.float64
    targets = enumerate(sequence.targets.tolist())
    return torch.stack([log_p[place, target] for place, target in targets if target != UNTRAINED])


def dpo64(model: nn.Module, examples: Sequence[Example], beta: float, smoothing: float) -> Tensor:
    base = base_model().double()
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        chosen, rejected = (log_p64(model, s).sum() - log_p64(base, s).sum() for s in example.sequences)
        p = torch.sigmoid(beta * (chosen - rejected))
        total = total - (1 - smoothing) * p.log() - smoothing * (1 - p).log()
    return total


def orpo64(model: nn.Module, examples: Sequence[Example], weight: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        chosen, rejected = (log_p64(model, s).mean() for s in example.sequences)
        odds_chosen, odds_rejected = (p.exp() / (1 - p.exp()) for p in (chosen, rejected))
        total = total - chosen - weight * torch.sigmoid((odds_chosen / odds_rejected).log()).log()
    return total


def exchanged(examples: Sequence[Example]) -> list[TokenSequence]:
    """Each prompt with the next one's answer, made of the parts."""
    parts = []
    for example in examples:
        (sequence,) = example.sequences
        start = int(np.flatnonzero(sequence.targets != UNTRAINED)[0]) + 1
        parts.append((sequence.ids[:start].tolist(), sequence.ids[start:].tolist()))
    answers = [completion for _, completion in parts]
    return [
        next_token_targets([*prompt, *other], [False] * len(prompt) + [True] * len(other))
        for (prompt, _), other in zip(parts, answers[1:] + answers[:1], strict=True)
    ]


def divergence64(model: nn.Module, examples: Sequence[Example]) -> float:
    base = base_model().double()
    rewards = [float(log_p64(model, s).sum() - log_p64(base, s).sum()) for s in exchanged(examples)]
    return max(0.0, sum(rewards) / len(rewards))


def kto64(
    model: nn.Module, examples: Sequence[Example], z: float, beta: float, desirable: float, undesirable: float
) -> Tensor:
    base = base_model().double()
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        reward = log_p64(model, example.sequences[0]).sum() - log_p64(base, example.sequences[0]).sum()
        weight, sign = (desirable, 1) if example.label == 1 else (undesirable, -1)
        total = total + weight - weight * torch.sigmoid(sign * beta * (reward - z))
    return total


def check(objective: Objective, examples: Sequence[Example], expected: Loss64) -> LossParts:
    """The loss is `expected`'s, and its gradient in random directions what `expected` changes by there."""
    model = adapted_model()
    parts = objective(model, collate(examples))
    assert parts.loss_sum.dtype == torch.float32
    parts.loss_sum.backward()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        assert parts.loss_sum.item() == pytest.approx(float(expected(exact)), rel=2e-5)
        ours, theirs = adapter_parameters(model), adapter_parameters(exact)
        for seed in range(4):
            torch.manual_seed(seed)
            directions = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in theirs.items()}
            values = []
            for step in (1e-5, -2e-5):
                for name, direction in directions.items():
                    theirs[name] += step * direction
                values.append(float(expected(exact)))
            for name, direction in directions.items():
                theirs[name] += 1e-5 * direction
            measured = (values[0] - values[1]) / 2e-5
            along = sum(float((ours[name].grad * d).sum()) for name, d in directions.items())  # type: ignore[operator]
            assert along == pytest.approx(measured, rel=1e-3, abs=1e-4)
    return parts


def switch_of(model: nn.Module) -> Callable[[], object]:
    return partial(disabled, model)


class WithOwnSwitch:
    """An objective whose reference is the adapter of whichever model it is called with, switched off."""

    def __init__(self, make: Callable[..., Objective]) -> None:
        self.make = make

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        return self.make(switch_of(model))(model, batch)


# --- DPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_dpo_is_its_definition(beta: float, smoothing: float) -> None:
    make = partial(DPO, beta=beta, label_smoothing=smoothing)
    parts = check(WithOwnSwitch(make), pairs(), lambda model: dpo64(model, pairs(), beta, smoothing))
    assert parts.count == 4


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_dpo_starts_at_ln_2(smoothing: float) -> None:
    model = adapted_model(moved=False, dropout=0.5).train()
    parts = DPO(partial(disabled, model), label_smoothing=smoothing)(model, collate(pairs()))
    assert parts.loss_sum.item() / parts.count == pytest.approx(math.log(2), abs=1e-7)
    assert parts.metrics["margin"] == 0
    if not smoothing:
        assert torch.equal(parts.loss_sum.detach(), -4 * nn.functional.logsigmoid(torch.tensor(0.0)))
    parts.loss_sum.backward()
    assert any(parameter.grad.any() for parameter in adapter_parameters(model).values())  # type: ignore[union-attr]


def test_dpo_keeps_dropout_off_until_the_gradient_is_made() -> None:
    assert DPO.dropout is False
    assert KTO.dropout is False
    gradients = []
    for checkpointing in (False, True):
        model = adapted_model(dropout=0.5).train()
        model.trunk.checkpointing = checkpointing
        torch.manual_seed(1 + checkpointing)
        DPO(partial(disabled, model))(model, collate(pairs())).loss_sum.backward()
        gradients.append([parameter.grad for parameter in adapter_parameters(model).values()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_dpo_metrics() -> None:
    model = adapted_model()
    batch = collate(pairs())
    metrics = DPO(partial(disabled, model), beta=0.3)(model, batch).metrics
    base, exact = base_model().double(), copy.deepcopy(model).double()
    with torch.no_grad():
        rewards = [
            [0.3 * float(log_p64(exact, s).sum() - log_p64(base, s).sum()) for s in example.sequences]
            for example in pairs()
        ]
    chosen, rejected = (sum(column) for column in zip(*rewards, strict=True))
    assert float(metrics["reward_chosen"]) == pytest.approx(chosen, rel=1e-4)
    assert float(metrics["reward_rejected"]) == pytest.approx(rejected, rel=1e-4)
    assert float(metrics["margin"]) == pytest.approx(chosen - rejected, rel=1e-4)
    assert float(metrics["correct"]) == sum(c > r for c, r in rewards)
    assert not any(value.requires_grad for value in metrics.values())


def test_dpo_of_a_table_is_dpo_of_the_reference_itself() -> None:
    model, table = adapted_model(), ReferenceTable()
    for example in pairs():  # in other batches than they are trained in
        table.add(base_model(), collate([example]))
    batch = collate(pairs())
    by_table, by_switch = (DPO(reference)(model, batch) for reference in (table, partial(disabled, model)))
    torch.testing.assert_close(by_table.loss_sum, by_switch.loss_sum)
    with pytest.raises(UsageError, match="has not seen"):
        table(collate([Example((untrained([1, 2]),))]))


# --- ORPO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_orpo_is_its_definition(weight: float) -> None:
    parts = check(ORPO(weight=weight), pairs(), lambda model: orpo64(model, pairs(), weight))
    assert parts.count == 4
    assert float(parts.metrics["cross_entropy"]) > 0


def test_orpo_of_a_certain_answer_is_finite() -> None:
    # Every token has a probability of 1 in fp32, whose odds have no end.
    model = base_model().requires_grad_(True)
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    ids = [1]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor(ids), torch.arange(len(ids)))[-1].argmax()))
    certain = next_token_targets(ids, [True] * 5)
    other = next_token_targets([1, 2, 3], [True] * 3)
    batch = collate([Example((certain, other)), Example((certain, certain))])
    assert sequence_log_probabilities(model, batch)[0] == 0
    parts = ORPO()(model, batch)
    parts.loss_sum.backward()
    assert math.isfinite(parts.loss_sum.item())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


# --- KTO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[1, 0, 1, 0], [0, 0, 1], [1, 1]])
def test_kto_is_its_definition(labels: list[int]) -> None:
    settings = {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    examples = singles(labels)
    with torch.no_grad():
        z = divergence64(adapted_model().double(), examples)
    make = partial(KTO, context=CONTEXT, **settings)  # type: ignore[arg-type]
    parts = check(WithOwnSwitch(make), examples, lambda model: kto64(model, examples, z, 0.2, 1.5, 0.7))
    assert parts.count == len(labels)
    assert float(parts.metrics["divergence"]) / parts.count == pytest.approx(z, abs=1e-4)
    assert float(parts.metrics["desirable"]) == sum(labels)


def test_the_divergence_is_not_always_zero() -> None:
    with torch.no_grad():
        model = adapted_model().double()
        assert max(divergence64(model, singles(labels)) for labels in ([1, 0, 1, 0], [0, 0, 1], [1, 1])) > 0


def test_kto_starts_at_a_half() -> None:
    model = adapted_model(moved=False, dropout=0.5).train()
    parts = KTO(partial(disabled, model), CONTEXT)(model, collate(singles([1, 0, 0])))
    assert parts.loss_sum.item() == 1.5
    assert parts.metrics["divergence"] == 0


def test_a_lone_answer_is_measured_from_zero() -> None:
    model, examples = adapted_model(), singles([1])
    parts = KTO(partial(disabled, model), CONTEXT)(model, collate(examples))
    with torch.no_grad():
        expected = kto64(copy.deepcopy(model).double(), examples, 0.0, 0.1, 1.0, 1.0)
    assert parts.loss_sum.item() == pytest.approx(float(expected), rel=1e-5)


def test_answers_are_exchanged() -> None:
    examples = singles([1, 0, 1])
    batch = exchange_answers(collate(examples), CONTEXT)
    expected = collate([Example((sequence,)) for sequence in exchanged(examples)])
    assert batch.lengths == expected.lengths
    for name in ("ids_T", "positions_T", "segments_T", "targets_T"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))


def test_an_exchanged_answer_is_cut_to_the_context() -> None:
    batch, context = collate(singles([1, 0, 1])), 5
    cut, whole = exchange_answers(batch, context), exchange_answers(batch, 99)
    assert cut.lengths == tuple(min(length, context) for length in whole.lengths)
    assert cut.lengths != whole.lengths
    for short, full in zip(cut.ids_T.split(list(cut.lengths)), whole.ids_T.split(list(whole.lengths)), strict=True):
        assert torch.equal(short, full[:context])


# --- all ----------------------------------------------------------------------------------------------------------


@contextmanager
def no_switch():
    yield


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_packed_pairs_are_the_sum_of_each_alone(name: str) -> None:
    model = adapted_model()
    objective: Objective = DPO(partial(disabled, model)) if name == "dpo" else ORPO()
    together = objective(model, collate(pairs()))
    alone = [objective(model, collate([example])) for example in pairs()]
    torch.testing.assert_close(together.loss_sum, sum(parts.loss_sum for parts in alone))
    assert together.count == sum(parts.count for parts in alone)
    for key, value in together.metrics.items():
        torch.testing.assert_close(value, sum(parts.metrics[key] for parts in alone))


def test_what_has_no_answer_or_no_label_is_not_counted() -> None:
    model = adapted_model()
    first, second, *_ = pairs()
    unanswered = Example((second.sequences[0], untrained(second.sequences[1].ids)))
    for objective in (DPO(no_switch), ORPO()):
        one = objective(model, collate([first]))
        both = objective(model, collate([first, unanswered]))
        torch.testing.assert_close(both.loss_sum, one.loss_sum)
        assert both.count == 1
        none = objective(model, collate([unanswered]))
        none.loss_sum.backward()
        assert (none.loss_sum.item(), none.count) == (0.0, 0)
    kto = KTO(no_switch, CONTEXT)
    none = kto(model, collate(singles([None, None])))
    none.loss_sum.backward()
    assert (none.loss_sum.item(), none.count) == (0.0, 0)


def test_wrong_data_and_settings_are_refused() -> None:
    model = adapted_model()
    for objective in (DPO(no_switch), ORPO()):
        with pytest.raises(UsageError, match="a preference is a pair"):
            objective(model, collate(singles([1, 0])))
    with pytest.raises(UsageError, match="one answer a record"):
        KTO(no_switch, CONTEXT)(model, collate(pairs()))
    with pytest.raises(UsageError, match="beta > 0"):
        DPO(no_switch, beta=0)
    with pytest.raises(UsageError, match="label_smoothing"):
        DPO(no_switch, label_smoothing=0.5)
    with pytest.raises(UsageError, match="weight of 0 or more"):
        ORPO(weight=-1)
    with pytest.raises(UsageError, match="beta > 0"):
        KTO(no_switch, CONTEXT, beta=0)
