"""Rotary positions: every scaling against transformers, and what a rotation must do to queries and keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from craton.checkpoints.families.family import Keys, read_rotary
from craton.trunk import RotaryConfig, RotaryScaling
from craton.trunk.positions import Rotary, inverse_frequencies

FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3, other bounds": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 2.5,
        "original_max_position_embeddings": 200,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, factor from the contexts": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    "yarn, whole context": {"rope_type": "yarn", "factor": 4.0},
    "yarn, not rounded": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
    },
    "yarn, own bounds": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8,
        "beta_slow": 2,
    },
    "yarn, bounds that meet": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 2.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn, mscale alone": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.7,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64} | FACTORS,
    "longrope, factor": {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 9.0} | FACTORS,
    "longrope, attention factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    }
    | FACTORS,
}


@pytest.mark.peer
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_frequencies_are_those_of_transformers(scaling, theta):
    transformers = pytest.importorskip("transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    values = {"max_position_embeddings": 512, "head_dim": 32, "rope_parameters": scaling | {"rope_theta": theta}}
    ours = read_rotary(Keys(values, "config.json"), 32)
    assert ours.scaling is not None
    config = transformers.LlamaConfig(**values)
    for length, long in ((None, False), (65, True)):
        expected, attention_factor = functions[scaling["rope_type"]](config, "cpu", seq_len=length)
        torch.testing.assert_close(inverse_frequencies(ours, long), expected, rtol=1e-5, atol=0)
        assert ours.scaling.attention_factor == pytest.approx(attention_factor)


def rotate(config: RotaryConfig, x_TK: Tensor, positions: list[int], lengths: list[int] | None = None) -> Tensor:
    """Each row of x at its position, in a sequence of its length."""
    lengths_T = torch.tensor(lengths or [p + 1 for p in positions])
    return Rotary(config, torch.tensor(positions), lengths_T, x_TK.dtype).apply(x_TK[:, None])[:, 0]


CONFIGS = [
    RotaryConfig(dims=16),
    RotaryConfig(dims=16, interleaved=True, theta=100.0),
    RotaryConfig(dims=8, scaling=RotaryScaling(kind="linear", factor=4.0)),
    RotaryConfig(dims=8, interleaved=True),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_only_the_distance_between_query_and_key_counts(config):
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def score(query_at: int, key_at: int) -> float:
        rotated = rotate(config, torch.stack((query, key)), [query_at, key_at])
        return float(rotated[0] @ rotated[1])

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 2), rel=1e-3)


@pytest.mark.parametrize("config", CONFIGS)
def test_position_0_and_the_dims_that_do_not_rotate_stay(config):
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    rotated = rotate(config, x, [0, 9])
    assert torch.equal(rotated[0], x[0])
    assert torch.equal(rotated[1, config.dims :], x[1, config.dims :])
    assert not torch.isclose(rotated[1, : config.dims], x[1, : config.dims]).any()


def test_interleaved_pairs_are_the_halves_in_another_order():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    order = torch.arange(16).view(2, 8).T.flatten()  # 0, 8, 1, 9, ..
    halves = rotate(RotaryConfig(dims=16), x, [1, 5, 30])
    pairs = rotate(RotaryConfig(dims=16, interleaved=True), x[:, order], [1, 5, 30])
    torch.testing.assert_close(pairs, halves[:, order])


def test_longrope_looks_at_the_length_of_each_tokens_own_sequence():
    scaling = RotaryScaling(
        kind="longrope", original_context=8, attention_factor=1.5, short_factors=(1.0, 1.0), long_factors=(2.0, 2.0)
    )
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).expand(3, 4)
    rotated = rotate(RotaryConfig(dims=4, scaling=scaling), x, [6, 6, 3], lengths=[8, 9, 8])
    torch.testing.assert_close(rotated[0], 1.5 * rotate(RotaryConfig(dims=4), x[:1], [6])[0])
    torch.testing.assert_close(rotated[1], rotated[2])  # 6 / 2 = 3


def test_half_precision_tables_come_from_fp32_angles():
    config, positions = RotaryConfig(dims=8, theta=500_000.0), torch.tensor([0, 1, 4097, 131_071])
    half = Rotary(config, positions, positions + 1, torch.bfloat16)
    angles = positions.double()[:, None] * (500_000.0 ** (-torch.arange(0, 8, 2).double() / 8))
    expected = torch.cat((angles, angles), -1).cos()
    assert (half.cos[:, 0].double() - expected).abs().max() < 2**-8  # the rounding of bfloat16 and no more
    # In bfloat16 the position itself would be lost: 4097 and 4096 are one number there.
    assert torch.tensor(4097.0).bfloat16() == 4096
