"""Block types without a kernel, in those that have one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.llama import LLAMA
from craton.checkpoints.gguf import GGMLType, quantize
from craton.checkpoints.gguf_export import save_gguf
from craton.checkpoints.repack import OWN_ERROR, repack, repacked_as
from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from craton.models import build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import causal_config
from craton.pretraining.sizing import SizeOverrides, size


def normal(rows: int = 48) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((rows, 512)) * 0.03).astype(np.float32)


def packed(type: GGMLType) -> QuantizedTensor:
    return QuantizedTensor(type, quantize(normal(), type), (48, 512))


def test_q5_0_has_the_same_numbers_in_q8_0():
    weight = packed(GGMLType.Q5_0)
    again = repack(weight, GGMLType.Q8_0)
    assert again.kind is GGMLType.Q8_0
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_q4_k_differs_in_q4_1_by_the_rounding_of_scales():
    weight = packed(GGMLType.Q4_K)
    again, before = repack(weight, GGMLType.Q4_1).dequantize(), weight.dequantize()
    own = (before - torch.from_numpy(normal())).square().mean()
    assert (again - before).square().mean() < 1e-4 * own
    # d * scale * code and the minimum are each off by less than 2^-11 of themselves.
    assert ((again - before).abs() <= 2.0**-11 * 3 * before.abs().max()).all()


def test_q6_k_is_rounded_to_8_bits_within_the_tabled_error():
    weight = packed(GGMLType.Q6_K)
    before = weight.dequantize()
    added = (repack(weight, GGMLType.Q8_0).dequantize() - before).square().mean() / before.square().mean()
    assert 0 < added < 1.2 * OWN_ERROR["Q8_0"]


@pytest.mark.parametrize("type", [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q4_K, GGMLType.Q5_0, GGMLType.Q6_K])
def test_the_tabled_errors_are_those_of_normal_weights(type):
    off = packed(type).dequantize() - torch.from_numpy(normal())
    assert float(off.square().mean() / (normal() ** 2).mean()) == pytest.approx(OWN_ERROR[type.name], rel=0.05)


def test_many_rows_are_repacked_in_parts(monkeypatch):
    whole = repack(packed(GGMLType.Q4_K), GGMLType.Q4_1).blocks
    monkeypatch.setattr("craton.checkpoints.repack._CHUNK_ROWS_VALUES", 512 * 7)
    assert np.array_equal(repack(packed(GGMLType.Q4_K), GGMLType.Q4_1).blocks, whole)


@pytest.mark.parametrize(
    ("shares", "requantised"),
    [
        ({"Q4_K": 65, "Q6_K": 35}, True),  # as in files called Q4_K_M
        ({"Q4_0": 90, "Q6_K": 10}, True),
        ({"Q5_K": 65, "Q6_K": 35}, False),  # Q5_K_M
        ({"Q6_K": 100}, False),
        ({"Q6_K": 100, "F32": 900}, False),
    ],
)
def test_six_bits_are_rounded_to_eight_only_where_the_file_is_coarser_anyway(shares, requantised):
    kinds = {kind: kind for kind in shares}
    forms = repacked_as(kinds, {kind: (count, 1000) for kind, count in shares.items()})
    assert ("Q6_K" in forms) == requantised
    assert forms["Q4_K"] is GGMLType.Q4_1


@pytest.fixture(scope="module")
def model():
    shape = SizeOverrides(width=256, layers=2, heads=4, kv_heads=2, hidden=512)
    model = build(causal_config(size("0.1m", vocab=288, context=64, overrides=shape), 288, 64))
    initialise(model, 0)
    return model.requires_grad_(False).eval()


def test_a_q4_k_file_is_loaded_for_the_kernels(model, byte_tokenizer, assert_close, tmp_path):
    checkpoint = Checkpoint.open(save_gguf(model, LLAMA, byte_tokenizer, tmp_path / "model.gguf", "Q4_K"))
    assert checkpoint.quantized_kinds() == {"Q4_K", "Q6_K"}
    assert checkpoint.packed_kinds() == {"Q4_1", "Q8_0"}
    loaded, plain = checkpoint.load(torch.float32, packed=True), checkpoint.load(torch.float32)
    kinds = {m.quantized.kind for m in loaded.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}
    assert kinds == {GGMLType.Q4_1, GGMLType.Q8_0}
    ids = torch.arange(30)
    assert_close(loaded(ids, ids), plain(ids, ids), 2e-2)


def test_a_q6_k_file_stays_as_it_is(model, byte_tokenizer, assert_close, tmp_path):
    checkpoint = Checkpoint.open(save_gguf(model, LLAMA, byte_tokenizer, tmp_path / "model.gguf", "Q6_K"))
    assert checkpoint.packed_kinds() == checkpoint.quantized_kinds() == {"Q6_K"}
    ids = torch.arange(30)
    packed, plain = checkpoint.load(torch.float32, packed=True), checkpoint.load(torch.float32)
    assert_close(packed(ids, ids), plain(ids, ids), 1e-5)
