"""Rounding by what a whole block gives: whether each weight goes up or down, and each group's scale, are trained until
the quantised block gives what the block gave before.

SignRound (Cheng 2023, arXiv 2309.05516): signed gradient descent through the rounding. It begins where another method
has ended. Here no token counts for more than the typical one: a few tokens with massive activations would otherwise be
all that is learned (docs/log.md).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.checkpoints.int_weight import IntWeight
from craton.compression.blocks import Stream
from craton.compression.grids import grouped, halves
from craton.trunk.block import Block
from craton.trunk.layout import Layout
from craton.trunk.trunk import sequence_layout

WINDOWS = 2  # of a step
LARGEST_TURN = 0.5  # of a code: what is rounded moves by half a step at most
SCALES = (0.5, 1.2)  # how far a scale may go, as shares of what it was


class TunedLinear(nn.Module):
    """A linear layer whose roundings and scales have gradients. x[T, in] -> [T, out]."""

    def __init__(self, linear: nn.Linear, start: IntWeight) -> None:
        """start: where the training begins; its codes need not be the nearest ones."""
        super().__init__()
        self.bias, self.start = linear.bias, start
        self.weight_OGK = grouped(linear.weight.detach(), start.group)
        self.scales_OG1 = start.scales_OG.float()[..., None]
        zeros_OG = torch.zeros_like(start.scales_OG) if start.zeros_OG is None else start.zeros_OG
        self.zeros_OG1 = zeros_OG.float()[..., None]
        steps_OGK = grouped(start.codes_OI.float(), start.group) - self.zeros_OG1
        exact_OGK = self.weight_OGK / self._safe(self.scales_OG1)
        # Where the beginning went further than to the nearest code, its code is the middle of what can be reached.
        self.offset_OGK = torch.where(exact_OGK.round() == steps_OGK, 0.0, steps_OGK - exact_OGK)
        self.turn_OGK = nn.Parameter(torch.zeros_like(self.weight_OGK))
        self.share_OG1 = nn.Parameter(torch.ones_like(self.scales_OG1))

    def forward(self, x_TI: Tensor) -> Tensor:
        scales_OG1 = self.scales_OG1 * self.share_OG1
        return F.linear(x_TI, (self._codes(scales_OG1) - self.zeros_OG1).mul(scales_OG1).flatten(1), self.bias)

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """One step against the sign of the gradient, which is then forgotten."""
        for parameter, size, (low, high) in (
            (self.turn_OGK, rate, (-LARGEST_TURN, LARGEST_TURN)),
            (self.share_OG1, rate / 2, SCALES),
        ):
            if parameter.grad is not None:
                parameter.sub_(size * parameter.grad.sign()).clamp_(low, high)
                parameter.grad = None

    @torch.no_grad()
    def result(self) -> IntWeight:
        """What was trained, with scales that fp16 holds."""
        scales_OG1 = halves(self.scales_OG1 * self.share_OG1)
        codes_OI = self._codes(scales_OG1).flatten(1).to(torch.int8)
        start = self.start
        return IntWeight(start.bits, start.group, codes_OI, scales_OG1[..., 0].half(), start.zeros_OG)

    def _codes(self, scales_OG1: Tensor) -> Tensor:
        reach = 1 << self.start.bits - 1
        steps_OGK = self.weight_OGK / self._safe(scales_OG1) + self.offset_OGK + self.turn_OGK
        rounded_OGK = steps_OGK + (steps_OGK.round() - steps_OGK).detach()  # the gradient goes straight through
        return (rounded_OGK + self.zeros_OG1).clamp(-reach, reach - 1)

    @staticmethod
    def _safe(scales_OG1: Tensor) -> Tensor:
        return torch.where(scales_OG1 == 0, 1.0, scales_OG1)


def tune_block(
    block: Block, number: int, start: dict[str, IntWeight], read: Stream, wanted: Stream, steps: int
) -> dict[str, IntWeight]:
    """Better codes and scales for a block's linear layers.

    block: before rounding, in fp32. start: the layers to round, by their names in it. read: what the block reads once
    those before it are quantised. wanted: what it gave before anything was quantised. The same every time.
    """
    tuned = copy.deepcopy(block)
    layers: dict[str, TunedLinear] = {}
    for name, weight in start.items():
        parent, _, leaf = name.rpartition(".")
        linear = tuned.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = TunedLinear(linear, weight)
        setattr(tuned.get_submodule(parent), leaf, layers[name])
    x_NSD, y_NSD = (stream.hidden_TD.view(stream.count, stream.window, -1) for stream in (read, wanted))
    size_NS1 = y_NSD.square().mean(-1, keepdim=True)
    weight_NS1 = (size_NS1.median() / size_NS1.clamp(min=1e-30)).clamp(max=1.0)
    random = torch.Generator().manual_seed(number)
    for step in range(steps):
        chosen = torch.randperm(read.count, generator=random)[:WINDOWS]
        layout = Layout(*sequence_layout([read.window] * len(chosen)), None, torch.float32)
        with torch.enable_grad():
            out_TD = tuned(x_NSD[chosen].flatten(0, 1), layout, number)
            error_NSD = (out_TD.view_as(y_NSD[chosen]) - y_NSD[chosen]).square() * weight_NS1[chosen]
            error_NSD.mean().backward()
        for layer in layers.values():
            layer.descend((1 - step / steps) / steps)
    return {name: layer.result() for name, layer in layers.items()}
