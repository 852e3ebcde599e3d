"""What the loop asks of an objective: a sum, and over how many things it is a sum."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn


class LossParts(NamedTuple):
    """loss_sum: fp32 scalar to differentiate, summed over `count` targets (tokens, pairs, examples). metrics: further
    sums over the same targets, detached fp32 scalars; always of the same names, as ranks add them up together.

    The loop adds both over the micro-batches and ranks of a step and divides once, so that how a step is cut up
    changes nothing.
    """

    loss_sum: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a loss
    metrics: dict[str, Tensor]


class StepBatch(Protocol):
    """What the loop asks of a micro-batch, whatever is in it (texts: `craton.data.batch.Batch`).

    tokens: that the trunk reads. trained: those, or other things, that have a target. lengths: tokens of each sequence.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def trained(self) -> int: ...

    @property
    def lengths(self) -> tuple[int, ...]: ...

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""


@runtime_checkable
class Settling(Protocol):
    """An objective that moves something once a step's update is made, and not while the step may be given up."""

    def settle(self, model: nn.Module) -> None:
        """The update has been made."""


class Objective(Protocol):
    """A training stage: what to minimise on a batch, of the kind that the run's data makes."""

    def __call__(self, model: nn.Module, batch: Any) -> LossParts:
        """The loss of a micro-batch as sums. A batch without targets gives count 0 and a loss of 0 that can still be
        differentiated."""
