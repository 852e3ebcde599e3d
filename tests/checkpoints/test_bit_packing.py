"""Small integers in 32-bit words."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.bit_packing import pack_bits, packed_words, unpack_bits


@pytest.mark.parametrize("columns", [1, 10, 32, 37, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_row_is_one_stream_of_bits(bits, columns):
    numbers = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack_bits(numbers, bits)
    assert words.dtype == torch.int32
    for row, packed in zip(numbers.tolist(), words.tolist(), strict=True):
        stream = sum(number << bits * i for i, number in enumerate(row))
        assert [word % 2**32 for word in packed] == [stream >> 32 * i & 0xFFFFFFFF for i in range(len(packed))]
    assert words.shape[1] == packed_words(columns, bits)
    assert torch.equal(unpack_bits(words, bits, columns), numbers)


def test_many_rows_are_packed_in_parts(monkeypatch):
    monkeypatch.setattr("craton.checkpoints.bit_packing._CHUNK_ROWS_BYTES", 1000)
    numbers = torch.arange(7 * 64).reshape(7, 64).remainder(8).to(torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(numbers, 3), 3, 64), numbers)
