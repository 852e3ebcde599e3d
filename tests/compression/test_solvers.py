"""Each method's codes on a random layer: GPTQ and SparseGPT against an exact dense solver, the others never worse than
rounding to nearest in what they minimise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from craton.compression.awq import output_error, quantize_awq, search_scales
from craton.compression.blocks import Inputs
from craton.compression.gptq import quantize_gptq
from craton.compression.grids import Form, find_grid, grouped
from craton.compression.hessian import DAMPING, importance, inverse_factor
from craton.compression.hqq import objective, quantize_hqq
from craton.compression.rtn import quantize_rtn
from craton.compression.sparsity import (
    Pattern,
    parse_pattern,
    prune_magnitude,
    prune_sparsegpt,
    prune_wanda,
)
from craton.errors import DataError, UsageError

FORMS = [Form(bits, 32, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def layer(rows: int = 24, columns: int = 96, seed: int = 0) -> tuple[Tensor, Inputs]:
    """A weight, and what it read: correlated inputs, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(columns, columns, generator=generator) / columns**0.5
    x_TI = torch.randn(512, columns, generator=generator) @ mix_II
    x_TI *= torch.rand(columns, generator=generator).pow(4) * 8 + 0.2
    inputs = Inputs(columns, gram=True)
    for part in x_TI.split(100):
        inputs.add(part)
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs


def damped(gram_II: Tensor) -> Tensor:
    gram_II = gram_II.double()
    return gram_II + DAMPING * gram_II.diagonal().mean() * torch.eye(len(gram_II), dtype=torch.float64)


def test_the_statistics_are_those_of_all_tokens() -> None:
    x_TI = torch.randn(300, 16)
    inputs = Inputs(16, gram=True)
    for part in x_TI.split(77):
        inputs.add(part)
    assert inputs.tokens == 300
    torch.testing.assert_close(inputs.gram, x_TI.T @ x_TI / 300)
    torch.testing.assert_close(inputs.square, x_TI.square().mean(0))
    torch.testing.assert_close(inputs.magnitude, x_TI.abs().mean(0))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_and_zeros_are_within_the_bits(form: Form) -> None:
    weight_OI, inputs = layer()
    for made in (
        quantize_rtn(weight_OI, form),
        quantize_gptq(weight_OI, form, inputs),
        quantize_awq(weight_OI, form, inputs),
        quantize_hqq(weight_OI, form),
    ):
        assert made.codes_OI.min() >= form.low
        assert made.codes_OI.max() <= form.high
        assert (made.zeros_OG is None) == form.symmetric
        if made.zeros_OG is not None:
            assert made.zeros_OG.min() >= form.low
            assert made.zeros_OG.max() <= form.high
        assert made.shape == tuple(weight_OI.shape)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_search_of_a_grid_beats_the_full_range(form: Form) -> None:
    weight_OI, _ = layer()
    w_OGK = grouped(weight_OI, 32)
    lows, highs = w_OGK.aminmax(dim=-1)
    if form.symmetric:
        scale = torch.maximum(-lows, highs)[..., None] / form.high
        plain = (w_OGK / scale).round() * scale
    else:
        low = lows.clamp(max=0)[..., None]
        scale = (highs.clamp(min=0)[..., None] - low) / (form.high - form.low)
        zero = (-low / scale).round()
        plain = ((w_OGK / scale).round() + zero).clamp(0, form.high - form.low) * scale - zero * scale
    found = find_grid(w_OGK, form).nearest(w_OGK)
    # fp16 scales may cost a little where nothing is searched
    assert (found - w_OGK).square().sum() <= (plain - w_OGK).square().sum() * (1.02 if form.bits == 8 else 1.0)


def test_a_group_of_zeros_or_of_one_value_is_exact() -> None:
    weight_OI = torch.zeros(2, 64)
    weight_OI[1] = 0.125
    for form in FORMS:
        made = quantize_rtn(weight_OI, form).dequantize()
        assert made[0].abs().max() == 0
        torch.testing.assert_close(made[1], weight_OI[1], rtol=1e-3, atol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(FORMS))
def test_hqq_is_never_worse_than_rounding_in_its_own_norm(seed: int, form: Form) -> None:
    weight_OI, _ = layer(8, 64, seed)
    ours, plain = (
        objective(grouped(weight_OI - made.dequantize(), 32))
        for made in (quantize_hqq(weight_OI, form), quantize_rtn(weight_OI, form))
    )
    assert (ours <= plain * (1 + 1e-4)).all()


def test_hqq_gains_where_there_are_zeros() -> None:
    weight_OI, _ = layer(64, 128)
    form = Form(3, 64, symmetric=False)
    ours, plain = (
        float(objective(grouped(weight_OI - made.dequantize(), 64)).sum())
        for made in (quantize_hqq(weight_OI, form), quantize_rtn(weight_OI, form))
    )
    assert ours < 0.999 * plain


def obq(weight_OI: Tensor, gram_II: Tensor, form: Form, order: list[int], importance_I: Tensor) -> Tensor:
    """Optimal brain quantisation in a given order, the inverse of what is left computed anew for every column."""
    w_OGK = grouped(weight_OI, form.group)
    grid = find_grid(w_OGK, form, grouped(importance_I[None], form.group)[0])
    size = w_OGK.shape[2]
    rest_OI, hessian_II = weight_OI.double().clone(), damped(gram_II)
    left = list(order)
    while left:
        inverse = torch.linalg.inv(hessian_II[left][:, left])
        column, group = left[0], left[0] // size
        scale, zero = grid.scales_OG[:, group].double(), grid.zeros_OG[:, group].double()
        codes_O = ((rest_OI[:, column] / scale).round() + zero).clamp(form.low, form.high)
        fixed_O = (codes_O - zero) * scale
        error_O = (rest_OI[:, column] - fixed_O) / inverse[0, 0]
        rest_OI[:, left] -= error_O[:, None] * inverse[0]
        rest_OI[:, column] = fixed_O
        left = left[1:]
    return rest_OI


@pytest.mark.parametrize("form", [Form(4, 32, True), Form(3, 32, False), Form(2, 64, False)], ids=str)
def test_gptq_is_what_the_exact_solver_gives(form: Form) -> None:
    weight_OI, inputs = layer(24, 192 if form.group == 64 else 160)  # more than one block of columns
    order = inputs.gram.diagonal().argsort(descending=True, stable=True).tolist()
    exact_OI = obq(weight_OI, inputs.gram, form, order, importance(inputs.gram))
    made_OI = quantize_gptq(weight_OI, form, inputs).dequantize().double()
    same = (made_OI - exact_OI).abs() < 1e-6
    assert same.float().mean() > 0.995  # a rounding at a tie may fall to the other side, and what follows with it
    gram_II = damped(inputs.gram).float()
    ours, theirs, plain = (
        output_error(weight_OI - other.float(), gram_II)
        for other in (made_OI, exact_OI, quantize_rtn(weight_OI, form).dequantize())
    )
    assert ours == pytest.approx(theirs, rel=0.01)
    assert ours < 0.8 * plain


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    weight_OI, _ = layer()
    x_TI = torch.randn(200, 96)
    x_TI[:, 5] = 0
    silent = Inputs(96, gram=True)
    silent.add(x_TI)
    made_OI = quantize_gptq(weight_OI, Form(4, 32, True), silent).dequantize()
    assert made_OI.isfinite().all()
    torch.testing.assert_close(made_OI[:, 5], weight_OI[:, 5], rtol=0, atol=0.05)
    assert quantize_gptq(weight_OI, Form(4, 32, True), None).dequantize().isfinite().all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    inputs = Inputs(8, gram=True)
    inputs.add(torch.full((4, 8), float("nan")))
    with pytest.raises(DataError, match="second moments"):
        inverse_factor(inputs.gram)


@pytest.mark.parametrize("form", [Form(4, 32, True), Form(3, 32, False)], ids=str)
def test_awq_is_never_worse_than_rounding_and_gains_where_inputs_differ(form: Form) -> None:
    weight_OI, inputs = layer()
    plain = output_error(weight_OI - quantize_rtn(weight_OI, form).dequantize(), inputs.gram)
    clipped = output_error(weight_OI - quantize_awq(weight_OI, form, inputs).dequantize(), inputs.gram)
    scales_I = search_scales([weight_OI], [form], inputs)
    made = quantize_awq(weight_OI * scales_I, form, inputs.divided(scales_I))
    scaled = output_error(weight_OI - made.dequantize() / scales_I, inputs.gram)
    assert clipped <= plain
    assert scaled < 0.95 * plain


# --- pruning ------------------------------------------------------------------------------------------------------


def exact_sparsegpt(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
    """SparseGPT with the inverse computed anew for every column, for layers of one block."""
    columns = weight_OI.shape[1]
    rest_OI, hessian_II = weight_OI.double().clone(), damped(gram_II)
    curvature_I = torch.stack([torch.linalg.inv(hessian_II[i:, i:])[0, 0] for i in range(columns)])
    gone_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    span = pattern.of or columns
    for i in range(columns):
        if i % span == 0:
            score = rest_OI[:, i : i + span].square() / curvature_I[i : i + span]
            if pattern.of:
                chosen = score.argsort(dim=1, stable=True)[:, : pattern.zeros]
                gone_OI[:, i : i + span] = torch.zeros_like(score, dtype=torch.bool).scatter(1, chosen, True)
            else:
                order = score.flatten().argsort(stable=True)[: round(pattern.share * score.numel())]
                mask = torch.zeros(score.numel(), dtype=torch.bool)
                mask[order] = True
                gone_OI[:, i : i + span] = mask.view_as(score)
        inverse = torch.linalg.inv(hessian_II[i:, i:])
        fixed_O = rest_OI[:, i].masked_fill(gone_OI[:, i], 0)
        error_O = (rest_OI[:, i] - fixed_O) / inverse[0, 0]
        rest_OI[:, i:] -= error_O[:, None] * inverse[0]
        rest_OI[:, i] = fixed_O
    return rest_OI


@pytest.mark.parametrize("text", ["0.5", "2:4", "4:8"])
def test_sparsegpt_is_what_the_exact_solver_gives(text: str) -> None:
    weight_OI, inputs = layer(16, 64)
    pattern = parse_pattern(text)
    exact_OI = exact_sparsegpt(weight_OI, inputs.gram, pattern).float()
    made_OI = prune_sparsegpt(weight_OI, pattern, inputs)
    torch.testing.assert_close(made_OI, exact_OI, rtol=1e-3, atol=1e-4)
    errors = [
        output_error(weight_OI - other_OI, inputs.gram)
        for other_OI in (made_OI, prune_wanda(weight_OI, pattern, inputs), prune_magnitude(weight_OI, pattern))
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("prune", [prune_magnitude, prune_wanda, prune_sparsegpt])
def test_patterns_are_exact(prune: object) -> None:
    weight_OI, inputs = layer(24, 128)
    for text, of, zeros in (("2:4", 4, 2), ("4:8", 8, 4), ("1:4", 4, 3)):
        made_OI = prune(weight_OI, parse_pattern(text), inputs)  # type: ignore[operator]
        assert ((made_OI == 0).view(-1, of).sum(1) == zeros).all()
    made_OI = prune(weight_OI, parse_pattern("0.3"), inputs)  # type: ignore[operator]
    assert int((made_OI == 0).sum()) == pytest.approx(0.3 * weight_OI.numel(), abs=24)


def test_wanda_takes_the_least_products_of_each_output() -> None:
    weight_OI, inputs = layer(6, 32)
    made_OI = prune_wanda(weight_OI, Pattern(0.25), inputs)
    score_OI = weight_OI.abs() * inputs.square.sqrt()
    for row, score in zip(made_OI, score_OI, strict=True):
        assert set((row == 0).nonzero().flatten().tolist()) == set(score.argsort()[:8].tolist())


@pytest.mark.parametrize("text", ["0", "1", "1.5", "4:2", "2:3", "0:4", "half", "2:64"])
def test_what_is_no_sparsity_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no sparsity"):
        parse_pattern(text)
