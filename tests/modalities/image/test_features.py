"""Vectors of patches as colours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.modalities.image import principal_colours


def vectors(height: int, width: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(height, width, size)).astype(np.float32)


def test_each_colour_is_a_direction_in_which_they_differ():
    rows, columns = np.mgrid[:12, :16].astype(np.float32)
    # In order of their spread: columns, rows, and a chequer.
    sources = [4 * columns, 2 * rows, (rows + columns) % 2]
    mixing = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0][:3]
    found = principal_colours((np.stack(sources, -1) @ mixing).astype(np.float32))
    assert found.shape == (12, 16, 3)
    assert found.dtype == np.uint8
    for channel, source in enumerate(sources):
        related = np.corrcoef(found[..., channel].ravel(), source.ravel())[0, 1]
        assert abs(related) > 0.99
        assert found[..., channel].min() == 0
        assert found[..., channel].max() == 255


@given(height=st.integers(1, 8), width=st.integers(1, 8), size=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_any_shape(height, width, size, seed):
    found = principal_colours(vectors(height, width, size, seed))
    assert found.shape == (height, width, 3)
    assert found.dtype == np.uint8


def test_the_same_picture_has_the_same_colours():
    features = vectors(6, 7, 20)
    colours = principal_colours(features)
    assert (principal_colours(features) == colours).all()
    # Neither the place nor the unit of the vectors, nor a rotation of their space, changes a colour.
    turned = features @ np.linalg.qr(np.random.default_rng(1).normal(size=(20, 20)))[0]
    for other in (features * 50, features + 3, turned):
        assert np.abs(principal_colours(other.astype(np.float32)).astype(int) - colours).max() <= 1


def test_the_vector_that_stands_out_is_bright():
    features = np.zeros((5, 5, 4), np.float32)
    features[2, 3, 1] = -100.0
    features += vectors(5, 5, 4) * 0.1
    assert principal_colours(features)[2, 3, 0] == 255


@pytest.mark.parametrize("value", [0.0, 7.5])
def test_vectors_that_are_all_the_same(value):
    assert (principal_colours(np.full((4, 5, 6), value, np.float32)) == 0).all()


def test_one_wild_vector_does_not_darken_the_rest():
    columns = np.repeat(np.linspace(0, 1, 20, dtype=np.float32)[None], 20, 0)
    features = np.stack([columns, np.zeros_like(columns)], -1)
    features[0, 0] = [1_000.0, 0.0]
    assert principal_colours(features)[5:, :, 0].std() > 50


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_a_direction_that_is_not_there_stays_dark(scale):
    along = np.linspace(0, scale, 42).reshape(6, 7, 1)
    found = principal_colours((along * np.random.default_rng(0).normal(size=9).round(1)).astype(np.float32))
    assert found[..., 0].max() == 255
    assert found[..., 1:].max() <= 30
