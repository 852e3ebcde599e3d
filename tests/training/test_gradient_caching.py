"""Gradient caching gives the gradients of one batch, dropout included, and holds one part at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from craton.training.gradient_caching import encode_in_parts


def gradients(model: nn.Module, x_BD: torch.Tensor, parts: int) -> list[torch.Tensor]:
    model.zero_grad()
    (vectors_BD,) = encode_in_parts(lambda rows: (model(rows),), list(x_BD.split(-(-len(x_BD) // parts))))
    (vectors_BD @ vectors_BD.T).logsumexp(1).sum().backward()  # every row depends on every other
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_gradients_are_those_of_one_batch():
    torch.manual_seed(0)
    model, x_BD = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(13, 8)
    whole = gradients(model, x_BD, 1)
    for parts in (2, 5, 13):
        for a, b in zip(whole, gradients(model, x_BD, parts), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_second_pass_drops_what_the_first_one_dropped():
    model, x_BD = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)), torch.randn(6, 8)
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach() == 0))
    gradients(model, x_BD, 3)
    assert len(seen) == 6
    # Going backwards, the last part comes first.
    for first, second in zip(seen[:3], seen[:2:-1], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("parts", [1, 4])
def test_one_part_is_on_its_way_at_a_time(parts):
    model, x_BD = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 4)), torch.randn(16, 8, requires_grad=True)
    passes = []
    model[0].register_forward_hook(lambda *_: passes.append("forward"))
    model[0].register_full_backward_hook(lambda *_: passes.append("back"))
    gradients(model, x_BD, parts)
    if parts == 1:
        assert passes == ["forward", "back"]
    else:
        assert passes == ["forward"] * parts + ["forward", "back"] * parts


def test_without_gradients_it_is_a_plain_pass():
    model, x_BD = nn.Linear(8, 4), torch.randn(5, 8)
    with torch.no_grad():
        (vectors_BD,) = encode_in_parts(lambda rows: (model(rows),), list(x_BD.split(2)))
    torch.testing.assert_close(vectors_BD, model(x_BD))
