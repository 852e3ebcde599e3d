import struct

import numpy as np
import pytest

from craton.checkpoints.gguf import GGMLType, dequantize
from craton.checkpoints.gguf.dequantize import _CHUNK_VALUES
from craton.errors import FileFormatError

FLOAT_TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
# Where the float16 scales lie in a block.
SCALES_AT = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(name: str, rows: int, blocks_per_row: int) -> np.ndarray:
    """Random bits everywhere, and finite random scales."""
    type, rng = GGMLType[name], np.random.default_rng(7)
    blocks = rng.integers(0, 256, (rows * blocks_per_row, type.block_bytes), dtype=np.uint8)
    for at in SCALES_AT.get(name, []):
        blocks[:, at : at + 2] = rng.normal(size=(len(blocks), 1)).astype("<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def by_the_peer(blocks: np.ndarray, name: str) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


@pytest.mark.peer
@pytest.mark.parametrize("name", FLOAT_TYPES)
def test_every_value_equals_the_peers(name: str) -> None:
    columns = 2 * GGMLType[name].block_size
    blocks = random_blocks(name, rows=_CHUNK_VALUES // columns + 3, blocks_per_row=2)  # more than one chunk
    values = dequantize(blocks, GGMLType[name])
    assert values.dtype == np.float32
    assert values.shape == (len(blocks), columns)
    np.testing.assert_array_equal(values, by_the_peer(blocks, name))
    if name in SCALES_AT:
        assert np.isfinite(values).all()
        assert len(np.unique(values)) > 100


@pytest.mark.peer
@pytest.mark.parametrize("name", SCALES_AT)
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
@pytest.mark.filterwarnings("error")
def test_scales_that_are_not_finite_give_what_the_peer_gives(name: str, scale: float) -> None:
    blocks = random_blocks(name, rows=4, blocks_per_row=1)
    for at in SCALES_AT[name]:
        blocks[1:3, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    values = dequantize(blocks, GGMLType[name])
    np.testing.assert_array_equal(values, by_the_peer(blocks, name))
    assert not np.isfinite(values[1:3]).all()
    assert np.isfinite(values[[0, 3]]).all()


def test_q4_1_by_hand() -> None:
    # Byte i holds value i in its low nibble and value i + 16 in its high one; value = d * q + m.
    packed = bytes(i | (15 - i) << 4 for i in range(16))
    block = struct.pack("<ee", 0.5, -2.0) + packed
    values = dequantize(np.frombuffer(block, np.uint8)[None], GGMLType.Q4_1)
    expected = [0.5 * q - 2 for q in [*range(16), *range(15, -1, -1)]]
    assert values.tolist() == [expected]


def test_f64_is_narrowed() -> None:
    values = dequantize(np.array([[0.1, 1e300]]).view(np.uint8), GGMLType.F64)
    assert values.tolist() == [[float(np.float32(0.1)), float("inf")]]


@pytest.mark.parametrize("type", [GGMLType.Q8_1, GGMLType.Q8_K, GGMLType.I32])
def test_types_without_float_weights_are_refused(type: GGMLType) -> None:
    with pytest.raises(FileFormatError, match=f"{type.name} blocks cannot be dequantised"):
        dequantize(np.zeros((1, type.block_bytes), np.uint8), type)
