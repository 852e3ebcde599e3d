"""Preferences: of two answers the better one (DPO, ORPO), or whether a single one is wanted (KTO)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.data.batch import Batch, collate
from craton.data.example import UNTRAINED, Example, TokenSequence
from craton.errors import UsageError
from craton.models import CausalLM
from craton.training.cross_entropy import token_log_probabilities
from craton.training.objective import LossParts

Switch = Callable[[], AbstractContextManager[object]]
"""Within what it gives, the model being trained is its own reference: its adapter is off."""


def sequence_log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """log p of each sequence's trained tokens, summed: fp32 [S]. Can be differentiated."""
    assert isinstance(model, CausalLM)
    log_p_T = token_log_probabilities(model, batch)
    return log_p_T.new_zeros(len(batch.lengths)).index_add(0, batch.segments_T, log_p_T)


class ReferenceTable:
    """What the reference gave to each sequence, kept by the sequence's content, so that no model needs to be kept.

    For training in full, where no adapter can be switched off: `add` every batch before the first step.
    """

    def __init__(self) -> None:
        self._log_p: dict[bytes, float] = {}

    @torch.no_grad()
    def add(self, model: nn.Module, batch: Batch) -> None:
        """Take in a batch's sequences; `model` is the reference."""
        model.eval()
        self._log_p |= zip(_contents(batch), sequence_log_probabilities(model, batch).tolist(), strict=True)

    def __call__(self, batch: Batch) -> Tensor:
        """log p [S] of the batch's sequences. Raises UsageError for one that was not added."""
        try:
            values = [self._log_p[content] for content in _contents(batch)]
        except KeyError:
            raise UsageError(
                "the reference has not seen a sequence of this batch", remedy="add every batch before training"
            ) from None
        return torch.tensor(values, device=batch.ids_T.device)


def _contents(batch: Batch) -> Iterator[bytes]:
    both_2T = torch.stack((batch.ids_T, batch.targets_T)).cpu()
    return (part_2n.numpy().tobytes() for part_2n in both_2T.split(list(batch.lengths), dim=1))


@torch.no_grad()
def _reference_log_probabilities(reference: Switch | ReferenceTable, model: nn.Module, batch: Batch) -> Tensor:
    if isinstance(reference, ReferenceTable):
        return reference(batch)
    with reference():
        return sequence_log_probabilities(model, batch)


class DPO:
    """Direct preference optimisation (Rafailov 2023, arXiv 2305.18290); with label_smoothing, conservative DPO.

    An example is the chosen answer and the rejected one, each behind its prompt, trained where the answer stands. Its
    loss is -log sigmoid(margin), the margin being between the rewards beta log(p / p_reference); ln 2 where policy and
    reference agree. label_smoothing: the share of pairs that may be the wrong way round. Counts pairs.

    Dropout would make the two disagree at random: the model is put in eval mode and stays there, since activations
    that are computed again going backwards must be the same.
    """

    dropout: ClassVar[bool] = False

    def __init__(self, reference: Switch | ReferenceTable, *, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        """Raises UsageError for settings that make no loss."""
        if not (beta > 0 and 0 <= label_smoothing < 0.5):
            raise UsageError(f"DPO needs beta > 0 and label_smoothing in [0, 0.5), not {beta} and {label_smoothing}")
        self.reference, self.beta, self.label_smoothing = reference, beta, label_smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        model.eval()
        reference_S = _reference_log_probabilities(self.reference, model, batch)
        rewards_S = self.beta * (sequence_log_probabilities(model, batch) - reference_S)
        rewards_P2 = _answered_pairs(rewards_S, batch)
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        losses_P = -F.logsigmoid(margins_P) * (1 - self.label_smoothing)
        if self.label_smoothing:
            losses_P = losses_P - F.logsigmoid(-margins_P) * self.label_smoothing
        chosen, rejected = rewards_P2.detach().sum(0)
        metrics = {
            "correct": (margins_P.detach() > 0).sum().float(),
            "margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        }
        return LossParts(losses_P.sum(), len(losses_P), metrics)


class ORPO:
    """Odds-ratio preference optimisation (Hong 2024, arXiv 2403.07691), which needs no reference.

    The chosen answer's cross-entropy and `weight` times -log sigmoid of the log odds ratio between chosen and rejected;
    both of the mean log p over the answer's tokens, as in the paper. Counts pairs.
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        """Raises UsageError for a weight below 0."""
        if not weight >= 0:
            raise UsageError(f"ORPO needs a weight of 0 or more, not {weight}")
        self.weight = weight

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        means_S = sequence_log_probabilities(model, batch) / _trained_tokens(batch).clamp_min(1)
        log_p_P2 = _answered_pairs(means_S, batch)
        log_odds_P2 = log_p_P2 - _log1mexp(log_p_P2)
        ratios_P = log_odds_P2[:, 0] - log_odds_P2[:, 1]
        losses_P = -log_p_P2[:, 0] - self.weight * F.logsigmoid(ratios_P)
        metrics = {
            "correct": (ratios_P.detach() > 0).sum().float(),
            "log_odds_ratio": ratios_P.detach().sum(),
            "cross_entropy": -log_p_P2[:, 0].detach().sum(),
        }
        return LossParts(losses_P.sum(), len(losses_P), metrics)


def _log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)), exact near both ends (Mächler 2012); p is kept below 1, where the odds have no end."""
    log_p = log_p.clamp_max(-torch.finfo(log_p.dtype).eps)
    # Each branch only sees what it is good for: an infinite one would make the gradient NaN even where it is not taken.
    near = log_p > -0.6931
    of_near = torch.log(-torch.expm1(torch.where(near, log_p, -0.5)))
    of_far = torch.log1p(-torch.exp(torch.where(near, -1.0, log_p)))
    return torch.where(near, of_near, of_far)


class KTO:
    """Kahneman-Tversky optimisation (Ethayarajh 2024, arXiv 2402.01306) of single answers that are wanted or not.

    An example is one answer behind its prompt, its label 1 or 0. With reward r = log(p / p_reference), its loss is
    weight (1 - sigmoid(beta (r - z))) where it is wanted and weight (1 - sigmoid(beta (z - r))) where it is not.
    z is the batch's estimate of the policy's divergence from the reference: the mean reward, 0 at least, of each prompt
    with the next example's answer; no gradient flows through it. A lone example has no next one, and z is 0. Counts
    examples.

    z depends on the micro-batch: `whole_steps` asks the loop not to cut steps up. Dropout is off, as for DPO. context:
    the model's, to which a prompt with another's answer is cut.
    """

    dropout: ClassVar[bool] = False
    whole_steps: ClassVar[bool] = True

    def __init__(
        self,
        reference: Switch,
        context: int,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        """Raises UsageError for settings that make no loss."""
        if not (beta > 0 and desirable_weight >= 0 and undesirable_weight >= 0):
            raise UsageError("KTO needs beta > 0 and weights of 0 or more")
        self.reference, self.context, self.beta = reference, context, beta
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        if any(count != 1 for count in batch.sequences):
            raise UsageError(
                "KTO reads one answer a record", remedy='use {"prompt": ..., "completion": ..., "label": true}'
            )
        model.eval()
        divergence = self._divergence(model, batch)
        reference_S = _reference_log_probabilities(self.reference, model, batch)
        counted = ((batch.labels >= 0) & (_trained_tokens(batch) > 0)).nonzero()[:, 0]
        rewards_N = (sequence_log_probabilities(model, batch) - reference_S)[counted]
        wanted_N = batch.labels[counted] == 1
        gains_N = torch.where(wanted_N, rewards_N - divergence, divergence - rewards_N)
        weights_N = torch.where(wanted_N, self.desirable_weight, self.undesirable_weight)
        scaled_N = self.beta * rewards_N.detach()
        metrics = {
            "divergence": divergence * len(counted),
            "desirable": wanted_N.sum().float(),
            "reward_desirable": scaled_N[wanted_N].sum(),
            "reward_undesirable": scaled_N[~wanted_N].sum(),
        }
        # 1 - sigmoid(x) = sigmoid(-x), without cancellation.
        return LossParts((weights_N * torch.sigmoid(-self.beta * gains_N)).sum(), len(counted), metrics)

    @torch.no_grad()
    def _divergence(self, model: nn.Module, batch: Batch) -> Tensor:
        several = int((_trained_tokens(batch) > 0).sum()) > 1
        # A lone answer takes the same passes for nothing: other ranks wait for this one in theirs.
        mismatched = exchange_answers(batch, self.context) if several else batch
        reference_S = _reference_log_probabilities(self.reference, model, mismatched)
        divergence = (sequence_log_probabilities(model, mismatched) - reference_S).mean().clamp_min(0)
        return divergence if several else torch.zeros_like(divergence)


def exchange_answers(batch: Batch, context: int) -> Batch:
    """Each prompt with the answer of the next example (the last one's with the first's), cut to `context` tokens.

    An answer begins with the first trained token; examples that have none are left out.
    """
    prompts, answers = [], []
    lengths = list(batch.lengths)
    for ids, targets in zip(batch.ids_T.cpu().split(lengths), batch.targets_T.cpu().split(lengths), strict=True):
        trained = (targets != UNTRAINED).nonzero()[:, 0]
        if len(trained):
            first = int(trained[0])  # of the positions with a target: the prompt's last token
            prompts.append(ids[: first + 1])
            answers.append((ids[first + 1 :], targets[first:]))
    examples = []
    for prompt, (answer, targets) in zip(prompts, answers[1:] + answers[:1], strict=True):
        ids = torch.cat((prompt, answer))[:context]
        targets = torch.cat((prompt.new_full((len(prompt) - 1,), UNTRAINED), targets))[:context]
        examples.append(Example((TokenSequence(ids.int().numpy(), targets.int().numpy()),)))
    return collate(examples).to(batch.ids_T.device)


def _trained_tokens(batch: Batch) -> Tensor:
    """How many tokens of each sequence are trained [S]."""
    trained_T = (batch.targets_T != UNTRAINED).long()
    return trained_T.new_zeros(len(batch.lengths)).index_add(0, batch.segments_T, trained_T)


def _answered_pairs(values_S: Tensor, batch: Batch) -> Tensor:
    """The sequences' values as (chosen, rejected) [P, 2], of the pairs whose answers both have trained tokens."""
    if any(count != 2 for count in batch.sequences):
        raise UsageError("a preference is a pair", remedy='use records {"prompt": ..., "chosen": ..., "rejected": ...}')
    answered_P = (_trained_tokens(batch).view(-1, 2) > 0).all(1)
    return values_S.view(-1, 2)[answered_P]
