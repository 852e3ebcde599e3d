"""Run lengths of masks: there and back, against pycocotools, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from craton.errors import FileFormatError, UsageError
from craton.modalities.image import decode_rle, encode_rle

MASKS = st_numpy.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def blocks(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Large runs and small ones."""
    dice, mask = np.random.default_rng(seed), np.zeros((height, width), bool)
    for _ in range(5):
        top, left = dice.integers(height), dice.integers(width)
        mask[top : top + dice.integers(1, height + 1), left : left + dice.integers(1, width + 1)] ^= True
    return mask


@given(MASKS)
@settings(max_examples=200, deadline=None)
def test_there_and_back(mask):
    rle = encode_rle(mask)
    assert rle["size"] == list(mask.shape)
    found = decode_rle(rle)
    assert found.dtype == bool
    assert (found == mask).all()
    assert (decode_rle({**rle, "counts": rle["counts"].encode()}) == mask).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (640, 480), (1_500, 2_000)])
@pytest.mark.parametrize("filled", [None, False, True])
def test_large_and_plain_ones(shape, filled):
    mask = blocks(*shape) if filled is None else np.full(shape, filled)
    assert (decode_rle(encode_rle(mask)) == mask).all()


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        (np.zeros((3, 4), bool), "<"),
        (np.ones((3, 4), bool), "0<"),
        (np.arange(12).reshape(3, 4) % 5 == 0, "0130000"),
        (np.pad(np.ones((20, 30), bool), ((7, 9), (50, 3))), f"_h1d0`0{'0' * 57}U3"),
    ],
)
def test_what_pycocotools_writes(mask, counts):
    assert encode_rle(mask) == {"size": list(mask.shape), "counts": counts}
    assert (decode_rle({"size": list(mask.shape), "counts": counts}) == mask).all()


@given(MASKS, st.integers(0, 1_000))
@settings(max_examples=100, deadline=None)
@pytest.mark.peer
def test_like_pycocotools(mask, seed):
    peer = pytest.importorskip("pycocotools.mask")
    for one in (mask, blocks(*mask.shape, seed), blocks(300, 200, seed)):
        theirs, ours = peer.encode(np.asfortranarray(one.astype(np.uint8))), encode_rle(one)
        assert ours["counts"] == theirs["counts"].decode()
        assert (decode_rle(theirs) == one).all()
        assert (peer.decode({**ours, "counts": ours["counts"].encode()}) == one).all()


def test_counts_that_are_not_compressed():
    rle = {"size": [2, 3], "counts": [1, 2, 3]}
    assert decode_rle(rle).tolist() == [[False, True, False], [True, False, False]]
    assert decode_rle({"size": (2, 3), "counts": [0, 0, 0, 6]}).all()


@pytest.mark.parametrize(
    ("rle", "match"),
    [
        ({}, "the size"),
        ({"size": [3, 4]}, "the counts"),
        ({"size": "34", "counts": "<"}, "the size"),
        ({"size": [3], "counts": "<"}, "the size"),
        ({"size": [0, 4], "counts": ""}, "the size"),
        ({"size": [3.0, 4], "counts": "<"}, "the size"),
        ({"size": [100_000, 100_000], "counts": "<"}, "pixels, where"),
        ({"size": [3, 4], "counts": [5, 8]}, "13 pixels, where 3 x 4"),
        ({"size": [3, 4], "counts": [13, -1]}, "the counts"),
        ({"size": [3, 4], "counts": [True] * 12}, "the counts"),
        ({"size": [3, 4], "counts": {"a": 1}}, "the counts"),
        ({"size": [3, 4], "counts": ""}, "0 pixels"),
        ({"size": [3, 4], "counts": "<x"}, "not in COCO's"),
        ({"size": [3, 4], "counts": "é"}, "not in COCO's"),
        ({"size": [3, 4], "counts": "P"}, "cut short"),
        ({"size": [3, 4], "counts": "o" * 50}, "not in COCO's"),
        ({"size": [3, 4], "counts": "O"}, "the counts"),
    ],
)
def test_what_is_no_mask(rle, match):
    with pytest.raises(FileFormatError, match=match) as error:
        decode_rle(rle, "annotations.json")
    assert error.value.where.startswith("annotations.json")


@given(
    st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30)
    | st.text(max_size=8)
    | st.binary(max_size=20)
)
@settings(max_examples=300, deadline=None)
def test_any_text_is_refused_in_words_or_read(counts):
    try:
        found = decode_rle({"size": [5, 7], "counts": counts})
    except FileFormatError:
        return
    assert found.shape == (5, 7)
    assert (decode_rle(encode_rle(found)) == found).all()


@pytest.mark.parametrize(
    "mask", [np.zeros((3, 4)), np.zeros((3, 4), np.uint8), np.zeros(4, bool), np.zeros((0, 4), bool)]
)
def test_arrays_that_are_no_mask(mask):
    with pytest.raises(UsageError, match="a mask is bool"):
        encode_rle(mask)
