"""Feed-forward layers and mixtures of experts, against the formulas written out token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.trunk import ExpertsConfig, FeedForwardConfig
from craton.trunk.feedforward import Experts, FeedForward

WIDTH = 10
FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def tokens(count, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("gated", [False, True])
def test_dense(activation, gated):
    torch.manual_seed(0)
    layer = FeedForward(FeedForwardConfig(hidden=12, activation=activation, gated=gated, bias=True), WIDTH)
    x = tokens(5)
    up = x @ layer.up.weight.T + layer.up.bias
    inner = FORMULAS[activation](x @ layer.gate.weight.T + layer.gate.bias) * up if gated else FORMULAS[activation](up)
    torch.testing.assert_close(layer(x), inner @ layer.down.weight.T + layer.down.bias, rtol=1e-4, atol=1e-5)


def naive(layer, x_TD):
    """One token after another, choosing experts by sorting."""
    config, outs = layer.config, []
    for x_D in x_TD:
        logits = layer.router.weight @ x_D
        scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
        choice = scores + layer.router_bias if config.bias else scores
        allowed = allowed_experts(config, choice.tolist())
        chosen = sorted(allowed, key=lambda e: -choice[e])[: config.per_token]
        total = sum(scores[e] for e in chosen) if config.normalise else 1.0
        out_D = sum(config.scale * scores[e] / total * layer.experts[e](x_D[None])[0] for e in chosen)
        if layer.shared is not None:
            weight = torch.sigmoid(layer.shared_gate.weight[0] @ x_D) if config.shared_gate else 1.0
            out_D = out_D + weight * layer.shared(x_D[None])[0]
        outs.append(out_D)
    return torch.stack(outs)


def allowed_experts(config, choice):
    size = config.count // config.groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.groups)]

    def strength(group):
        best = sorted((choice[e] for e in group), reverse=True)
        return sum(best[:2]) if config.bias else best[0]

    best = sorted(groups, key=strength, reverse=True)[: config.groups_per_token]
    return [expert for group in best for expert in group]


def make_experts(**switches):
    torch.manual_seed(0)
    dense = FeedForwardConfig(hidden=6, activation="silu", gated=True)
    layer = Experts(ExpertsConfig(**{"count": 8, "per_token": 3, "expert": dense, **switches}), WIDTH)
    layer.router.weight.data *= 4
    if layer.router_bias is not None:
        layer.router_bias.data.normal_()
    return layer.eval().requires_grad_(False)


@settings(max_examples=40, deadline=None)
@given(
    per_token=st.integers(1, 4),
    score=st.sampled_from(["softmax", "sigmoid"]),
    normalise=st.booleans(),
    bias=st.booleans(),
    groups=st.sampled_from([(1, 1), (4, 2), (2, 1), (4, 4)]),
    shared=st.sampled_from([None, False, True]),
    count=st.integers(1, 9),
)
def test_routing_is_the_naive_loop(per_token, score, normalise, bias, groups, shared, count):
    switches = {} if shared is None else {"shared": FeedForwardConfig(hidden=5, activation="gelu")}
    layer = make_experts(
        per_token=per_token,
        score=score,
        normalise=normalise,
        bias=bias,
        scale=1.7,
        groups=groups[0],
        groups_per_token=groups[1],
        shared_gate=bool(shared),
        **switches,
    )
    x = tokens(count)
    torch.testing.assert_close(layer(x), naive(layer, x), rtol=1e-4, atol=1e-5)


def test_no_expert_outside_of_the_best_groups_even_where_the_bias_is_negative():
    layer = make_experts(per_token=4, score="sigmoid", bias=True, groups=2, groups_per_token=1)
    layer.router_bias.fill_(-3.0)
    layer.router_bias[0] = -0.1
    layer.router_bias[1] = -0.1
    _, chosen = layer.route(tokens(20))
    assert (chosen < 4).all()


def test_the_bias_chooses_but_does_not_weigh():
    layer = make_experts(per_token=1, score="sigmoid", bias=True, normalise=False)
    layer.router_bias.fill_(0.0)
    layer.router_bias[5] = 100.0
    x = tokens(6)
    weights, chosen = layer.route(x)
    assert (chosen == 5).all()
    torch.testing.assert_close(weights[:, 0], torch.sigmoid(F.linear(x, layer.router.weight))[:, 5])


def test_the_router_decides_in_fp32_whatever_the_model_runs_in():
    layer = make_experts().bfloat16()
    x = tokens(50).bfloat16()
    weights, chosen = layer.route(x)
    exact = F.linear(x.double(), layer.router.weight.double()).softmax(-1).topk(3)
    assert weights.dtype == torch.float32
    assert torch.equal(chosen, exact.indices)
    assert layer(x).dtype == torch.bfloat16


def test_gradients_reach_the_router_and_every_chosen_expert():
    layer = make_experts(shared=FeedForwardConfig(hidden=5, activation="gelu"), shared_gate=True).requires_grad_(True)
    x = tokens(40).requires_grad_(True)
    layer(x).square().sum().backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def expert_by_expert(layer, x_TD):
    """One expert after another, each for the tokens that chose it."""
    weights_TA, chosen_TA = layer.route(x_TD)
    out_TD = torch.zeros_like(x_TD)
    for number, expert in enumerate(layer.experts):
        weight_T1 = (weights_TA * (chosen_TA == number)).sum(-1, keepdim=True)
        out_TD = out_TD + expert(x_TD) * weight_T1.to(x_TD.dtype)
    return out_TD if layer.shared is None else out_TD + layer.shared(x_TD)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("shared", [None, FeedForwardConfig(hidden=5, activation="gelu")])
def test_outputs_and_gradients_are_those_of_one_expert_after_another(skewed, shared):
    layer = make_experts(score="sigmoid", bias=True, shared=shared).double().requires_grad_(True)
    layer.router_bias.requires_grad_(False)
    if skewed:
        layer.router_bias[:3] += 100.0  # nothing is left for the other five
    x = tokens(40).double().requires_grad_(True)
    upstream = tokens(40, seed=1).double()
    results = []
    for run in (layer, lambda x: expert_by_expert(layer, x)):
        layer.zero_grad()
        x.grad = None
        out = run(x)
        out.backward(upstream)
        trained = [(name, p.grad.clone()) for name, p in layer.named_parameters() if p.requires_grad]
        results.append([("out", out.detach()), ("x", x.grad), *trained])
    for (name, ours), (_, theirs) in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_an_expert_without_tokens_has_a_gradient_of_zeros_and_does_not_run_where_none_are_taken():
    layer = make_experts(per_token=1, score="sigmoid", bias=True).requires_grad_(True)
    layer.router_bias.requires_grad_(False).fill_(0.0)[5] = 100.0
    calls = []
    for number, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda *_, number=number: calls.append(number))
    layer(tokens(6)).sum().backward()
    assert calls == list(range(8))
    assert all(p.grad is not None and p.grad.any() == (n == 5) for n in range(8) for p in layer.experts[n].parameters())
    calls.clear()
    with torch.inference_mode():
        layer(tokens(6))
    assert calls == [5]


def test_in_training_the_load_is_counted_until_it_is_taken():
    layer = make_experts()
    x = tokens(30)
    expected = torch.bincount(layer.route(x)[1].flatten(), minlength=8)
    layer(x)
    assert layer.load_E is None
    layer.train()
    layer(x)
    layer(x)
    assert torch.equal(layer.load_E, 2 * expected)
    assert not any("load" in name for name in layer.state_dict())


def test_any_linear_shaped_module_may_stand_in_an_expert():
    layer = make_experts()
    x = tokens(30)
    expected = layer(x)

    class Slow(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.columns = linear.weight.T.tolist()

        def forward(self, x_TD):
            return x_TD @ torch.tensor(self.columns)

    layer.experts[3].down = Slow(layer.experts[3].down)
    torch.testing.assert_close(layer(x), expected)
