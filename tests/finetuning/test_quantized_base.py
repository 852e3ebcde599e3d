"""4-bit bases: how near and how small they are, and that gradients pass without the numbers being kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.gguf import GGMLType, quantize
from craton.checkpoints.weights import QuantizedLinear, QuantizedTensor
from craton.errors import UnknownName, UsageError
from craton.finetuning.adapters import LoraSettings
from craton.finetuning.lora import adapter_parameters, apply_lora, disabled
from craton.finetuning.quantized_base import (
    BlocksLinear,
    QuantizedBaseLinear,
    base_kind,
    code_of,
    dense_weight,
    keep_blocks,
    normal_float_levels,
    quantize_base,
)
from craton.models import CausalLM, CausalLMConfig
from craton.trunk import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    Linear,
    NormConfig,
    RotaryConfig,
    TrunkConfig,
)

KINDS = ["nf4", "nf4-double", "int4", "int4-minmax"]

# QLoRA (arXiv 2305.14314), appendix E.
PUBLISHED_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def quantized(weight: Tensor, kind: str = "nf4", bias: Tensor | None = None) -> QuantizedBaseLinear:
    return QuantizedBaseLinear(weight, bias, kind)


def blocks_of(weight: Tensor, type: GGMLType, bias: Tensor | None = None) -> QuantizedLinear:
    return QuantizedLinear(QuantizedTensor(type, quantize(weight.numpy(), type), tuple(weight.shape)), bias)


def test_the_levels_are_the_published_ones() -> None:
    assert np.allclose(normal_float_levels(), PUBLISHED_NF4, atol=3e-7)
    assert list(normal_float_levels()) == sorted(normal_float_levels())


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.5), ("nf4-double", 4.127), ("int4", 4.5), ("int4-minmax", 5.0)])
def test_bits_for_each_weight(kind: str, bits: float) -> None:
    layer = quantized(torch.randn(256, 512), kind)
    stored = {name: tensor for name, tensor in layer.named_buffers() if name in layer.state_dict()}
    assert sum(tensor.nbytes for tensor in stored.values()) * 8 / (256 * 512) == pytest.approx(bits, abs=1e-3)
    assert layer.packed.dtype == torch.uint8


@pytest.mark.parametrize(
    ("kind", "error"), [("nf4", 0.092), ("nf4-double", 0.092), ("int4", 0.086), ("int4-minmax", 0.078)]
)
def test_the_error_on_normal_weights(kind: str, error: float) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    measured = (quantized(weight, kind).dequantize() - weight).norm() / weight.norm()
    assert float(measured) == pytest.approx(error, rel=0.02)


@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([1e-3, 0.02, 1.0, 300.0]),
)
@settings(deadline=None, max_examples=60)
def test_every_weight_becomes_its_nearest_level(seed: int, shape: tuple[int, int], kind: str, scale: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    layer = quantized(weight, kind)
    got = layer.dequantize()
    assert got.shape == shape
    scales = layer._scales().repeat_interleave(layer.code.block)[: weight.numel()].view(shape)
    minima = 0.0
    if layer.minima is not None:
        minima = layer.minima.float().repeat_interleave(layer.code.block)[: weight.numel()].view(shape)
    every = torch.tensor(layer.code.levels, dtype=torch.float32)[:, None, None] * scales + minima
    nearest = (every - weight).abs().amin(0)
    assert torch.allclose((got - weight).abs(), nearest, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_zeros_and_lone_large_values(kind: str) -> None:
    weight = torch.zeros(2, 128)
    assert torch.equal(quantized(weight, kind).dequantize(), weight)
    weight[1, 5] = 100.0
    got = quantized(weight, kind).dequantize()
    assert float(got[1, 5]) == pytest.approx(100.0, rel=0.13)
    far = torch.arange(256).view(2, 128) // code_of(kind).block != (128 + 5) // code_of(kind).block
    # Double quantisation stores a scale for what is all zeros, too, as near as 8 bits allow.
    assert got[far].abs().max() == 0


@pytest.mark.parametrize("kind", [*KINDS, "Q4_0", "Q4_1", "Q8_0"])
def test_products_and_gradients(kind: str) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 32) * 0.1, torch.randn(6)
    if kind == "Q4_1":  # which is read and never written: a scale, a minimum and 16 bytes of codes for 32 values
        raw = np.random.default_rng(0).integers(0, 255, (6, 20), dtype=np.uint8)
        raw[:, :4] = np.array([0.1, -0.7], np.float16).view(np.uint8)
        layer: nn.Module = BlocksLinear(QuantizedTensor(GGMLType.Q4_1, raw, (6, 32)), bias)
    elif kind.startswith("Q"):
        model = nn.Sequential(blocks_of(weight, GGMLType[kind], bias))
        assert keep_blocks(model) == ["0"]
        layer = model[0]
    else:
        layer = quantized(weight, kind, bias)
    dense = dense_weight(layer)
    x_TI = torch.randn(5, 32)
    assert torch.equal(layer(x_TI), F.linear(x_TI, dense) + bias)
    low = layer(x_TI.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, F.linear(x_TI.bfloat16(), dense.bfloat16()) + bias.bfloat16())
    assert torch.autograd.gradcheck(layer, [x_TI.double().requires_grad_()])
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("kind", [*KINDS, "Q8_0"])
def test_the_numbers_are_not_kept_for_the_way_back(kind: str) -> None:
    weight = torch.randn(96, 64)
    layer = (
        BlocksLinear(blocks_of(weight, GGMLType.Q8_0).quantized, None) if kind == "Q8_0" else quantized(weight, kind)
    )
    x_TI = torch.randn(3, 64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        y_TO = layer(x_TI)
        assert sum(kept) == 0
        F.linear(x_TI, dense_weight(layer))
        assert max(kept) == weight.numel()  # which the plain product does keep
    y_TO.sum().backward()
    assert torch.allclose(x_TI.grad, dense_weight(layer).sum(0).expand(3, -1), atol=1e-4)


def make_model(*, experts: bool = False) -> CausalLM:
    torch.manual_seed(0)
    dense = FeedForwardConfig(hidden=64, activation="silu", gated=True)
    layer = LayerConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=8, rotary=RotaryConfig(dims=8), bias=("q", "k", "v")),
        feedforward=ExpertsConfig(count=3, per_token=2, expert=dense) if experts else dense,
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=32, layers=(layer,) * 2, final_norm=layer.norm)
    return CausalLM(CausalLMConfig(vocab=50, context=64, trunk=trunk, tied=True))


def logits(model: CausalLM) -> Tensor:
    return model(torch.arange(12), torch.arange(12))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_under_an_adapter(kind: str, experts: bool) -> None:
    model = make_model(experts=experts)
    errors = quantize_base(model, kind)
    assert base_kind(model) == kind
    assert all(0.03 < error < 0.15 for error in errors.values())
    left = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert left == {"head"} | ({f"trunk.layers.{n}.feedforward.router" for n in range(2)} if experts else set())
    base = logits(model)
    packed = {name: tensor.clone() for name, tensor in model.named_buffers()}
    apply_lora(model, LoraSettings(rank=4, dora=not experts))
    assert torch.allclose(logits(model), base, atol=1e-5)
    optimiser = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)
    for _ in range(2):  # with the second step A moves as well
        optimiser.zero_grad()
        logits(model).square().mean().backward()
        optimiser.step()
    first = [p for name, p in adapter_parameters(model).items() if "layers.0.attention.q" in name]
    assert all(parameter.grad.any() for parameter in first)
    with disabled(model):
        assert torch.equal(logits(model), base)
    buffers = dict(model.named_buffers())
    assert all(
        torch.equal(buffers[name.replace(".packed", ".base.packed")], tensor)
        for name, tensor in packed.items()
        if name.endswith(".packed")
    )


def test_a_plain_model_has_no_kind_and_wrong_ones_are_named() -> None:
    model = make_model()
    assert base_kind(model) is None
    with pytest.raises(UnknownName, match="'nf5'"):
        quantize_base(model, "nf5")
    assert base_kind(model) is None
    quantize_base(model, "int4")
    with pytest.raises(UsageError, match="no plain weight"):
        quantize_base(model, "nf4")


def test_a_layer_loaded_from_its_state_is_the_same() -> None:
    first, second = quantized(torch.randn(8, 64), "nf4-double"), quantized(torch.randn(8, 64), "nf4-double")
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.dequantize(), second.dequantize())


def test_training_on_a_published_file_s_own_blocks(smollm2_gguf) -> None:
    checkpoint = Checkpoint.open(smollm2_gguf)
    model = checkpoint.load(torch.float32, packed=True)
    ids_T = torch.tensor(checkpoint.tokenizer().encode("The capital of France is"))
    positions_T = torch.arange(len(ids_T))
    with torch.no_grad():
        before = model(ids_T, positions_T)
    apply_lora(model, LoraSettings(rank=2, targets=("layers.0.attention.q", "layers.29.*.v")))
    assert base_kind(model) == "Q4_1"
    assert not any(type(module) is QuantizedLinear for module in model.modules())
    loss = F.cross_entropy(model(ids_T, positions_T)[:-1], ids_T[1:])
    loss.backward()
    expected = F.cross_entropy(before[:-1], ids_T[1:])
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    grads = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert all(grad.any() for name, grad in grads.items() if name.endswith(".b"))
    assert type(model.head) is BlocksLinear
    assert isinstance(model.trunk.layers[1].attention.q, BlocksLinear)
    assert not isinstance(model.trunk.layers[1].attention.q, Linear)
