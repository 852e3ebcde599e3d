"""Integer codes with scales for groups of inputs, as GGML's blocks of 32: the form that the native kernels multiply."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from craton.checkpoints.gguf import GGMLType
from craton.checkpoints.gguf.dequantize import Blocks
from craton.checkpoints.int_weight import IntWeight
from craton.checkpoints.weights import QuantizedTensor, Weight
from craton.errors import UsageError

BLOCK = 32
ROUNDED = 2.0**-11  # the largest relative error of a number that is rounded to fp16
LARGEST = 4000.0  # of a scale whose block has a minimum in fp16


def block_kind(bits: int, symmetric: bool, group: int, columns: int) -> GGMLType | None:
    """The block type that holds such codes; None where there is none: rows or groups that are not whole blocks, and 8
    bits with zeros."""
    if columns % BLOCK or (group < columns and group % BLOCK):
        return None
    if bits <= 4:
        return GGMLType.Q4_0 if symmetric else GGMLType.Q4_1
    return GGMLType.Q8_0 if symmetric else None


def int_blocks(weight: IntWeight, kind: GGMLType) -> Blocks:
    """`weight` as blocks of `kind`, uint8 [rows, bytes of a row]; a scale is repeated for each block of its group.

    Q4_0 and Q8_0 hold symmetric codes exactly. Q4_1 holds a block's minimum, zero times scale, in fp16 as well: it is
    rounded by less than 2^-11 of itself, and so by less than 0.8 % of a scale.
    """
    rows, columns = weight.shape
    group = min(weight.group, columns)
    fits = {
        GGMLType.Q4_0: weight.bits <= 4 and weight.zeros_OG is None,
        GGMLType.Q4_1: weight.bits <= 4,
        GGMLType.Q8_0: weight.zeros_OG is None,
    }
    if not fits.get(kind) or columns % BLOCK or (group < columns and group % BLOCK):
        zeros = "without zeros" if weight.zeros_OG is None else "with zeros"
        raise UsageError(
            f"rows of {columns} {weight.bits}-bit codes in groups of {weight.group} {zeros} are not {kind.name}"
        )
    codes = weight.codes_OI.cpu().numpy().reshape(rows, -1, BLOCK)
    scales = _by_block(weight.scales_OG, group, columns)
    blocks = np.empty((rows, columns // BLOCK, kind.block_bytes), np.uint8)
    blocks[..., :2] = scales.numpy().view(np.uint8).reshape(rows, -1, 2)
    if kind is GGMLType.Q8_0:
        blocks[..., 2:] = codes.view(np.uint8)
        return blocks.reshape(rows, -1)
    lowest = -8
    if kind is GGMLType.Q4_1:
        lowest = -(1 << weight.bits - 1)
        minima = lowest * scales.float()
        if weight.zeros_OG is not None:
            minima -= _by_block(weight.zeros_OG, group, columns).float() * scales.float()
        blocks[..., 2:4] = minima.half().numpy().view(np.uint8).reshape(rows, -1, 2)
    unsigned = (codes - np.int8(lowest)).view(np.uint8)
    blocks[..., -16:] = unsigned[..., :16] | unsigned[..., 16:] << 4
    return blocks.reshape(rows, -1)


def _by_block(values_OG: Tensor, group: int, columns: int) -> Tensor:
    """One value for each block, from one for each group."""
    return values_OG.cpu().repeat_interleave(-(-group // BLOCK), 1)[:, : columns // BLOCK].contiguous()


def as_weight(
    bits: int,
    group: int,
    codes_OI: Tensor,
    scales_OG: Tensor,
    zeros_OG: Tensor | None,
    group_of_I: Tensor | None = None,
) -> Weight:
    """Codes as a file holds them, as blocks where there are blocks for them, as float32 numbers where there are none.

    scales_OG: of any float type; one that is not an fp16 number is rounded to it, by less than 2^-11 of itself. Where
    one would lose more (below 6e-5 or beyond 4000), and where inputs are not in order of their groups (`group_of_I`,
    GPTQ's act-order), the weights become plain numbers without rounding.
    """
    columns = codes_OI.shape[1]
    if zeros_OG is not None and not zeros_OG.any():
        zeros_OG = None
    kind = block_kind(bits, zeros_OG is None, group, columns)
    halves_OG = scales_OG.half()
    exact_OG = scales_OG.float()
    fits = ((halves_OG.float() - exact_OG).abs() <= ROUNDED * exact_OG.abs()).all() and exact_OG.abs().max() <= LARGEST
    if kind is not None and fits and group_of_I is None:
        blocks = int_blocks(IntWeight(bits, group, codes_OI, halves_OG, zeros_OG), kind)
        return QuantizedTensor(kind, blocks, tuple(codes_OI.shape))
    if group_of_I is None:
        group_of_I = torch.arange(columns) // group
    numbers_OI = codes_OI.float()
    if zeros_OG is not None:
        numbers_OI -= zeros_OG.float()[:, group_of_I]
    return numbers_OI * exact_OG[:, group_of_I]
