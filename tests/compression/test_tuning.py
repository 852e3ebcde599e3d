"""Roundings and scales trained by what a block gives."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.int_weight import IntWeight
from craton.compression.blocks import Stream, in_fp32, linear_names, weight_of
from craton.compression.gptq import quantize_gptq
from craton.compression.grids import Form
from craton.compression.rtn import quantize_rtn
from craton.compression.tuning import TunedLinear, tune_block
from craton.models import CausalLM, build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import causal_config
from craton.pretraining.sizing import SizeOverrides, size
from craton.trunk.block import Block


@pytest.fixture(scope="module")
def model() -> CausalLM:
    shape = SizeOverrides(width=64, layers=1, heads=2, kv_heads=1, hidden=128)
    built = build(causal_config(size("0.1m", vocab=288, context=64, overrides=shape), 288, 64))
    assert isinstance(built, CausalLM)
    initialise(built, 0)
    return built.requires_grad_(False).eval()


def error(block: Block, weights: dict[str, IntWeight], read: Stream, wanted: Stream) -> float:
    rounded = in_fp32(block)
    for name, weight in weights.items():
        rounded.get_submodule(name).weight.data = weight.dequantize()
    out = read.copy()
    out.advance(rounded, 0)
    return float((out.hidden_TD - wanted.hidden_TD).square().mean())


@pytest.mark.parametrize("form", [Form(4, 32, True), Form(3, 32, False), Form(2, 64, False)])
def test_the_block_comes_nearer_to_what_it_gave(model, form):
    ids_NT = torch.randint(0, 288, (136, 32), generator=torch.Generator().manual_seed(0))
    block = in_fp32(model.trunk.layers[0])
    read = Stream(model, ids_NT[:128])
    wanted = read.copy()
    wanted.advance(block, 0)
    start = {name: quantize_rtn(weight_of(block, name), form) for name in linear_names(block)}
    tuned = tune_block(block, 0, start, read, wanted, 120)
    assert error(block, tuned, read, wanted) < 0.8 * error(block, start, read, wanted)
    # And on text that it was not trained with.
    other = Stream(model, ids_NT[128:])
    after = other.copy()
    after.advance(block, 0)
    assert error(block, tuned, other, after) < 0.9 * error(block, start, other, after)
    for name, weight in tuned.items():
        assert (weight.bits, weight.group) == (form.bits, form.group)
        assert weight.codes_OI.min() >= form.low
        assert weight.codes_OI.max() <= form.high
        assert (weight.zeros_OG is None) == form.symmetric
        assert not torch.equal(weight.codes_OI, start[name].codes_OI)
    again = tune_block(block, 0, start, read, wanted, 120)
    assert all(torch.equal(again[name].codes_OI, weight.codes_OI) for name, weight in tuned.items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_step_changes_nothing_whatever_the_beginning(model, symmetric):
    block = in_fp32(model.trunk.layers[0])
    read = Stream(model, torch.randint(0, 288, (8, 32)))
    inputs = read.observe(block, 0, linear_names(block), gram=True)
    for name in linear_names(block):
        start = quantize_gptq(weight_of(block, name), Form(4, 32, symmetric), inputs[name])
        result = TunedLinear(block.get_submodule(name), start).result()
        assert torch.equal(result.codes_OI, start.codes_OI)
        assert torch.equal(result.scales_OG, start.scales_OG)
