"""Tensors of a GGUF file whose weights are integers already (see `IntWeight`): which block type, and the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from craton.checkpoints.gguf import GGMLType, TensorSource, quantize
from craton.checkpoints.gguf.dequantize import Blocks
from craton.checkpoints.int_blocks import BLOCK, int_blocks
from craton.checkpoints.int_weight import IntWeight
from craton.errors import CheckpointError


def quantized_tensor(
    inside: str,
    shape: tuple[int, ...],
    parts: Mapping[str, IntWeight | None],
    arrange: Callable[[Mapping[str, Tensor]], Tensor],
) -> TensorSource:
    """The file's tensor `inside`, made of `parts`: one matrix, or several that lie in one (q, k and v, the experts).

    arrange: what makes the tensor of its parts. It only moves rows, so it is done to rows of blocks.

    Raises CheckpointError where only some parts are integers, and for groups that blocks of 32 cannot say.
    """
    weights = {name: weight for name, weight in parts.items() if weight is not None}
    if len(weights) < len(parts):
        plain = next(name for name, weight in parts.items() if weight is None)
        raise CheckpointError(
            f"{next(iter(weights))!r} is quantised and {plain!r} is not, but both are in the tensor {inside!r}",
            remedy="quantise all of its parts, or none",
        )
    type = _type(weights)

    def blocks() -> Blocks:
        rows = arrange({name: torch.from_numpy(_blocks(weight, type)) for name, weight in weights.items()})
        return rows.reshape(-1, shape[-1] // type.block_size * type.block_bytes).numpy()

    return TensorSource(inside, shape, type, blocks)


def _type(weights: Mapping[str, IntWeight]) -> GGMLType:
    """The block type that holds all the parts of one tensor."""
    for name, weight in weights.items():
        columns = weight.shape[1]
        if columns % BLOCK:
            return GGMLType.F16
        if weight.group < columns and weight.group % BLOCK:
            raise CheckpointError(
                f"{name!r} has a scale for every {weight.group} inputs, which GGUF's blocks of {BLOCK} cannot say",
                remedy=f"quantise it in groups of {BLOCK} or of a multiple of it",
            )
    if any(weight.bits > 4 for weight in weights.values()):
        return GGMLType.Q8_0
    symmetric = all(weight.zeros_OG is None for weight in weights.values())
    return GGMLType.Q4_0 if symmetric else GGMLType.Q4_1


def _blocks(weight: IntWeight, type: GGMLType) -> Blocks:
    if type is GGMLType.Q4_1 or (type is not GGMLType.F16 and weight.zeros_OG is None):
        return int_blocks(weight, type)
    return quantize(np.ascontiguousarray(weight.dequantize().cpu().numpy()), type)
