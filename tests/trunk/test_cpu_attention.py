"""Attention by blocks against the definition in fp64: values, gradients, masks, shared heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from craton.trunk import cpu_attention
from craton.trunk.cpu_attention import causal_attention


@pytest.fixture(params=[None, 1], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(cpu_attention, "BLOCK_BYTES", request.param)  # the smallest: 16 queries


def inputs(batch, length, heads, groups, size, value, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, size), (groups, size), (groups, value))
    tensors = [torch.randn(batch, length, h, k, generator=generator, dtype=torch.float64) for h, k in shapes]
    return [t.to(dtype).transpose(1, 2).requires_grad_() for t in tensors]


def document_mask(length, border):
    index = torch.arange(length)
    return ((index[:, None] >= index) & ((index[:, None] < border) == (index < border)))[None, None]


def reference(q, k, v, scale, mask):
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(
        *wide, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out, wide


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "groups", "value"), [(4, 4, 8), (6, 2, 8), (4, 1, 5)])
def test_in_double_precision_it_is_the_definition(heads, groups, value, masked):
    q, k, v = inputs(2, 37, heads, groups, 8, value, torch.float64)
    mask = document_mask(37, 20).expand(2, -1, -1, -1) if masked else None
    expected, wide = reference(q, k, v, 0.3, mask)
    ours = causal_attention(q, k, v, 0.3, mask)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours.backward(grad)
    expected.backward(grad)
    for own, theirs in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(own.grad, theirs.grad)


@pytest.mark.parametrize("scale", [0.125, 0.3])
def test_in_bfloat16_it_is_at_least_about_as_exact_as_torch_s(scale):
    q, k, v = inputs(1, 300, 6, 2, 64, 64, torch.bfloat16)
    expected, wide = reference(q, k, v, scale, None)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    expected.backward(grad.double())

    def errors(out):
        for tensor in (q, k, v):
            tensor.grad = None
        out.backward(grad)
        pairs = [(out, expected), *zip((q.grad, k.grad, v.grad), (w.grad for w in wide), strict=True)]
        return torch.tensor([float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in pairs])

    torch_s = errors(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True))
    ours = errors(causal_attention(q, k, v, scale, None))
    assert (ours < 1.6 * torch_s).all(), (ours, torch_s)


def test_scores_keep_fp32_where_bfloat16_would_round_them():
    # Two keys whose scores, about 300, differ by 0.5: one number in bfloat16.
    q = torch.full((1, 1, 2, 64), 2.0).bfloat16().requires_grad_()
    k = torch.full((1, 1, 2, 64), 2.34375).bfloat16()
    k[0, 0, 1, 0] += 0.25
    v = torch.tensor([[[[0.0], [1.0]]]]).bfloat16()
    second = causal_attention(q, k, v, 1.0, None)[0, 0, 1, 0]
    assert second.item() == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=2e-3)
