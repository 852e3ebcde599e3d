"""GPTQ: column by column, what rounding loses is made up for by the columns that are not rounded yet.

Frantar 2022, arXiv 2210.17323. Blocks of columns, so that most of the work is matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from craton.checkpoints.int_weight import IntWeight
from craton.compression.blocks import Inputs
from craton.compression.grids import Form, find_grid, grouped, int_weight
from craton.compression.hessian import importance, inverse_factor
from craton.compression.rtn import quantize_rtn

COLUMNS = 128  # of a block


def quantize_gptq(weight_OI: Tensor, form: Form, inputs: Inputs | None) -> IntWeight:
    """The codes that keep the layer's outputs on what it read. Without inputs (an expert that no token reached) the
    weights are rounded to nearest.

    The grids are those of the weights as they were ("static groups"), so that columns can be taken in the order of
    their inputs' second moments, largest first, while the file keeps plain groups. (Taken as they lie, with grids found
    when a group's turn comes, a small model loses a quarter more: docs/log.md.)
    """
    if inputs is None:
        return quantize_rtn(weight_OI, form)
    gram_II = inputs.gram
    w_OGK = grouped(weight_OI, form.group)
    grid = find_grid(w_OGK, form, grouped(importance(gram_II)[None], form.group)[0])
    order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    group_I = order_I // w_OGK.shape[2]
    scales_IO, zeros_IO = grid.scales_OG.T[group_I].contiguous(), grid.zeros_OG.T[group_I].contiguous()
    codes_IO = torch.empty_like(scales_IO)
    factor_II = inverse_factor(gram_II[order_I][:, order_I])
    rest_IO = weight_OI.T[order_I].contiguous()
    safe_IO = torch.where(scales_IO == 0, 1.0, scales_IO)

    def code(column: int, w_O: Tensor) -> Tensor:
        codes_O = ((w_O / safe_IO[column]).round_() + zeros_IO[column]).clamp_(form.low, form.high)
        codes_IO[column] = codes_O
        return (codes_O - zeros_IO[column]) * scales_IO[column]

    compensate(rest_IO, factor_II, code)
    codes_OI = torch.empty_like(codes_IO).index_copy_(0, order_I, codes_IO).T
    return int_weight(codes_OI.reshape(w_OGK.shape), grid)


def compensate(rest_IO: Tensor, factor_II: Tensor, fix: Callable[[int, Tensor], Tensor]) -> None:
    """Fix the columns of a matrix one after another, each by `fix(column, values)`, which gives what it becomes; the
    columns behind it are changed so that the layer's output changes least. rest_IO: transposed, and worked on."""
    columns = len(rest_IO)
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        errors_CO = torch.empty_like(rest_IO[start:end])
        for column in range(start, end):
            w_O = rest_IO[column]
            fixed_O = fix(column, w_O)
            error_O = (w_O - fixed_O) / factor_II[column, column]
            errors_CO[column - start] = error_O
            rest_IO[column:end].addr_(factor_II[column, column:end], error_O, alpha=-1)
            rest_IO[column] = fixed_O
        rest_IO[end:].addmm_(factor_II[start:end, end:].T, errors_CO, alpha=-1)
