"""The objective of distillation: how far the student's next-token distribution is from the teacher's.

Of the teacher, the k likeliest tokens of each position and the mass of all others are known. The student is compared on
the same k tokens and one more event, "any other token"; with k the whole vocabulary that is the full divergence. By the
data-processing inequality it is otherwise a lower bound of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from craton.compression.distill_settings import DistillLoss
from craton.data.batch import Batch
from craton.data.example import UNTRAINED
from craton.models import CausalLM
from craton.training.cross_entropy import CACHE_BYTES, chunk_rows, has_plain_head
from craton.training.objective import LossParts
from craton.trunk import Linear

PARTS: Final = ("divergence", "cross_entropy")

SMALLEST: Final = 1e-7
"""No event has less probability: fp32 sums of a vocabulary know no smaller remainder."""

SAMPLED: Final = 1
"""The label of an example that the student wrote: there is no right next token in it, only the teacher's opinion."""


@dataclass(frozen=True)
class TopK:
    """What a teacher thinks at N positions: its K likeliest tokens. ids_NK: int64. log_p_NK: fp32. rest_N: fp32, the
    mass of all other tokens, 0 where K is the vocabulary."""

    ids_NK: Tensor
    log_p_NK: Tensor
    rest_N: Tensor


class Teacher(Protocol):
    """Whoever knows the teacher's opinion."""

    def __call__(self, batch: Batch) -> TopK:
        """Of the batch's trained positions, in their order."""


class HiddenTeacher(Teacher, Protocol):
    """A teacher whose hidden states can be seen as well."""

    layers: int

    def with_hidden(self, batch: Batch, layers: Sequence[int]) -> tuple[TopK, list[Tensor]]:
        """Its opinion, and the outputs of these layers at the trained positions [N, width]."""


def divergence(loss: DistillLoss, log_q_NK: Tensor, teacher: TopK, skew: float = 0.1) -> Tensor:
    """The divergence of each position in nats [N], from the student's log-probabilities of the teacher's tokens.

    forward: KL(p || q) (Hinton 2015, arXiv 1503.02531), which makes the student cover all that the teacher does.
    reverse: KL(q || p) (MiniLLM, arXiv 2306.08543), which makes it keep to what the teacher holds likely.
    skew: KL(p || skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898), whose gradient is bounded where q is small.
    """
    p_NE, log_p_NE = _events(teacher.log_p_NK, teacher.rest_N)
    log_q_NE = torch.cat((log_q_NK, _log_rest(log_q_NK)[:, None]), -1)
    # Where the k tokens are the whole vocabulary, neither has a rest, and 0 log 0 is no part of the sum.
    known_NE = torch.ones_like(p_NE)
    known_NE[:, -1] = teacher.rest_N > 0
    if loss == "forward":
        terms_NE = p_NE * (log_p_NE - log_q_NE)
    elif loss == "reverse":
        terms_NE = log_q_NE.exp() * (log_q_NE - log_p_NE)
    else:
        mixed_NE = skew * p_NE + (1 - skew) * log_q_NE.exp()
        terms_NE = p_NE * (log_p_NE - mixed_NE.clamp_min(SMALLEST).log())
    return (terms_NE * known_NE).sum(-1)


def _events(log_p_NK: Tensor, rest_N: Tensor) -> tuple[Tensor, Tensor]:
    log_NE = torch.cat((log_p_NK, rest_N.clamp_min(SMALLEST).log()[:, None]), -1)
    p_NE = torch.cat((log_p_NK.exp(), rest_N[:, None]), -1)
    return p_NE, log_NE


def _log_rest(log_q_NK: Tensor) -> Tensor:
    """log of the mass beside the k tokens [N]."""
    return torch.log((1 - log_q_NK.exp().sum(-1)).clamp_min(SMALLEST))


def known_loss(
    model: CausalLM, hidden_ND: Tensor, ids_NK: Tensor, losses: Callable[[Tensor, slice], Tensor], temperature: float
) -> Tensor:
    """losses(log q of `ids_NK` at these rows, the rows) summed over all rows: an fp32 scalar that can be
    differentiated. log q: of the softmax of logits / temperature, fp32 [C, K].

    No more than one chunk's logits ever exist. Through a plain head their gradient is made in the same pass: a loss of
    the known log-probabilities with gradient g there has the gradient scatter(g) - sum(g) softmax at the logits.
    """
    if has_plain_head(model):
        total: Tensor = _KnownLoss.apply(hidden_ND, model.head.weight, ids_NK, losses, temperature)  # type: ignore[no-untyped-call]
        return total

    def one(hidden_CD: Tensor, ids_CK: Tensor, start: int) -> Tensor:
        log_q_CV = (model.logits(hidden_CD).float() / temperature).log_softmax(-1)
        return losses(log_q_CV.gather(-1, ids_CK), slice(start, start + len(hidden_CD)))

    rows = chunk_rows(model.config.vocab, torch.float32)
    whole = hidden_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden_ND), rows):
        part = slice(start, start + rows)
        whole = whole + checkpoint(one, hidden_ND[part], ids_NK[part], start, use_reentrant=False)
    return whole


class _KnownLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        ids_NK: Tensor,
        losses: Callable[[Tensor, slice], Tensor],
        temperature: float,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        vocab, dtype, device = len(weight_VD), hidden_ND.dtype, hidden_ND.device
        weight = weight_VD.to(dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        rows = max(1, min(chunk_rows(vocab, dtype), len(hidden_ND)))
        block = min(rows, max(1, CACHE_BYTES // (4 * vocab))) if device.type == "cpu" else rows
        logits_CV = torch.empty(rows, vocab, dtype=dtype, device=device)
        for start in range(0, len(hidden_ND), rows):
            hidden_CD = hidden_ND[start : start + rows]
            chunk_CV = torch.mm(hidden_CD, weight.t(), out=logits_CV[: len(hidden_CD)])
            for first in range(0, len(hidden_CD), block):
                part = slice(start + first, start + min(first + block, len(hidden_CD)))
                total += _known_gradient(chunk_CV[first : first + block], ids_NK[part], losses, part, temperature)
            if grad_hidden_ND is not None:
                torch.mm(chunk_CV, weight, out=grad_hidden_ND[start : start + rows])
            if grad_weight_VD is not None:
                grad_weight_VD += chunk_CV.t() @ hidden_CD
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grads
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND * upstream.to(grad_hidden_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(upstream).to(ctx.weight_dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None


def _known_gradient(
    logits_CV: Tensor,
    ids_CK: Tensor,
    losses: Callable[[Tensor, slice], Tensor],
    part: slice,
    temperature: float,
) -> Tensor:
    """The summed loss of a block; its logits become their own gradient."""
    work_CV = logits_CV.float()
    if temperature != 1:
        work_CV = work_CV / temperature
    lse_C1 = work_CV.logsumexp(-1, keepdim=True)
    with torch.enable_grad():
        log_q_CK = (work_CV.gather(-1, ids_CK) - lse_C1).requires_grad_()
        loss = losses(log_q_CK, part)
        (grad_CK,) = torch.autograd.grad(loss, log_q_CK)
    work_CV = work_CV.sub_(lse_C1) if work_CV is not logits_CV else work_CV - lse_C1
    work_CV.exp_().mul_(-grad_CK.sum(-1, keepdim=True)).scatter_add_(-1, ids_CK, grad_CK)
    logits_CV.copy_(work_CV if temperature == 1 else work_CV / temperature)
    return loss.detach()


class Distillation:
    """alpha times the divergence from the teacher, times temperature squared (so that its gradient keeps its size,
    Hinton 2015), and 1 - alpha times the next token's cross-entropy. Counts tokens.

    hidden: weight of the hidden states' distance besides: the mean over layers of |student - teacher|^2 / |teacher|^2.
    In examples labelled `SAMPLED`, which the student wrote, the divergence alone counts (GKD, arXiv 2306.13649).

    Dropout is off, as the teacher's opinion is of the text as it is.
    """

    dropout: ClassVar[bool] = False

    def __init__(
        self,
        teacher: Teacher,
        *,
        loss: DistillLoss = "forward",
        skew: float = 0.1,
        alpha: float = 0.9,
        temperature: float = 1.0,
        hidden: float = 0.0,
    ) -> None:
        self.teacher, self.loss, self.skew, self.alpha = teacher, loss, skew, alpha
        self.temperature, self.hidden = temperature, hidden

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        student = model.student if isinstance(model, ProjectedStudent) else model
        assert isinstance(student, CausalLM)
        rows_N = (batch.targets_T != UNTRAINED).nonzero()[:, 0]
        theirs: list[Tensor] = []
        if self.hidden:
            pairs = layer_pairs(len(student.trunk.layers), self.teacher.layers)  # type: ignore[attr-defined]
            teacher, theirs = self.teacher.with_hidden(batch, [b for _, b in pairs])  # type: ignore[attr-defined]
        else:
            pairs, teacher = [], self.teacher(batch)
        with captured(student, [a for a, _ in pairs]) as ours:
            hidden_TD = student.hidden(batch.ids_T, batch.positions_T, batch.segments_T, row=batch.row)
        loss_sum, metrics = self._compare(student, hidden_TD[rows_N], batch, rows_N, teacher)
        if self.hidden:
            states = [state[rows_N] for state in ours]
            if isinstance(model, ProjectedStudent):
                states = [project(state) for project, state in zip(model.projections, states, strict=True)]
            distances = [_distance(state, wanted) for state, wanted in zip(states, theirs, strict=True)]
            distance = torch.stack(distances).mean()
            loss_sum = loss_sum + self.hidden * distance
            metrics["hidden"] = distance.detach()
        return LossParts(loss_sum, len(rows_N), metrics)

    def _compare(
        self, student: CausalLM, hidden_ND: Tensor, batch: Batch, rows_N: Tensor, teacher: TopK
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, to be differentiated, and its parts. Where the temperature makes two distributions of the
        student's one, the head is passed twice."""
        targets_N1, right_N = batch.targets_T[rows_N, None], _right(batch)[rows_N]
        scale, sums = self.alpha * self.temperature**2, dict.fromkeys(PARTS, hidden_ND.new_zeros(()).float())

        def diverging(log_q_CK: Tensor, part: slice) -> Tensor:
            known = TopK(teacher.ids_NK[part], teacher.log_p_NK[part], teacher.rest_N[part])
            found = divergence(self.loss, log_q_CK, known, self.skew).sum()
            sums["divergence"] = sums["divergence"] + found.detach()
            return scale * found

        def entropy(log_q_C1: Tensor, part: slice) -> Tensor:
            found = -(log_q_C1[:, 0] * right_N[part]).sum()
            sums["cross_entropy"] = sums["cross_entropy"] + found.detach()
            return (1 - self.alpha) * found

        def both(log_q_CX: Tensor, part: slice) -> Tensor:
            return diverging(log_q_CX[:, :-1], part) + entropy(log_q_CX[:, -1:], part)

        if self.temperature == 1:
            loss_sum = known_loss(student, hidden_ND, torch.cat((teacher.ids_NK, targets_N1), -1), both, 1.0)
        else:
            loss_sum = known_loss(student, hidden_ND, teacher.ids_NK, diverging, self.temperature)
            loss_sum = loss_sum + known_loss(student, hidden_ND, targets_N1, entropy, 1.0)
        return loss_sum, dict(sums)


class ProjectedStudent(nn.Module):
    """A student whose hidden states are narrower or wider than its teacher's, with a learned map for each layer. The
    maps are trained with it and no part of what is saved."""

    def __init__(self, student: CausalLM, width: int) -> None:
        super().__init__()
        self.student = student
        own = student.config.trunk.width
        self.projections = nn.ModuleList(Linear(own, width, bias=False) for _ in student.trunk.layers)


def layer_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Which layer of the teacher each of the student's is compared with: the last with the last, the others evenly."""
    return [(i, round((i + 1) * teacher / student) - 1) for i in range(student)]


@contextmanager
def captured(model: CausalLM, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """The outputs [T, width] of these layers, in their order, once the model has run within the block."""
    outputs: list[Tensor] = []
    hooks = [
        model.trunk.layers[i].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for i in layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _distance(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    """|ours - theirs|^2 / |theirs|^2, summed over positions."""
    ours_ND, theirs_ND = ours_ND.float(), theirs_ND.float()
    return ((ours_ND - theirs_ND).square().sum(-1) / theirs_ND.square().sum(-1).clamp_min(1e-12)).sum()


def _right(batch: Batch) -> Tensor:
    """1 for each token [T] of an example from the data, 0 where the student wrote it."""
    ones_T = torch.ones_like(batch.ids_T, dtype=torch.float32)
    if not bool((batch.labels == SAMPLED).any()):
        return ones_T
    counts = torch.tensor(batch.sequences, device=batch.labels.device)
    sampled_S = (batch.labels == SAMPLED).repeat_interleave(counts)
    return ones_T.masked_fill(sampled_S[batch.segments_T], 0.0)
