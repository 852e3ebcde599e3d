"""Half-quadratic quantisation: zeros and scales that lose least in a norm which forgives outliers. No data is needed.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from craton.checkpoints.int_weight import IntWeight
from craton.compression.blocks import Inputs
from craton.compression.grids import Form, Grid, find_grid, grouped, halves, int_weight

NORM = 0.7  # the p of the l_p "norm" that is minimised
STEPS = 20
STIFFNESS, STIFFER = 10.0, 1.05  # beta, and what it grows by in each step


def quantize_hqq(weight_OI: Tensor, form: Form, inputs: Inputs | None = None) -> IntWeight:
    """From the grid of least squares, alternate between the errors that are let go (a shrinkage in closed form) and the
    zero and scale that fit the rest; the best grid of each group is kept. inputs: not read."""
    w_OGK = grouped(weight_OI, form.group)
    best = find_grid(w_OGK, form)
    least_OG = objective(w_OGK - best.nearest(w_OGK))
    # Errors are counted in units of the first scale, so that one stiffness serves every matrix.
    unit_OG1 = torch.where(best.scales_OG == 0, 1.0, best.scales_OG).abs()[..., None]
    grid, beta = best, STIFFNESS
    for _ in range(STEPS):
        codes_OGK = grid.codes(w_OGK)
        error_OGK = (w_OGK - grid.values(codes_OGK)) / unit_OG1
        outliers_OGK = unit_OG1 * _shrink(error_OGK, beta)
        grid = _fitted(w_OGK - outliers_OGK, codes_OGK, grid)
        beta *= STIFFER
        found_OG = objective(w_OGK - grid.nearest(w_OGK))
        better = found_OG < least_OG
        if not better.any():
            break
        least_OG = torch.where(better, found_OG, least_OG)
        best = grid.where(better, best)
    return int_weight(best.codes(w_OGK), best)


def objective(error_OGK: Tensor) -> Tensor:
    """Sum of |error|^p of each group."""
    return error_OGK.abs().pow(NORM).sum(-1)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The generalised soft threshold: the minimiser of |e|^p + beta / 2 (e - error)^2, to first order."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(NORM - 1) * (NORM / beta)).clamp(min=0)


def _fitted(target_OGK: Tensor, codes_OGK: Tensor, grid: Grid) -> Grid:
    """The zero and then the scale that fit given codes to the target by least squares, as they can be stored."""
    form, scales_OG, zeros_OG = grid.form, grid.scales_OG, grid.zeros_OG
    if not form.symmetric:
        scales_OG1 = torch.where(scales_OG == 0, 1.0, scales_OG)[..., None]
        zeros_OG = (codes_OGK - target_OGK / scales_OG1).mean(-1).round().clamp(form.low, form.high)
    steps_OGK = codes_OGK - zeros_OG[..., None]
    weight_OG = steps_OGK.square().sum(-1)
    fitted_OG = (steps_OGK * target_OGK).sum(-1) / torch.where(weight_OG == 0, 1.0, weight_OG)
    return Grid(form, halves(torch.where(weight_OG == 0, scales_OG, fitted_OG)), zeros_OG)
