"""GPTQ's and AWQ's own layouts, packed here number by number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.int_weight import IntWeight
from craton.checkpoints.weights import QuantizedLinear
from craton.errors import CratonError

Q, THEIR_Q = "trunk.layers.0.attention.q", "model.layers.0.self_attn.q_proj"
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the outputs in a word, from its lowest bits on


def packed_along_rows(numbers_RC: np.ndarray, bits: int) -> Tensor:
    """GPTQ's qweight: the numbers of a column are one stream of bits, from 32-bit word to 32-bit word."""
    rows, columns = numbers_RC.shape
    words = np.zeros((rows * bits // 32, columns), np.uint64)
    for row in range(rows):
        word, shift = divmod(row * bits, 32)
        wide = numbers_RC[row].astype(np.uint64) << np.uint64(shift)
        words[word] |= wide & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            words[word + 1] |= wide >> np.uint64(32)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def as_gptq(weight: IntWeight, order: Tensor, *, less: int = 1) -> dict[str, Tensor]:
    half = 1 << weight.bits - 1
    zeros_OG = torch.zeros_like(weight.scales_OG) if weight.zeros_OG is None else weight.zeros_OG
    zeros = (zeros_OG.numpy().astype(np.int64) + half - less) % (2 * half)
    return {
        "qweight": packed_along_rows(weight.codes_OI.numpy().astype(np.int64).T + half, weight.bits),
        "qzeros": packed_along_rows(zeros, weight.bits).T.contiguous(),
        "scales": weight.scales_OG.T.contiguous(),
        "g_idx": order.int(),
    }


def as_awq(weight: IntWeight) -> dict[str, Tensor]:
    def words(numbers_XO: np.ndarray) -> Tensor:
        eights = (numbers_XO.astype(np.int64) + 8).reshape(len(numbers_XO), -1, 8)[:, :, AWQ_ORDER]
        packed = (eights << np.arange(0, 32, 4)).sum(2)
        return torch.from_numpy(np.ascontiguousarray(packed.astype(np.uint32)).view(np.int32))

    zeros_OG = torch.zeros_like(weight.scales_OG) if weight.zeros_OG is None else weight.zeros_OG
    return {
        "qweight": words(weight.codes_OI.numpy().T),
        "qzeros": words(zeros_OG.numpy().T),
        "scales": weight.scales_OG.T.contiguous(),
    }


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """folder(tensors, config): the tiny model with one layer in another layout."""

    def write(parts: dict[str, Tensor], **config: Any) -> Path:
        tensors = safetensors.torch.load_file(tiny_model / "model.safetensors")
        del tensors[f"{THEIR_Q}.weight"]
        tensors |= {f"{THEIR_Q}.{name}": tensor for name, tensor in parts.items()}
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        values = json.loads((tiny_model / "config.json").read_text()) | {"quantization_config": config}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


@pytest.fixture
def weight_of(tiny_model: Path, round_weight: Callable[..., IntWeight]) -> Callable[..., IntWeight]:
    weight = Checkpoint.open(tiny_model).load(torch.float32).get_submodule(Q).weight
    return lambda *args: round_weight(weight, *args)


def read_q(path: Path, *, packed: bool = False) -> Any:
    module = Checkpoint.open(path).load(torch.float32, packed=packed).get_submodule(Q)
    return module if packed else module.weight


def check(path: Path, weight: IntWeight) -> None:
    kind = ("Q4_0" if weight.zeros_OG is None else "Q4_1") if weight.bits <= 4 else "Q8_0"
    assert Checkpoint.open(path).quantized_kinds() == {kind}
    assert isinstance(read_q(path, packed=True), QuantizedLinear)
    atol = 0.0 if weight.zeros_OG is None else 0.01 * float(weight.scales_OG.max())
    torch.testing.assert_close(read_q(path), weight.dequantize(), rtol=0, atol=atol)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, True), (8, True), (3, False), (4, False)])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(folder, weight_of, bits, symmetric, version):
    weight = weight_of(bits, 32, symmetric)
    parts = as_gptq(weight, torch.arange(64) // 32, less=1 if version == "gptq" else 0)
    config = {"bits": bits, "group_size": 32, "sym": symmetric, "desc_act": False, "checkpoint_format": version}
    check(folder(parts, quant_method="gptq", **config), weight)


def test_gptq_in_one_group_without_an_order(folder, weight_of):
    weight = weight_of(4, 64)
    parts = as_gptq(weight, torch.zeros(64))
    del parts["g_idx"]
    check(folder(parts, quant_method="gptq", bits=4, group_size=-1), weight)


def test_gptq_with_act_order(folder, weight_of):
    weight = weight_of(4, 32, False)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    path = folder(as_gptq(weight, order), quant_method="gptq", bits=4, group_size=32, sym=False, desc_act=True)
    codes = weight.codes_OI.float() - weight.zeros_OG.float()[:, order]
    assert torch.equal(read_q(path), codes * weight.scales_OG.float()[:, order])


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(folder, weight_of, symmetric):
    weight = weight_of(4, 32, symmetric)
    path = folder(as_awq(weight), quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm")
    if symmetric:  # AWQ's files do not say it; the zeros do
        assert torch.equal(read_q(path), weight.dequantize())
    else:
        check(path, weight)


@pytest.mark.peer
def test_awq_is_what_compressed_tensors_takes_it_for(weight_of):
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq").AutoAWQConverter
    weight = weight_of(4, 32, False)
    parts = as_awq(weight)
    codes, scales, zeros = convert(group_size=32)._convert_gemm_module(
        parts["qweight"], parts["scales"], parts["qzeros"]
    )
    assert torch.equal(codes, weight.codes_OI)
    assert torch.equal(scales, weight.scales_OG)
    assert torch.equal(zeros, weight.zeros_OG)


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda parts: parts.pop(name)


GPTQ, AWQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}, {"quant_method": "awq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("config", "edit", "words"),
    [
        (GPTQ | {"bits": 5}, None, "bits = 5 is not supported"),
        (GPTQ | {"bits": 8}, None, r"qzeros' has shape \[2, 8\]|scales' has shape"),
        (GPTQ | {"group_size": 16}, None, r"scales' has shape \[2, 64\]; its layer asks for \[4, 64\]"),
        (GPTQ | {"group_size": 0}, None, "groups of 0 inputs"),
        (GPTQ | {"checkpoint_format": "marlin"}, None, "checkpoint_format = 'marlin' is not supported"),
        (GPTQ | {"dynamic": {"-:.*q_proj": {}}}, None, "dynamic = .* is not supported"),
        (GPTQ, without("scales"), "scales' is missing"),
        (GPTQ, without("qzeros"), "qzeros' is missing"),
        (GPTQ, lambda parts: parts.update(g_idx=torch.full((64,), 2)), "g_idx' names groups outside of 0 to 1"),
        (GPTQ, lambda parts: parts.update(qweight=parts["qweight"][0]), "which is no matrix's"),
        (GPTQ, lambda parts: parts["scales"].fill_(torch.nan), "scales' holds NaN"),
        (AWQ | {"version": "gemv"}, None, "AWQ's layout 'gemv' is not read"),
        (AWQ | {"bits": 8}, None, "bits = 8 is not supported"),
        (AWQ, without("qzeros"), "qzeros' is missing"),
        (AWQ, lambda parts: parts.update(qweight=parts["qweight"].float()), "qweight' is F32, not I32"),
    ],
)
def test_refused(folder, weight_of, config, edit, words):
    weight = weight_of(4, 32, False)
    parts = as_awq(weight) if config["quant_method"] == "awq" else as_gptq(weight, torch.arange(64) // 32)
    if edit is not None:
        edit(parts)
    path = folder(parts, **config)
    with pytest.raises(CratonError, match=words) as refused:
        read_q(path)
    assert str(path) in str(refused.value.where)
