"""The chunked loss against the plain one: values, gradients, masks, heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from craton.data.batch import collate
from craton.data.example import UNTRAINED, Example, next_token_targets
from craton.models import CausalLM, CausalLMConfig
from craton.training import cross_entropy
from craton.training.cross_entropy import NextToken, chunked_cross_entropy, token_log_probabilities
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 16 * 4 * 50)
    monkeypatch.setattr(cross_entropy, "CACHE_BYTES", 5 * 4 * 50)


def tiny(**switches) -> CausalLM:
    torch.manual_seed(0)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=1, head_size=8, rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=32, activation="silu", gated=True),
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=16, layers=(layer,) * 2, final_norm=NormConfig(kind="rms"))
    return CausalLM(CausalLMConfig(**{"vocab": 50, "context": 64, "trunk": trunk, "tied": True} | switches))


def batch(lengths=(9, 30, 1, 12), trained_share=0.6, seed=0):
    rng = np.random.default_rng(seed)
    return collate(
        [Example((next_token_targets(rng.integers(0, 50, n), rng.random(n) < trained_share),)) for n in lengths]
    )


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
def test_loss_and_gradients_are_those_of_the_plain_cross_entropy(rows):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 16, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float32, requires_grad=True)
    targets = torch.randint(0, 50, (rows,))
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (3 * expected).backward()
    grads = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    ours = chunked_cross_entropy(hidden, weight, targets)
    (3 * ours).backward()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(hidden.grad, grads[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, grads[1], rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_or_hidden_state_gets_no_gradient():
    hidden, weight = torch.randn(20, 16), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (20,))
    chunked_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is not None
    hidden.requires_grad_()
    chunked_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None


def test_bfloat16_agrees_with_float32_on_the_same_numbers():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16).bfloat16(), torch.randn(50, 16)
    targets = torch.randint(0, 50, (64,))
    expected = F.cross_entropy(hidden.float() @ weight.bfloat16().float().T, targets, reduction="sum")
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, targets), expected, rtol=3e-3, atol=0)


@pytest.mark.parametrize("switches", [{}, {"tied": False}, {"logit_softcap": 3.0}, {"tied": False, "head_bias": True}])
def test_the_objective_is_the_mean_over_trained_positions_for_every_head(switches):
    model, data = tiny(**switches), batch()
    loss, count, _ = NextToken()(model, data)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(data.ids_T, data.positions_T, data.segments_T)
    expected = F.cross_entropy(logits, data.targets_T, ignore_index=UNTRAINED, reduction="sum")
    expected.backward()
    assert count == int((data.targets_T != UNTRAINED).sum())
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_batch_without_trained_positions_has_loss_0_and_zero_gradients():
    model = tiny()
    loss, count, _ = NextToken()(model, batch(trained_share=0.0))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_log_probabilities_stand_at_their_positions_and_can_be_differentiated():
    model, data = tiny(), batch()
    ours = token_log_probabilities(model, data)
    logits = model(data.ids_T, data.positions_T, data.segments_T)
    trained = data.targets_T != UNTRAINED
    expected = logits.log_softmax(-1).gather(-1, data.targets_T.clamp_min(0)[:, None])[:, 0] * trained
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    assert model.embedding.weight.grad.any()


def test_positions_without_a_target_never_reach_the_head(monkeypatch):
    seen = []
    monkeypatch.setattr(
        cross_entropy, "chunked_cross_entropy", lambda h, w, t: seen.append(len(h)) or chunked_cross_entropy(h, w, t)
    )
    data = batch(trained_share=0.2)
    NextToken()(tiny(), data)
    assert seen == [data.trained]
    assert data.trained < data.tokens / 2
