"""From GGML blocks to float32: each function reads blocks [n, block bytes] and fills values [n, block size].

The arithmetic, and its order, are those of GGML's reference, so the results are equal to the last bit.
Layouts: ggml-common.h; a `d` is a block's scale, an `m` or `dmin` what is added or taken off, `qs` the small integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from craton.checkpoints.gguf.types import GGMLType
from craton.errors import FileFormatError

Blocks: TypeAlias = NDArray[np.uint8]
Values: TypeAlias = NDArray[np.float32]

# Values decoded at a time: the temporaries of a chunk stay in the cache, and memory stays at the size of the result.
_CHUNK_VALUES = 1 << 17


def dequantize(blocks: Blocks, type: GGMLType) -> Values:
    """The values of `blocks`, uint8 [rows, bytes per row], as float32 [rows, columns].

    Scales that are not finite give the values that they give (infinite or NaN); whoever builds a model refuses them.
    Raises FileFormatError for a type that holds no float weights.
    """
    if type not in _DECODERS:
        raise FileFormatError(
            f"{type.name} blocks cannot be dequantised", remedy=f"known: {', '.join(t.name for t in _DECODERS)}"
        )
    decode = _DECODERS[type]
    flat = blocks.reshape(-1, type.block_bytes)
    values = np.empty((len(flat), type.block_size), np.float32)
    step = _CHUNK_VALUES // type.block_size
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(flat), step):
            decode(flat[start : start + step], values[start : start + step])
    return values.reshape(len(blocks), -1)


def _f32(blocks: Blocks, values: Values) -> None:
    values[...] = blocks.view("<f4")


def _f16(blocks: Blocks, values: Values) -> None:
    values[...] = blocks.view("<f2")


def _f64(blocks: Blocks, values: Values) -> None:
    values[...] = blocks.view("<f8")


def _bf16(blocks: Blocks, values: Values) -> None:
    np.left_shift(blocks.view("<u2"), 16, out=values.view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: Blocks, values: Values) -> None:
    _nibbles(blocks[:, 2:], values)
    values -= 8
    values *= _half(blocks, 0)


def _q4_1(blocks: Blocks, values: Values) -> None:
    _nibbles(blocks[:, 4:], values)
    values *= _half(blocks, 0)
    values += _half(blocks, 2)


def _q5_0(blocks: Blocks, values: Values) -> None:
    _nibbles(blocks[:, 6:], values)
    values += _fifth_bits(blocks[:, 2:6])
    values -= 16
    values *= _half(blocks, 0)


def _q5_1(blocks: Blocks, values: Values) -> None:
    _nibbles(blocks[:, 8:], values)
    values += _fifth_bits(blocks[:, 4:8])
    values *= _half(blocks, 0)
    values += _half(blocks, 2)


def _q8_0(blocks: Blocks, values: Values) -> None:
    values[...] = blocks[:, 2:].view(np.int8)
    values *= _half(blocks, 0)


# The K types hold 256 values in groups of 16 or 32, each with a scale of its own under the block's scale `d`.


def _q2_k(blocks: Blocks, values: Values) -> None:
    scales = blocks[:, :16]
    groups = values.reshape(-1, 16, 16)
    groups[...] = _bit_planes(blocks[:, 16:80], width=2).reshape(groups.shape)
    groups *= (_half(blocks, 80) * (scales & 15))[:, :, None]
    groups -= (_half(blocks, 82) * (scales >> 4))[:, :, None]


def _q3_k(blocks: Blocks, values: Values) -> None:
    groups = values.reshape(-1, 16, 16)
    groups[...] = _bit_planes(blocks[:, 32:96], width=2).reshape(groups.shape)
    # The high bit is stored inverted: where it is absent, 4 is taken off.
    groups -= (4 - 4 * _bit_planes(blocks[:, :32], width=1)).reshape(groups.shape)
    # Sixteen scales of 6 bits: 4 low bits in the nibbles of 8 bytes, 2 high bits in 4 more.
    packed = blocks[:, 96:108]
    low = _bit_planes(packed[:, :8], width=4, run=8).reshape(-1, 16)
    high = _bit_planes(packed[:, 8:], width=2, run=4).reshape(-1, 16)
    scales = (low | high << 4).astype(np.float32) - 32
    groups *= (_half(blocks, 108) * scales)[:, :, None]


def _q4_k(blocks: Blocks, values: Values) -> None:
    groups = values.reshape(-1, 8, 32)
    groups[...] = _bit_planes(blocks[:, 16:], width=4).reshape(groups.shape)
    _scale_and_shift(blocks, groups)


def _q5_k(blocks: Blocks, values: Values) -> None:
    groups = values.reshape(-1, 8, 32)
    groups[...] = _bit_planes(blocks[:, 48:], width=4).reshape(groups.shape)
    groups += (_bit_planes(blocks[:, 16:48], width=1) << 4).reshape(groups.shape)
    _scale_and_shift(blocks, groups)


def _q6_k(blocks: Blocks, values: Values) -> None:
    groups = values.reshape(-1, 16, 16)
    low = _bit_planes(blocks[:, :128], width=4, run=64).reshape(groups.shape)
    high = _bit_planes(blocks[:, 128:192], width=2).reshape(groups.shape)
    groups[...] = low | high << 4
    groups -= 32
    groups *= (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[:, :, None]


def _half(blocks: Blocks, at: int) -> Values:
    """The float16 at byte `at` of each block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(qs: Blocks, values: Values) -> None:
    """Blocks of 32: the low nibbles of 16 bytes are the first half of the values, the high ones the second."""
    values[:, :16] = qs & 15
    values[:, 16:] = qs >> 4


def _fifth_bits(qh: Blocks) -> Blocks:
    """The fifth bits of 32 values, from 4 bytes, at their place: 0 or 16."""
    return np.unpackbits(qh, axis=1, bitorder="little") << np.uint8(4)


def _bit_planes(packed: Blocks, *, width: int, run: int = 32) -> Blocks:
    """Fields of `width` bits: for each `run` of bytes, the lowest fields of all of them, then the next ones, ..."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    runs = packed.reshape(len(packed), -1, 1, run)
    return runs >> shifts[:, None] & np.uint8((1 << width) - 1)


def scales_and_minima(blocks: Blocks) -> tuple[Values, Values]:
    """Of Q4_K and Q5_K blocks, each group's scale and what is taken off, [n, 8]: `d`, `dmin`, and eight 6-bit scales
    and minima in 12 bytes.

    The first four of each have their bytes' low 6 bits; the last four have 4 bits in the third quad of bytes and their
    2 high bits on top of the first four.
    """
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _scale_and_shift(blocks: Blocks, groups: Values) -> None:
    scales, minima = scales_and_minima(blocks)
    groups *= scales[:, :, None]
    groups -= minima[:, :, None]


_DECODERS: dict[GGMLType, Callable[[Blocks, Values], None]] = {
    GGMLType.F32: _f32,
    GGMLType.F16: _f16,
    GGMLType.BF16: _bf16,
    GGMLType.F64: _f64,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}
