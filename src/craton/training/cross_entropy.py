"""Cross-entropy over a large vocabulary without ever holding all logits: only trained positions, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from craton.data.batch import Batch
from craton.data.example import UNTRAINED
from craton.models import CausalLM
from craton.training.objective import LossParts
from craton.trunk import Linear

# Logits of one chunk: large enough for full speed of the products, small beside weights and activations.
CHUNK_BYTES = 128 * 2**20
# On a CPU, softmax runs on blocks of so many bytes, which stay in its caches.
CACHE_BYTES = 4 * 2**20


def chunk_rows(vocab: int, dtype: torch.dtype) -> int:
    """How many positions go through the head at once."""
    return max(16, CHUNK_BYTES // (dtype.itemsize * vocab))


def chunked_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Summed cross-entropy in nats, an fp32 scalar. hidden[N, D]; weight[V, D]; targets[N], none of them UNTRAINED.

    The gradients are made in the same pass that makes the logits (as in Liger's kernel, Hsu 2024, arXiv 2410.10989):
    each chunk's logits die with it and nothing is computed twice. A frozen weight costs no gradient of its own.
    Products run in hidden's dtype; softmax, loss and the sum of the weight's gradient in fp32.
    """
    total: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N)  # type: ignore[no-untyped-call]
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        vocab, dtype, device = len(weight_VD), hidden_ND.dtype, hidden_ND.device
        weight = weight_VD.to(dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        rows = min(chunk_rows(vocab, dtype), len(hidden_ND))
        block = min(rows, max(1, CACHE_BYTES // (4 * vocab))) if device.type == "cpu" else rows
        # One buffer for all chunks: fresh memory for each would cost as much time as the products.
        logits_CV = torch.empty(rows, vocab, dtype=dtype, device=device)
        block_KV = torch.empty(block, vocab, device=device)
        for start in range(0, len(hidden_ND), max(1, rows)):
            hidden_CD, targets_C = hidden_ND[start : start + rows], targets_N[start : start + rows]
            chunk_CV = torch.mm(hidden_CD, weight.t(), out=logits_CV[: len(hidden_CD)])
            for part_KV, targets_K in zip(chunk_CV.split(block), targets_C.split(block), strict=True):
                total += _softmax_gradient(part_KV, targets_K, block_KV[: len(part_KV)])
            if grad_hidden_ND is not None:
                torch.mm(chunk_CV, weight, out=grad_hidden_ND[start : start + rows])
            if grad_weight_VD is not None:
                grad_weight_VD += chunk_CV.t() @ hidden_CD
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (upstream,) = grads
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND * upstream.to(grad_hidden_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(upstream).to(ctx.weight_dtype)
        return grad_hidden_ND, grad_weight_VD, None


def _softmax_gradient(logits_KV: Tensor, targets_K: Tensor, work_KV: Tensor) -> Tensor:
    """Summed cross-entropy of a block in fp32; its logits become softmax minus one-hot, their own gradient."""
    targets_K1 = targets_K[:, None]
    work_KV.copy_(logits_KV)
    target_K1 = work_KV.gather(-1, targets_K1)
    largest_K1 = work_KV.amax(-1, keepdim=True)
    work_KV.sub_(largest_K1).exp_()
    sum_K1 = work_KV.sum(-1, keepdim=True)
    work_KV.div_(sum_K1).scatter_add_(-1, targets_K1, work_KV.new_full((1, 1), -1.0).expand_as(targets_K1))
    logits_KV.copy_(work_KV)
    return (sum_K1.log() + largest_K1 - target_K1).sum()


def token_losses(logits: Callable[[Tensor], Tensor], hidden_ND: Tensor, targets_N: Tensor, vocab: int) -> Tensor:
    """Cross-entropy of each position, fp32 [N], through any head: adapters on it, biases and soft caps included.

    Chunks are computed again going backwards, so that here, too, no more than one chunk's logits exist.
    """

    def losses(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return F.cross_entropy(logits(hidden_CD).float(), targets_C, reduction="none")

    rows = chunk_rows(vocab, torch.float32)
    parts = [
        checkpoint(losses, hidden_CD, targets_C, use_reentrant=False)
        for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=torch.float32)


def token_log_probabilities(model: CausalLM, batch: Batch) -> Tensor:
    """Log-probability of each position's target, fp32 [T]; 0 where nothing is trained. Can be differentiated."""
    hidden_TD = _hidden(model, batch)
    rows_N = (batch.targets_T != UNTRAINED).nonzero()[:, 0]
    losses_N = token_losses(model.logits, hidden_TD[rows_N], batch.targets_T[rows_N], model.config.vocab)
    zeros_T = hidden_TD.new_zeros(len(hidden_TD), dtype=torch.float32)
    return zeros_T.index_put((rows_N,), -losses_N)


class NextToken:
    """The objective of language modelling: cross-entropy of every trained token, in nats. Counts tokens."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        assert isinstance(model, CausalLM)
        hidden_TD = _hidden(model, batch)
        rows_N = (batch.targets_T != UNTRAINED).nonzero()[:, 0]
        targets_N = batch.targets_T[rows_N]
        # Positions without a target never reach the head: it is the largest product of a small model.
        hidden_ND = hidden_TD if len(rows_N) == len(hidden_TD) else hidden_TD[rows_N]
        if has_plain_head(model):
            loss_sum = chunked_cross_entropy(hidden_ND, model.head.weight, targets_N)
        else:
            loss_sum = token_losses(model.logits, hidden_ND, targets_N, model.config.vocab).sum()
        return LossParts(loss_sum, len(rows_N), {})


def has_plain_head(model: CausalLM) -> bool:
    """Whether logits are hidden @ weight.T and nothing else, which the fast path needs."""
    config = model.config
    return type(model.head) is Linear and not config.head_bias and config.logit_softcap is None


def _hidden(model: CausalLM, batch: Batch) -> Tensor:
    return model.hidden(batch.ids_T, batch.positions_T, batch.segments_T, row=batch.row)
