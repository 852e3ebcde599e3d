"""The quantised linear layer: right numbers, the same bits however it is computed, NaN where NaN went in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from craton.errors import UnknownName, UsageError
from craton.inference import native
from craton.inference.native import library
from craton.inference.native.packed import FORMATS

pytestmark = pytest.mark.usefixtures("kernels")

M = [0, 1, 2, 3, 5, 8, 17, 64]


def quantize_activations(x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """x as the kernels see it, in one or two parts of 8 bits, and the finest step of its group; both fp64 [m, k]."""
    groups = x.float().reshape(x.shape[0], x.shape[1] // 32, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    levels = torch.full_like(largest, 127)  # a tensor: torch divides by, and of, a plain number inexactly
    scale = largest / levels
    inverse = torch.where(largest > 0, levels / largest, 0.0)
    quants = torch.round(groups * inverse)
    seen = quants.double() * scale.double()
    if parts == 2:
        left = groups - quants * scale
        finer = scale / torch.full_like(scale, 254)
        seen = seen + torch.round(left * (inverse * 254)).double() * finer.double()
        scale = finer
    return seen.reshape(x.shape), scale.double().expand_as(groups).reshape(x.shape)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 96), (40, 576), (33, 1536)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2])
def test_it_multiplies(make_blocks, kind, n, k, dtype, parts):
    blocks, meaning = make_blocks(kind, n, k)
    weight = native.PackedWeight.from_gguf_blocks(kind, blocks)
    bias = torch.randn(n)
    for m in M:
        x = torch.randn(m, k).to(dtype)
        y = native.linear(x, weight, bias, out=torch.empty(m, n), parts=parts)
        seen, step = quantize_activations(x, parts)

        # Against the same rounded activations: only the order and rounding of fp32 sums may differ.
        exact = seen @ meaning.double().T + bias
        size = seen.abs() @ meaning.double().abs().T + bias.abs()
        assert ((y - exact).abs() <= 2e-6 * size + 1e-30).all()

        # Against full precision: each activation moved by at most half a step.
        full = x.double() @ meaning.double().T + bias
        assert ((y - full).abs() <= 0.51 * step @ meaning.double().abs().T + 2e-6 * size).all()

        in_own_type = native.linear(x, weight, bias, parts=parts)
        assert in_own_type.dtype == dtype
        assert torch.equal(in_own_type, y.to(dtype))


@pytest.mark.skipif(not library.has_tiles(), reason="this CPU has no matrix unit that the kernels can use")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 96), (40, 576), (33, 1536)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_multiplies_in_bfloat16(make_blocks, kind, n, k, dtype):
    blocks, meaning = make_blocks(kind, n, k)
    weight, bias = native.PackedWeight.from_gguf_blocks(kind, blocks), torch.randn(n)
    rounded = meaning.float().bfloat16().double()
    x = torch.randn(300, k).to(dtype)
    whole = native.linear(x, weight, bias, out=torch.empty(300, n), parts=0)
    exact = x.bfloat16().double() @ rounded.T + bias
    size = x.double().abs() @ rounded.abs().T + bias.abs()
    assert ((whole - exact).abs() <= 2e-6 * size + 1e-30).all()
    for m in M:
        piece = native.linear(x[300 - m :], weight, bias, parts=0, threads=3)
        assert torch.equal(piece, whole[300 - m :].to(dtype))
    x[7, 5] = math.nan
    assert native.linear(x, weight, bias, parts=0).isnan().any(1).nonzero().flatten().tolist() == [7]


def test_a_vocabulary_sized_weight(make_blocks):
    blocks, meaning = make_blocks("Q4_0", 49152, 96)
    x = torch.randn(3, 96)
    y = native.linear(x, native.PackedWeight.from_gguf_blocks("Q4_0", blocks))
    assert torch.allclose(y, x @ meaning.T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, make_blocks, kind, dtype, parts):
    weight = native.PackedWeight.from_gguf_blocks(kind, make_blocks(kind, 49, 96)[0])
    x = torch.randn(64, 96).to(dtype)
    together = native.linear(x, weight, parts=parts)
    for m in M:
        assert torch.equal(native.linear(x[:m], weight, parts=parts), together[:m])
        assert torch.equal(native.linear(x[64 - m :], weight, parts=parts), together[64 - m :])
    alone = torch.cat([native.linear(row[None], weight, parts=parts) for row in x])
    assert torch.equal(alone, together)


def test_more_rows_than_are_quantised_at_once(make_blocks):
    weight = native.PackedWeight.from_gguf_blocks("Q4_1", make_blocks("Q4_1", 17, 1536)[0])
    x = torch.randn(601, 1536)
    pieces = torch.cat([native.linear(piece, weight) for piece in x.split(100)])
    assert torch.equal(native.linear(x, weight), pieces)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("m", [1, 7, 40])
def test_the_result_does_not_depend_on_threads(make_blocks, kind, m):
    weight = native.PackedWeight.from_gguf_blocks(kind, make_blocks(kind, 2000, 576)[0])
    x = torch.randn(m, 576)
    alone = native.linear(x, weight, threads=1)
    for threads in (2, 3, 7, 1000):
        assert torch.equal(native.linear(x, weight, threads=threads), alone)


@given(
    kind=st.sampled_from(sorted(FORMATS)),
    n=st.integers(1, 70),
    groups=st.integers(1, 9),
    m=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    parts=st.sampled_from([1, 2]),
    scale=st.sampled_from([1e-36, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_instruction_set_gives_the_same_bits(make_blocks, kind, n, groups, m, dtype, parts, scale, seed):
    weight = native.PackedWeight.from_gguf_blocks(kind, make_blocks(kind, n, groups * 32, seed)[0])
    x = (torch.randn(m, groups * 32, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    results = []
    for name in library.ISAS:
        try:
            library.select_isa(name)
        except UnknownName:
            continue
        results.append(native.linear(x, weight, parts=parts).view(torch.int16))
    assert all(torch.equal(result, results[-1]) for result in results)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_bad_value_makes_its_row_nan_and_no_other(isa, make_blocks, kind, dtype, bad):
    weight = native.PackedWeight.from_gguf_blocks(kind, make_blocks(kind, 33, 96)[0])
    x = torch.randn(11, 96).to(dtype)
    clean = native.linear(x, weight)
    for row, column in ((0, 0), (4, 50), (10, 95)):
        spoilt = x.clone()
        spoilt[row, column] = bad
        y = native.linear(spoilt, weight)
        assert y[row].isnan().all()
        others = torch.arange(11) != row
        assert torch.equal(y[others], clean[others])


def test_extreme_but_finite_activations(isa, make_blocks):
    blocks, meaning = make_blocks("Q4_0", 16, 32)
    weight = native.PackedWeight.from_gguf_blocks("Q4_0", blocks)
    assert torch.equal(native.linear(torch.zeros(2, 32), weight), torch.zeros(2, 16))
    assert torch.equal(native.linear(torch.full((1, 32), 1e-40), weight), torch.zeros(1, 16))
    for size in (1e-29, 1e36):
        x = torch.full((1, 32), size)
        assert torch.allclose(native.linear(x, weight) / size, meaning.sum(1)[None], rtol=1e-4, atol=1e-4)


def test_strided_activations_and_results(make_blocks):
    weight = native.PackedWeight.from_gguf_blocks("Q8_0", make_blocks("Q8_0", 20, 64)[0])
    wide = torch.randn(6, 200)
    x = wide[::2, 30:94]
    expected = native.linear(x.contiguous(), weight)
    assert torch.equal(native.linear(x, weight), expected)
    assert torch.equal(native.linear(x.T.contiguous().T, weight), expected)
    assert torch.equal(native.linear(x[:1].expand(4, 64), weight), expected[:1].expand(4, 20))

    around = torch.full((3, 30), 7.0)
    assert native.linear(x, weight, out=around[:, 4:24]).data_ptr() == around[:, 4:24].data_ptr()
    assert torch.equal(around[:, 4:24], expected)
    assert (around[:, :4] == 7).all()
    assert (around[:, 24:] == 7).all()


def test_tensors_that_do_not_fit_are_refused(make_blocks):
    weight = native.PackedWeight.from_gguf_blocks("Q4_0", make_blocks("Q4_0", 20, 64)[0])
    x = torch.randn(3, 64)
    for wrong in (torch.randn(3, 32), torch.randn(64), torch.randn(1, 3, 64), x.half(), x.to("meta")):
        with pytest.raises(UsageError, match=r"multiplies fp32 or bf16 \[m, 64\]"):
            native.linear(wrong, weight)
    for wrong in (torch.randn(19), torch.randn(20).bfloat16(), torch.randn(40)[::2]):
        with pytest.raises(UsageError, match="the bias is"):
            native.linear(x, weight, wrong)
    for wrong in (torch.empty(3, 19), torch.empty(3, 20).half(), torch.empty(20, 3).T, torch.empty(3, 20, 1)):
        with pytest.raises(UsageError, match="the result is"):
            native.linear(x, weight, out=wrong)
