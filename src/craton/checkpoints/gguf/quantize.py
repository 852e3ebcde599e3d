"""From float32 to GGML blocks: each function reads values [n, block size] and fills blocks [n, block bytes].

Rounding is that of GGML's reference quantisers, so the blocks are equal to theirs bit for bit; the K types (see
`k_quants`) are a search instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from craton.checkpoints.gguf.dequantize import Blocks, Values
from craton.checkpoints.gguf.k_quants import q4_k, q6_k
from craton.checkpoints.gguf.types import GGMLType
from craton.errors import CheckpointError, UsageError

_CHUNK_VALUES = 1 << 17  # quantised at a time, which bounds the temporaries

_F16_LARGEST = 65504.0


def quantize(values: Values, type: GGMLType, *, name: str = "tensor") -> Blocks:
    """`values`, float32 [rows, columns], as the blocks of `type`, uint8 [rows, bytes per row].

    `name` is for the words of a refusal. Raises CheckpointError at the first value that `type` cannot hold (NaN,
    infinite, too large), and UsageError for a wrong array or a type that cannot be written.
    """
    if type not in _ENCODERS:
        known = ", ".join(known.name for known in _ENCODERS)
        raise UsageError(f"cannot quantise to {type.name}", where=name, remedy=f"known: {known}")
    if values.ndim != 2 or values.dtype != np.float32:
        raise UsageError(f"values must be float32 [rows, columns], not {values.dtype} {values.shape}", where=name)
    rows, columns = values.shape
    if columns % type.block_size:
        raise UsageError(
            f"rows of {columns} values are not whole {type.name} blocks of {type.block_size}",
            where=name,
            remedy="use F16 or BF16 for this tensor",
        )
    encode, largest = _ENCODERS[type]
    flat = values.reshape(-1, type.block_size)
    blocks = np.empty((len(flat), type.block_bytes), np.uint8)
    step = _CHUNK_VALUES // type.block_size
    for start in range(0, len(flat), step):
        chunk = flat[start : start + step]
        fits = np.abs(chunk) <= largest  # False for NaN too
        if not fits.all():
            row, column = divmod(start * type.block_size + int(np.argmin(fits)), columns)
            raise CheckpointError(
                f"{values[row, column]} cannot be written as {type.name}, which holds magnitudes up to {largest:.6g}",
                where=f"{name}, row {row}, column {column}",
                remedy="repair the weights, or choose a type with a wider range (BF16, F32) if they are right",
            )
        encode(chunk, blocks[start : start + step])
    return blocks.reshape(rows, -1)


def _f32(values: Values, blocks: Blocks) -> None:
    blocks.view("<f4")[...] = values


def _f16(values: Values, blocks: Blocks) -> None:
    blocks.view("<f2")[...] = values


def _bf16(values: Values, blocks: Blocks) -> None:
    bits = np.ascontiguousarray(values).view(np.uint32)
    # To nearest, ties to even: add half of what is cut off, a bit less where the kept part is even.
    blocks.view("<u2")[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _q8_0(values: Values, blocks: Blocks) -> None:
    d: Values = np.abs(values).max(axis=1, keepdims=True) / 127
    scaled = values * _inverse(d)
    whole = np.trunc(scaled)
    whole += np.trunc(2 * (scaled - whole))  # to nearest, ties away from zero
    blocks[:, :2].view("<f2")[...] = d
    blocks[:, 2:].view(np.int8)[...] = whole


def _q4_0(values: Values, blocks: Blocks) -> None:
    # The value of the largest magnitude, sign and all, becomes -8 exactly.
    extreme = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    d = extreme / np.float32(-8)
    scaled: Values = values * _inverse(d)
    q = np.minimum((scaled + np.float32(8.5)).astype(np.uint8), 15)
    blocks[:, :2].view("<f2")[...] = d
    blocks[:, 2:] = q[:, :16] | q[:, 16:] << 4


def _q4_1(values: Values, blocks: Blocks) -> None:
    low = values.min(axis=1, keepdims=True)
    d = (values.max(axis=1, keepdims=True) - low) / np.float32(15)
    q = np.minimum(((values - low) * _inverse(d) + np.float32(0.5)).astype(np.uint8), 15)
    blocks[:, 0:2].view("<f2")[...], blocks[:, 2:4].view("<f2")[...] = d, low
    blocks[:, 4:] = q[:, :16] | q[:, 16:] << 4


def _q5_0(values: Values, blocks: Blocks) -> None:
    # As in Q4_0, of -16 to 15; the fifth bits lie apart.
    extreme = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    d = extreme / np.float32(-16)
    q = np.minimum((values * _inverse(d) + np.float32(16.5)).astype(np.uint8), 31)
    blocks[:, :2].view("<f2")[...] = d
    blocks[:, 2:6] = np.packbits(q >> 4, axis=1, bitorder="little")
    blocks[:, 6:] = q[:, :16] & 15 | q[:, 16:] << 4


def _inverse(d: Values) -> Values:
    """1 / d; 0 where d is 0 or so small that 1 / d overflows: as a float16, such a scale is 0 anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


# With the largest magnitude that a type holds: beyond it a value or its block's scale would become infinite.
_ENCODERS: dict[GGMLType, tuple[Callable[[Values, Blocks], None], float]] = {
    GGMLType.F32: (_f32, float(np.finfo(np.float32).max)),
    GGMLType.F16: (_f16, _F16_LARGEST),
    GGMLType.BF16: (_bf16, math.ldexp(255, 120)),
    GGMLType.Q8_0: (_q8_0, 127 * _F16_LARGEST),
    GGMLType.Q4_0: (_q4_0, 8 * _F16_LARGEST),
    GGMLType.Q4_1: (_q4_1, _F16_LARGEST),
    GGMLType.Q5_0: (_q5_0, 16 * _F16_LARGEST),
    GGMLType.Q4_K: (q4_k, 32 * _F16_LARGEST),
    GGMLType.Q6_K: (q6_k, 2048 * _F16_LARGEST),
}
