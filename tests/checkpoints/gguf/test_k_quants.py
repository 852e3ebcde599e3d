"""The search behind Q4_K and Q6_K."""

from __future__ import annotations

import numpy as np
import pytest

from craton.checkpoints.gguf import GGMLType, dequantize, quantize

K_TYPES = [GGMLType.Q4_K, GGMLType.Q6_K]


def normal(rows: int = 64, scale: float = 0.03) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((rows, 512)) * scale).astype(np.float32)


def error(values: np.ndarray, type: GGMLType) -> float:
    off = dequantize(quantize(values, type), type) - values
    return float(np.sqrt((off**2).mean() / (values**2).mean()))


def test_more_bits_or_a_better_choice_is_a_smaller_error():
    values = normal()
    errors = [error(values, type) for type in (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q4_K, GGMLType.Q5_0)]
    assert errors == sorted(errors, reverse=True)
    assert error(values, GGMLType.Q4_K) < 0.074
    assert error(values, GGMLType.Q6_K) < 0.0185


@pytest.mark.peer
@pytest.mark.parametrize("type", [*K_TYPES, GGMLType.Q4_1, GGMLType.Q5_0])
def test_the_gguf_package_reads_the_same_numbers(type):
    gguf = pytest.importorskip("gguf")
    blocks = quantize(normal(), type)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type.name])
    np.testing.assert_array_equal(dequantize(blocks, type), theirs)


@pytest.mark.peer
@pytest.mark.parametrize("type", [GGMLType.Q4_1, GGMLType.Q5_0])
def test_the_simple_types_are_ggml_s_own_blocks(type):
    gguf = pytest.importorskip("gguf")
    theirs = gguf.quants.quantize(normal(), gguf.GGMLQuantizationType[type.name]).view(np.uint8)
    np.testing.assert_array_equal(quantize(normal(), type), theirs)


@pytest.mark.parametrize("type", K_TYPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_no_weight_is_far_off(type, scale):
    # Within the step of its group, as wide as the group's range allows.
    values = normal(scale=scale)
    off = np.abs(dequantize(quantize(values, type), type) - values)
    size = 32 if type is GGMLType.Q4_K else 16
    groups = values.reshape(-1, size)
    steps = np.abs(groups).max(1) / 32 if type is GGMLType.Q6_K else np.ptp(groups, axis=1) / 15
    assert (off.reshape(-1, size).max(1) <= 1.1 * steps + 0.002 * np.abs(values).max()).all()


@pytest.mark.parametrize("type", K_TYPES)
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_equal_weights_stay_equal(type, value):
    values = np.full((1, 256), value, np.float32)
    back = dequantize(quantize(values, type), type)
    np.testing.assert_allclose(back, values, rtol=2e-2)
    assert np.ptp(back) == 0


@pytest.mark.parametrize("type", K_TYPES)
def test_a_group_of_zeros_among_others(type):
    values = normal(1)
    values[0, 32:64] = 0
    back = dequantize(quantize(values, type), type)
    assert not back[0, 32:64].any()
    assert back[0, :32].any()


@pytest.mark.parametrize("type", K_TYPES)
def test_weights_that_fp16_hardly_tells_apart_do_not_overflow(type):
    for scale in (1e-9, 1e-30):
        values = normal(1, scale)
        assert np.abs(dequantize(quantize(values, type), type)).max() <= 2 * np.abs(values).max()
