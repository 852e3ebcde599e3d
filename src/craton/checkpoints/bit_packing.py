"""Small unsigned integers packed without holes into int32 words, as files of quantised weights hold them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK_ROWS_BYTES = 1 << 24  # of temporaries; packing a 3-bit row takes 8 bytes a number


def packed_words(columns: int, bits: int) -> int:
    """The int32 words that a row of so many numbers fills."""
    return -(-columns * bits // 32)


def pack_bits(numbers_RC: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns], each below 2^bits, as int32 [rows, words].

    A row is one stream of bits, lowest first: number i begins at bit i * bits, and one of 3 bits may lie in two words.
    """
    rows, columns = numbers_RC.shape
    packed = np.zeros((rows, packed_words(columns, bits) * 4), np.uint8)
    numbers = numbers_RC.numpy()
    step = max(1, _CHUNK_ROWS_BYTES // (8 * max(columns, 1)))
    for start in range(0, rows, step):
        chunk = numbers[start : start + step]
        stream = np.unpackbits(chunk[:, :, None], axis=2, count=bits, bitorder="little").reshape(len(chunk), -1)
        filled = np.packbits(stream, axis=1, bitorder="little")
        packed[start : start + step, : filled.shape[1]] = filled
    return torch.from_numpy(packed.view("<i4"))


def unpack_bits(words_RW: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [rows, columns]."""
    rows = len(words_RW)
    packed = np.ascontiguousarray(words_RW.numpy()).view(np.uint8)
    if 8 % bits == 0:
        in_a_byte = np.empty((*packed.shape, 8 // bits), np.uint8)
        for place in range(8 // bits):
            in_a_byte[:, :, place] = packed >> place * bits & (1 << bits) - 1
        return torch.from_numpy(in_a_byte.reshape(rows, -1)[:, :columns])
    numbers = np.empty((rows, columns), np.uint8)
    step = max(1, _CHUNK_ROWS_BYTES // (8 * max(columns, 1)))
    for start in range(0, rows, step):
        stream = np.unpackbits(packed[start : start + step], axis=1, count=columns * bits, bitorder="little")
        numbers[start : start + step] = np.packbits(
            stream.reshape(len(stream), columns, bits), axis=2, bitorder="little"
        )[:, :, 0]
    return torch.from_numpy(numbers)
