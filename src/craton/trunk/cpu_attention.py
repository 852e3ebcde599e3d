"""Causal attention for training on CPUs: blocks of queries whose scores stay in the cache, gradients recomputed.

In torch's own bfloat16 kernel for CPUs a small model spends a third of its training steps (docs/log.md). This one is
the same algorithm (FlashAttention, Dao 2022, arXiv 2205.14135: softmax by blocks, nothing of size n x n kept) in
products that are large enough for oneDNN to run at full speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Scores of one block of queries, in fp32: about what a core's second-level cache holds.
BLOCK_BYTES = 3 * 2**19


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its loops would be unrolled
def causal_attention(q_BHnK: Tensor, k_BGnK: Tensor, v_BGnV: Tensor, scale: float, mask_B1nn: Tensor | None) -> Tensor:
    """softmax(scale q.k) v, each query seeing the keys up to its own place; differentiable. [B, H, n, V], in q's dtype.

    H query heads share G key heads. mask_B1nn: True where a query sees a key; it must hide all later ones. Scores and
    softmax are fp32, weights are rounded to q's dtype before they meet the values.
    """
    out: Tensor = _CausalAttention.apply(q_BHnK, k_BGnK, v_BGnV, scale, mask_B1nn)  # type: ignore[no-untyped-call]
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHnK: Tensor, k_BGnK: Tensor, v_BGnV: Tensor, scale: float, mask_B1nn: Tensor | None
    ) -> Tensor:
        batch, heads, length, _ = q_BHnK.shape
        # [B, n, H, V] in memory: what follows reads all heads of a token together.
        out_BHnV = q_BHnK.new_empty(batch, length, heads, v_BGnV.shape[-1]).transpose(1, 2)
        norm_BHn1 = q_BHnK.new_empty(batch, heads, length, 1, dtype=_wide(q_BHnK))
        for b, rows, q_GrK, scores_HmS in _blocks(q_BHnK, k_BGnK, scale, mask_B1nn):
            largest_Hm1 = scores_HmS.amax(-1, keepdim=True)
            weights_HmS = scores_HmS.sub_(largest_Hm1).exp_()
            sum_Hm1 = weights_HmS.sum(-1, keepdim=True)
            norm_BHn1[b, :, rows] = sum_Hm1.log() + largest_Hm1
            weights_GrS = weights_HmS.to(q_BHnK.dtype).view(*q_GrK.shape[:2], -1)
            block_HmV = torch.bmm(weights_GrS, v_BGnV[b, :, : rows.stop]).view(heads, -1, v_BGnV.shape[-1])
            out_BHnV[b, :, rows] = block_HmV.div_(sum_Hm1)
        ctx.save_for_backward(q_BHnK, k_BGnK, v_BGnV, out_BHnV, norm_BHn1, mask_B1nn)
        ctx.scale = scale
        return out_BHnV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BHnV,) = grads
        q_BHnK, k_BGnK, v_BGnV, out_BHnV, norm_BHn1, mask_B1nn = ctx.saved_tensors
        dtype, wide = q_BHnK.dtype, _wide(q_BHnK)
        grad_q_BHnK = torch.empty_like(q_BHnK)
        # Blocks add up to a key's gradient, and so do the query heads that share it: in fp32.
        grad_k_BGnK = torch.zeros_like(k_BGnK, dtype=wide)
        grad_v_BGnV = torch.zeros_like(v_BGnV, dtype=wide)
        drop_BHn1 = (grad_BHnV.to(wide) * out_BHnV.to(wide)).sum(-1, keepdim=True)
        for b, rows, q_GrK, scores_HmS in _blocks(q_BHnK, k_BGnK, ctx.scale, mask_B1nn):
            keys, shape = slice(0, rows.stop), (*q_GrK.shape[:2], rows.stop)
            grad_GrV = grad_BHnV[b, :, rows].reshape(*q_GrK.shape[:2], -1)
            weights_HmS = scores_HmS.sub_(norm_BHn1[b, :, rows]).exp_()
            grad_v_BGnV[b, :, keys] += torch.bmm(weights_HmS.to(dtype).view(shape).transpose(1, 2), grad_GrV)
            grad_HmS = torch.bmm(grad_GrV, v_BGnV[b, :, keys].transpose(1, 2)).view_as(weights_HmS).to(wide)
            grad_GrS = grad_HmS.sub_(drop_BHn1[b, :, rows]).mul_(weights_HmS).mul_(ctx.scale).to(dtype).view(shape)
            grad_q_BHnK[b, :, rows] = torch.bmm(grad_GrS, k_BGnK[b, :, keys]).view_as(grad_q_BHnK[b, :, rows])
            grad_k_BGnK[b, :, keys] += torch.bmm(grad_GrS.transpose(1, 2), q_GrK)
        return grad_q_BHnK, grad_k_BGnK.to(dtype), grad_v_BGnV.to(dtype), None, None


def _blocks(
    q_BHnK: Tensor, k_BGnK: Tensor, scale: float, mask_B1nn: Tensor | None
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """For each sequence and block of queries: (sequence, its rows, queries [G, rows of all their heads, K], scores
    [H, m, keys] that may be written to). Keys behind the block are left out, hidden ones have minus infinity."""
    batch, heads, length, size = q_BHnK.shape
    step = max(16, BLOCK_BYTES // (4 * heads * length) // 16 * 16)
    for first in range(0, length, step):
        rows = slice(first, min(length, first + step))
        count = rows.stop - first
        later_mm = torch.ones(count, count, dtype=torch.bool, device=q_BHnK.device).triu(1)
        for b in range(batch):
            q_GrK = q_BHnK[b, :, rows].reshape(k_BGnK.shape[1], -1, size)
            scores_HmS = _products(q_GrK, k_BGnK[b, :, : rows.stop]).view(heads, count, -1).mul_(scale)
            if mask_B1nn is None:
                scores_HmS[:, :, first:].masked_fill_(later_mm, -math.inf)
            else:
                scores_HmS.masked_fill_(~mask_B1nn[b, :, rows, : rows.stop], -math.inf)
            yield b, rows, q_GrK, scores_HmS


def _products(q_GrK: Tensor, k_GSK: Tensor) -> Tensor:
    """q.k in fp32 from products in bfloat16: what the first one's rounding lost is the second one's result."""
    high_GrS = torch.bmm(q_GrK, k_GSK.transpose(1, 2))
    if high_GrS.dtype == _wide(q_GrK):
        return high_GrS
    low_GrS = torch.baddbmm(high_GrS, q_GrK, k_GSK.transpose(1, 2), beta=-1)
    return high_GrS.to(_wide(q_GrK)).add_(low_GrS)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
