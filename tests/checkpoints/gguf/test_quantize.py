import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from craton.checkpoints.gguf import GGMLType, dequantize, quantize
from craton.checkpoints.gguf.quantize import _CHUNK_VALUES
from craton.errors import CheckpointError, UsageError

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0"]


def assert_as_the_peer(values: np.ndarray, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(quantize(values, GGMLType[name]), theirs)


@pytest.mark.peer
@pytest.mark.parametrize("name", TYPES)
def test_every_bit_equals_the_peers(name: str) -> None:
    rng = np.random.default_rng(3)
    rows = _CHUNK_VALUES // 64 + 5  # more than one chunk
    values = rng.normal(size=(rows, 64)).astype(np.float32) * np.exp2(rng.integers(-20, 12, (rows, 1))).astype(
        np.float32
    )
    assert_as_the_peer(values, name)


@pytest.mark.peer
@pytest.mark.parametrize("name", TYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_bit_equals_the_peers_on_hard_values(name: str, data: st.DataObject) -> None:
    # Ties, zeros of both signs, repeated extremes. Not the tiny ones, on which the peer overflows: see below.
    sizes = st.floats(2.0**-80, 2.0**15, width=32) | st.sampled_from([0.0, 0.5, 1.0, 1.5, 63.5, 127.0])
    elements = st.builds(lambda size, sign: size * sign, sizes, st.sampled_from([1.0, -1.0]))
    values = data.draw(npst.arrays(np.float32, (2, 32), elements=elements))
    assert_as_the_peer(values, name)


def test_q8_0_rounds_ties_away_from_zero() -> None:
    values = np.zeros((1, 32), np.float32)
    # 127 makes the scale 1. The last is the largest number below a half.
    values[0, :7] = [127, 0.5, 1.5, 2.5, -0.5, -2.5, 0.49999997]
    assert quantize(values, GGMLType.Q8_0)[0, 2:9].view(np.int8).tolist() == [127, 1, 2, 3, -1, -3, 0]


def test_bf16_rounds_ties_to_even() -> None:
    step = 2.0**-7  # between the numbers from 1 to 2
    values = np.array([[1 + 0.5 * step, 1 + 1.5 * step, -1 - 2.5 * step, 1 + 0.501 * step]], np.float32)
    back = dequantize(quantize(values, GGMLType.BF16), GGMLType.BF16)
    assert back.tolist() == [[1.0, 1 + 2 * step, -1 - 2 * step, 1 + step]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type", [GGMLType.Q8_0, GGMLType.Q4_0])
def test_values_too_small_for_a_scale_become_zero(type: GGMLType) -> None:
    values = np.full((1, 32), 1e-40, np.float32)
    assert not dequantize(quantize(values, type), type).any()


@given(npst.arrays(np.float32, (3, 64), elements=st.floats(-1000, 1000, width=32)))
@settings(max_examples=60, deadline=None)
def test_q8_0_is_off_by_half_a_step_at_most(values: np.ndarray) -> None:
    back = dequantize(quantize(values, GGMLType.Q8_0), GGMLType.Q8_0)
    largest = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True)
    # Half a step, and the rounding of the scale to float16 (relative 2^-11; 2^-25 where it is subnormal), 127 times.
    allowed = largest / 127 / 2 + largest * 2.0**-11 + 127 * 2.0**-25
    assert (np.abs(back - values).reshape(-1, 32) <= allowed * 1.001).all()


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.F16, GGMLType.BF16])
def test_what_a_float_type_holds_comes_back(type: GGMLType) -> None:
    values = np.array([[0.0, -0.0, 1.0, -2.5, 0.15625, 240.0]], np.float32)
    assert dequantize(quantize(values, type), type).tobytes() == values.tobytes()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_place(name: str, bad: float) -> None:
    values = np.ones((_CHUNK_VALUES // 64 + 9, 64), np.float32)
    values[-1, 37] = bad
    with pytest.raises(CheckpointError, match=f"{bad} cannot be written as {name}") as caught:
        quantize(values, GGMLType[name], name="output.weight")
    assert caught.value.where == f"output.weight, row {len(values) - 1}, column 37"


@pytest.mark.parametrize(
    ("type", "largest"),
    [
        (GGMLType.F16, 65504.0),
        (GGMLType.BF16, 3.3895314e38),
        (GGMLType.Q8_0, 127 * 65504.0),
        (GGMLType.Q4_0, 8 * 65504.0),
    ],
)
def test_the_largest_value_stays_finite_and_the_next_is_refused(type: GGMLType, largest: float) -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, 5] = -largest
    assert dequantize(quantize(values, type), type)[0, 5] == np.float32(-largest)
    values[0, 5] = np.nextafter(np.float32(largest), np.float32(np.inf))
    with pytest.raises(CheckpointError, match="which holds magnitudes up to"):
        quantize(values, type)


@pytest.mark.parametrize(
    ("values", "type", "words"),
    [
        (np.zeros((2, 32), np.float32), GGMLType.Q5_K, "cannot quantise to Q5_K"),
        (np.zeros((2, 33), np.float32), GGMLType.Q8_0, "rows of 33 values are not whole Q8_0 blocks of 32"),
        (np.zeros((2, 32)), GGMLType.Q8_0, "not float64"),
        (np.zeros(32, np.float32), GGMLType.Q8_0, r"not float32 \(32,\)"),
    ],
)
def test_wrong_use_is_refused(values: np.ndarray, type: GGMLType, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        quantize(values, type)
