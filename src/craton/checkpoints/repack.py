"""GGUF's other block types, put into those that the native kernels multiply: Q4_0, Q4_1 and Q8_0.

Which of them may be is a matter of what it costs. Measured on normal weights, squared errors relative to the weights':

| type | own error | as | added |
|---|---|---|---|
| Q4_K | 0.0052 | Q4_1 | < 2^-22: scales and minima are rounded to fp16 |
| Q5_0 | 0.0018 | Q8_0 | none: the same codes under the same scale |
| Q2_K, Q3_K | 0.076, 0.023 | Q8_0 | 0.00003, which is 0.1 % of their own at most |
| Q5_1, Q5_K, Q6_K | 0.0014, 0.0013, 0.0003 | Q8_0 | 0.00003, which is 2, 2 and 9 % of their own |

So the last three are rounded again only in files that are coarser as a whole, as those called Q4_K_M are: where what is
added stays below 1 % of the squared error that the file has anyway.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from craton.checkpoints.gguf import GGMLType, dequantize, quantize
from craton.checkpoints.gguf.dequantize import Blocks, scales_and_minima
from craton.checkpoints.weights import QuantizedTensor

# Squared errors of the types, relative to normal weights; a type of plain numbers has none.
OWN_ERROR: Mapping[str, float] = {
    "Q2_K": 0.076,
    "Q3_K": 0.023,
    "Q4_0": 0.0074,
    "Q4_1": 0.0061,
    "Q4_K": 0.0052,
    "Q5_0": 0.0018,
    "Q5_1": 0.0014,
    "Q5_K": 0.0013,
    "Q6_K": 0.00031,
    "Q8_0": 0.00003,
}
ALWAYS: Mapping[str, GGMLType] = {
    "Q4_K": GGMLType.Q4_1,
    "Q5_0": GGMLType.Q8_0,
    "Q2_K": GGMLType.Q8_0,
    "Q3_K": GGMLType.Q8_0,
}
IN_COARSE_FILES = ("Q5_1", "Q5_K", "Q6_K")
NEGLIGIBLE = 0.01

_CHUNK_ROWS_VALUES = 1 << 22  # repacked at a time, which bounds the temporaries


def repacked_as(kinds: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, GGMLType]:
    """By its name, what each block type of a file is repacked as, for the file's tensors by their `kinds` and `shapes`;
    a type that is not there stays as it is."""
    sizes: Counter[str] = Counter()
    for name, kind in kinds.items():
        sizes[kind] += math.prod(shapes[name])
    error = sum(size * OWN_ERROR.get(kind, 0.0) for kind, size in sizes.items())
    added = OWN_ERROR["Q8_0"] * sum(sizes[kind] for kind in IN_COARSE_FILES)
    if added <= NEGLIGIBLE * error:
        return {**ALWAYS, **dict.fromkeys(IN_COARSE_FILES, GGMLType.Q8_0)}
    return ALWAYS


def repack(weight: QuantizedTensor, kind: GGMLType) -> QuantizedTensor:
    """`weight` in blocks of `kind`, one of those that `repacked_as` names for it."""
    step = max(1, _CHUNK_ROWS_VALUES // weight.shape[1])
    change = _CHANGES.get((weight.kind, kind))
    rows = []
    for start in range(0, len(weight.blocks), step):
        blocks = weight.blocks[start : start + step]
        if change is not None:
            rows.append(change(blocks.reshape(-1, weight.kind.block_bytes)).reshape(len(blocks), -1))
        else:
            rows.append(quantize(dequantize(blocks, weight.kind), kind))
    return QuantizedTensor(kind, np.concatenate(rows), weight.shape)


def _q4_k_as_q4_1(blocks: Blocks) -> Blocks:
    scales, minima = scales_and_minima(blocks)
    out = np.empty((len(blocks), 8, GGMLType.Q4_1.block_bytes), np.uint8)
    out[:, :, 0:2].view("<f2")[..., 0], out[:, :, 2:4].view("<f2")[..., 0] = scales, -minima
    # 32 bytes hold two groups, one in their low halves; in Q4_1, 16 bytes hold the two halves of one.
    pairs = blocks[:, 16:].reshape(-1, 4, 2, 16)
    out[:, 0::2, 4:] = pairs[:, :, 0] & 15 | pairs[:, :, 1] << 4
    out[:, 1::2, 4:] = pairs[:, :, 0] >> 4 | pairs[:, :, 1] & 240
    return out


def _q5_0_as_q8_0(blocks: Blocks) -> Blocks:
    out = np.empty((len(blocks), GGMLType.Q8_0.block_bytes), np.uint8)
    out[:, :2] = blocks[:, :2]
    codes = np.concatenate([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], axis=1)
    codes |= np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << np.uint8(4)
    out[:, 2:] = codes - np.uint8(16)  # as int8
    return out


_CHANGES: Mapping[tuple[GGMLType, GGMLType], Callable[[Blocks], Blocks]] = {
    (GGMLType.Q4_K, GGMLType.Q4_1): _q4_k_as_q4_1,
    (GGMLType.Q5_0, GGMLType.Q8_0): _q5_0_as_q8_0,
}
