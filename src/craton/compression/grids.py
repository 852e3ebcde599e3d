"""Grids of integers for groups of weights: which scale and zero lose least, and the nearest codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from craton.checkpoints.int_weight import IntWeight

# Shares of the full range that are tried: fewer bits gain more from cutting off the largest values.
SHARES: Final = {8: (1.0,), 4: tuple(1 - 0.03 * n for n in range(10)), 3: tuple(1 - 0.04 * n for n in range(12))}
SHARES_OF_2: Final = tuple(1 - 0.05 * n for n in range(14))
CHUNK: Final = 1 << 16  # weights that are searched at once: they stay in the cache
TINY: Final = 2.0**-24  # the smallest fp16 number above 0


@dataclass(frozen=True)
class Form:
    """How a matrix is to be stored. symmetric: no zeros."""

    bits: int
    group: int
    symmetric: bool

    @property
    def low(self) -> int:
        """The least code."""
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << self.bits - 1) - 1


@dataclass(frozen=True)
class Grid:
    """scales_OG: fp32 values that fp16 holds exactly. zeros_OG: whole numbers in the codes' range, 0 if symmetric."""

    form: Form
    scales_OG: Tensor
    zeros_OG: Tensor

    def codes(self, w_OGK: Tensor) -> Tensor:
        """The nearest codes, as fp32 [O, G, K]."""
        scales_OG1 = self.scales_OG[..., None]
        codes_OGK = (w_OGK / torch.where(scales_OG1 == 0, 1.0, scales_OG1)).round_()
        if not self.form.symmetric:
            codes_OGK += self.zeros_OG[..., None]
        return codes_OGK.clamp_(self.form.low, self.form.high)

    def values(self, codes_OGK: Tensor) -> Tensor:
        """What the codes stand for."""
        steps_OGK = codes_OGK if self.form.symmetric else codes_OGK - self.zeros_OG[..., None]
        return steps_OGK * self.scales_OG[..., None]

    def nearest(self, w_OGK: Tensor) -> Tensor:
        """The weights on the grid."""
        return self.values(self.codes(w_OGK))

    def where(self, chosen_OG: Tensor, other: Grid) -> Grid:
        """This grid for the chosen groups, the other one for the rest."""
        scales_OG = torch.where(chosen_OG, self.scales_OG, other.scales_OG)
        return Grid(self.form, scales_OG, torch.where(chosen_OG, self.zeros_OG, other.zeros_OG))


def grouped(weight_OI: Tensor, group: int) -> Tensor:
    """[out, in] as [out, groups, group]; the width is whole groups, or less than one."""
    rows, columns = weight_OI.shape
    return weight_OI.view(rows, -1, min(group, columns))


def find_grid(w_OGK: Tensor, form: Form, importance_GK: Tensor | None = None) -> Grid:
    """The grid of least squared error, each weight's error counted by `importance` (that of its input), among those of
    a part of the full range: symmetric ones with a scale of either sign, so that the most negative code meets the
    largest weight; others from the least weight to the largest, 0 included."""
    rows = max(1, CHUNK // w_OGK[0].numel())
    parts = [_find(part, form, importance_GK) for part in w_OGK.split(rows)]
    return Grid(form, torch.cat([part.scales_OG for part in parts]), torch.cat([part.zeros_OG for part in parts]))


def _find(w_OGK: Tensor, form: Form, importance_GK: Tensor | None) -> Grid:
    best: Grid | None = None
    least_OG = torch.empty(0)
    for grid in candidates(w_OGK, form, SHARES.get(form.bits, SHARES_OF_2)):
        error_OGK = grid.nearest(w_OGK).sub_(w_OGK).square_()
        if importance_GK is not None:
            error_OGK *= importance_GK
        error_OG = error_OGK.sum(-1)
        if best is None:
            best, least_OG = grid, error_OG
            continue
        better = error_OG < least_OG
        least_OG = torch.where(better, error_OG, least_OG)
        best = grid.where(better, best)
    assert best is not None
    return best


def int_weight(codes_OGK: Tensor, grid: Grid) -> IntWeight:
    """Codes on a grid, as they are stored."""
    zeros = None if grid.form.symmetric else grid.zeros_OG.to(torch.int8)
    codes_OI = codes_OGK.flatten(1).to(torch.int8)
    return IntWeight(grid.form.bits, grid.form.group, codes_OI, grid.scales_OG.half(), zeros)


def halves(scales_OG: Tensor) -> Tensor:
    """The nearest scales that fp16 holds, never 0 unless they are."""
    rounded = scales_OG.half().float()
    return torch.where((rounded == 0) & (scales_OG != 0), torch.copysign(torch.tensor(TINY), scales_OG), rounded)


def candidates(w_OGK: Tensor, form: Form, shares: tuple[float, ...]) -> list[Grid]:
    """The grids over these shares of each group's full range; the first one covers it if the first share is 1."""
    if form.symmetric:
        lows, highs = w_OGK.aminmax(dim=-1)
        extreme_OG = torch.where(-lows > highs, lows, highs)
        zeros_OG = torch.zeros_like(extreme_OG)
        return [
            Grid(form, halves(extreme_OG * share / divisor), zeros_OG)
            for share in shares
            for divisor in (form.low, form.high)
        ]
    lows, highs = w_OGK.amin(-1).clamp(max=0), w_OGK.amax(-1).clamp(min=0)
    found = []
    for share in shares:
        scales_OG = halves((highs - lows) * share / (form.high - form.low))
        zeros_OG = form.low - lows * share / torch.where(scales_OG == 0, 1.0, scales_OG)
        found.append(Grid(form, scales_OG, zeros_OG.round().clamp(form.low, form.high)))
    return found
