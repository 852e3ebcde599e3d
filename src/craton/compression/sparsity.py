"""Pruning of single weights: by size, by size and input (Wanda), or with the rest made up for (SparseGPT).

A pattern is a share of the layer ("0.5"), or N zeros at least in every M neighbours of a row ("2:4", "4:8").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from craton.compression.blocks import Inputs
from craton.compression.gptq import COLUMNS, compensate
from craton.compression.hessian import inverse_factor
from craton.errors import UsageError

GROUPS = (2, 4, 8, 16, 32)  # of neighbours: they divide a block of columns


@dataclass(frozen=True)
class Pattern:
    """share: of the weights that become 0. of: in every `of` neighbours of a row exactly; 0: anywhere."""

    share: float
    of: int = 0

    @property
    def zeros(self) -> int:
        """In each group of `of` neighbours."""
        return round(self.share * self.of)


def parse_pattern(text: str) -> Pattern:
    """ "0.5", or "2:4". Raises UsageError."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        kept, of = int(match[1]), int(match[2])
        if 0 < kept < of and of in GROUPS:
            return Pattern((of - kept) / of, of)
    else:
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if 0 < share < 1:
            return Pattern(share)
    raise UsageError(
        f"{text!r} is no sparsity",
        where="--sparsity",
        remedy="give the share of weights to remove (0.5), or how many to keep of how many neighbours (2:4, 4:8)",
    )


def prune_magnitude(weight_OI: Tensor, pattern: Pattern, inputs: Inputs | None = None) -> Tensor:
    """The smallest weights of the layer become 0 (Han 2015, arXiv 1506.02626). inputs: not read."""
    size_OI = weight_OI.abs()
    if pattern.of:
        return weight_OI.masked_fill(_least_of(size_OI, pattern), 0)
    return weight_OI.masked_fill(_least(size_OI.flatten()[None], pattern.share).view_as(weight_OI), 0)


def prune_wanda(weight_OI: Tensor, pattern: Pattern, inputs: Inputs | None) -> Tensor:
    """The weights of each output with the least |weight| times norm of their input become 0 (Sun 2023, arXiv
    2306.11695). Without inputs (an expert that no token reached) the size alone decides."""
    score_OI = weight_OI.abs() * (inputs.square.sqrt() if inputs is not None else 1.0)
    gone_OI = _least_of(score_OI, pattern) if pattern.of else _least(score_OI, pattern.share)
    return weight_OI.masked_fill(gone_OI, 0)


def prune_sparsegpt(weight_OI: Tensor, pattern: Pattern, inputs: Inputs | None) -> Tensor:
    """Column by column, weights whose loss can be made up for best become 0, and the columns behind make up for it
    (Frantar & Alistarh 2023, arXiv 2301.00774). Which ones is decided for blocks of columns (for the M neighbours of a
    pattern) when their turn comes."""
    if inputs is None:
        return prune_magnitude(weight_OI, pattern)
    factor_II = inverse_factor(inputs.gram)
    diagonal_I = factor_II.diagonal()
    rest_IO = weight_OI.T.contiguous()
    gone_IO = torch.zeros_like(rest_IO, dtype=torch.bool)
    span = pattern.of or COLUMNS

    def fix(column: int, w_O: Tensor) -> Tensor:
        if column % span == 0:
            part = slice(column, column + span)
            score_OC = (rest_IO[part] / diagonal_I[part, None]).square().T
            if pattern.of:
                gone_OC = _least_of(score_OC, pattern)
            else:
                gone_OC = _least(score_OC.flatten()[None], pattern.share).view_as(score_OC)
            gone_IO[part] = gone_OC.T
        return w_O.masked_fill(gone_IO[column], 0)

    compensate(rest_IO, factor_II, fix)
    return rest_IO.T.contiguous()


def _least(score_RN: Tensor, share: float) -> Tensor:
    """Which entries of each row are the `share` of it with the least scores; exactly so many, ties in order."""
    count = round(share * score_RN.shape[1])
    order_RN = score_RN.argsort(dim=1, stable=True)
    return torch.zeros_like(score_RN, dtype=torch.bool).scatter_(1, order_RN[:, :count], True)


def _least_of(score_OI: Tensor, pattern: Pattern) -> Tensor:
    groups = score_OI.reshape(-1, pattern.of)
    order = groups.argsort(dim=1, stable=True)
    gone = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, : pattern.zeros], True)
    return gone.view_as(score_OI)
