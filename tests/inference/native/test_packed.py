"""Packing, unpacking and looking rows up, against the blocks' meaning in NumPy and against the gguf package."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from craton.errors import UnknownName, UsageError
from craton.inference import native
from craton.inference.native.arena import gather
from craton.inference.native.packed import FORMATS, packed_bytes

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = [(1, 32), (17, 96), (48, 576)]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_gives_the_blocks_meaning_bit_for_bit(isa, make_blocks, kind, n, k, dtype):
    blocks, expected = make_blocks(kind, n, k)
    weight = native.PackedWeight.from_gguf_blocks(kind, blocks)
    assert (weight.n, weight.k) == (n, k)
    assert torch.equal(native.dequantize(weight, dtype), expected.to(dtype))


@pytest.mark.peer
@pytest.mark.parametrize("kind", FORMATS)
def test_dequantize_agrees_with_gguf(kind):
    gguf = pytest.importorskip("gguf")
    kind_there = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(33, 320)).astype(np.float32)
    blocks = gguf.quants.quantize(values, kind_there)
    weight = native.PackedWeight.from_gguf_blocks(kind, torch.from_numpy(blocks))
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind_there))
    assert torch.equal(native.dequantize(weight, torch.float32), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_packing_takes_no_more_memory_than_the_blocks(make_blocks, kind):
    blocks, _ = make_blocks(kind, 64, 576)
    assert native.PackedWeight.from_gguf_blocks(kind, blocks).data.numel() == blocks.numel()


def test_every_half_precision_scale_is_read_exactly(isa):
    scales = np.arange(65536, dtype=np.uint16)
    blocks = np.zeros((65536, 18), dtype=np.uint8)
    blocks[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    blocks[:, 2:] = 0x99  # every quant is 9, so every weight is the scale
    weight = native.PackedWeight.from_gguf_blocks("Q4_0", torch.from_numpy(blocks))
    found = native.dequantize(weight, torch.float32)[:, 7].numpy()
    expected = scales.view(np.float16).astype(np.float32)
    assert np.array_equal(found, expected, equal_nan=True)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(make_blocks):
    blocks, _ = make_blocks("Q4_1", 64, 96, seed=3)
    blocks[5, :2] = 255  # scale NaN
    weight = native.PackedWeight.from_gguf_blocks("Q4_1", blocks)
    expected = native.dequantize(weight, torch.float32).bfloat16()
    found = native.dequantize(weight, torch.bfloat16)
    assert expected[5].isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_looks_up_like_an_embedding(make_blocks, kind, dtype):
    blocks, expected = make_blocks(kind, 37, 64)
    weight = native.PackedWeight.from_gguf_blocks(kind, blocks)
    for ids in (torch.tensor([[36, 0], [5, 5]]), torch.tensor([3], dtype=torch.int32), torch.arange(37)[::2]):
        assert torch.equal(native.rows(weight, ids, dtype), expected.to(dtype)[ids.long()])
    assert native.rows(weight, torch.empty(0, 3, dtype=torch.int64), dtype).shape == (0, 3, 64)


def test_blocks_may_lie_in_a_larger_tensor(make_blocks):
    blocks, expected = make_blocks("Q8_0", 20, 64)
    wider = torch.full((20, blocks.shape[1] + 5), 255, dtype=torch.uint8)
    wider[:, 5:] = blocks
    weight = native.PackedWeight.from_gguf_blocks("Q8_0", wider[:, 5:])
    assert torch.equal(native.dequantize(weight, torch.float32), expected)


def test_packed_bytes_can_be_kept_and_used_again(make_blocks):
    blocks, expected = make_blocks("Q4_1", 19, 64)
    data = native.PackedWeight.from_gguf_blocks("Q4_1", blocks).data.clone()
    assert torch.equal(native.dequantize(native.PackedWeight(data, 19, 64, "Q4_1"), torch.float32), expected)


def test_a_weight_without_rows_is_allowed():
    weight = native.PackedWeight.from_gguf_blocks("Q4_0", torch.empty(0, 18, dtype=torch.uint8))
    assert native.dequantize(weight, torch.float32).shape == (0, 32)
    assert native.linear(torch.randn(3, 32), weight).shape == (3, 0)


@pytest.mark.parametrize("row_bytes", [0, 17, 19, 35])
def test_rows_of_partial_blocks_are_refused(row_bytes):
    with pytest.raises(UsageError, match="not whole Q4_0 blocks of 18 bytes") as caught:
        native.PackedWeight.from_gguf_blocks("Q4_0", torch.zeros(4, row_bytes, dtype=torch.uint8))
    assert "multiple of 32" in (caught.value.remedy or "")


def test_unknown_formats_and_wrong_tensors_are_refused():
    with pytest.raises(UnknownName, match="Q5_0"):
        native.PackedWeight.from_gguf_blocks("Q5_0", torch.zeros(4, 22, dtype=torch.uint8))
    with pytest.raises(UsageError, match="uint8"):
        native.PackedWeight.from_gguf_blocks("Q4_0", torch.zeros(4, 18))
    with pytest.raises(UsageError, match="uint8"):
        native.PackedWeight.from_gguf_blocks("Q4_0", torch.zeros(18, dtype=torch.uint8))


def test_packed_bytes_of_the_wrong_size_or_shape_are_refused():
    size = packed_bytes("Q4_0", 16, 64)
    for n, k in ((17, 64), (16, 96), (32, 64)):
        with pytest.raises(UsageError, match=rf"a packed Q4_0 weight \[{n}, {k}\]"):
            native.PackedWeight(torch.zeros(size, dtype=torch.uint8), n, k, "Q4_0")
    with pytest.raises(UsageError, match="int8"):
        native.PackedWeight(torch.zeros(size, dtype=torch.int8), 16, 64, "Q4_0")
    for k in (0, 33, -32):
        with pytest.raises(UsageError, match="cannot be packed"):
            packed_bytes("Q4_0", 16, k)


@pytest.mark.parametrize("ids", [[0, 8], [-1], [2**40]])
def test_row_ids_out_of_range_are_refused(make_blocks, ids):
    weight = native.PackedWeight.from_gguf_blocks("Q4_0", make_blocks("Q4_0", 8, 32)[0])
    with pytest.raises(UsageError, match="rows 0 to 7"):
        native.rows(weight, torch.tensor(ids), torch.float32)


def test_types_that_cannot_be_unpacked_are_refused(make_blocks):
    weight = native.PackedWeight.from_gguf_blocks("Q4_0", make_blocks("Q4_0", 8, 32)[0])
    with pytest.raises(UsageError, match="float16"):
        native.dequantize(weight, torch.float16)
    with pytest.raises(UsageError, match="integers"):
        native.rows(weight, torch.tensor([1.0]), torch.float32)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_weights_move_to_huge_pages_unchanged(make_blocks):
    weights = [native.PackedWeight.from_gguf_blocks(kind, make_blocks(kind, 3000, 576)[0]) for kind in FORMATS]
    x = torch.randn(3, 576)
    expected = [native.linear(x, weight) for weight in weights]
    before = [weight.data.data_ptr() for weight in weights]
    gather(weights)
    assert [weight.data.data_ptr() for weight in weights] != before
    assert all(weight.data.data_ptr() % 64 == 0 for weight in weights)
    for weight, product in zip(weights, expected, strict=True):
        assert torch.equal(native.linear(x, weight), product)
