"""What the loop asks of an objective: a sum, and over how many things it is a sum."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from craton.data.batch import Batch


class LossParts(NamedTuple):
    """loss_sum: fp32 scalar to differentiate, summed over `count` targets (tokens, pairs, examples). metrics: further
    sums over the same targets, detached fp32 scalars; always of the same names, as ranks add them up together.

    The loop adds both over the micro-batches and ranks of a step and divides once, so that how a step is cut up
    changes nothing.
    """

    loss_sum: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a loss
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """A training stage: what to minimise on a batch."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        """The loss of a micro-batch as sums. A batch without targets gives count 0 and a loss of 0 that can still be
        differentiated."""
