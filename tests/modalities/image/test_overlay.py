"""Masks drawn on pictures: where colour lies, and where it does not."""

from __future__ import annotations

import numpy as np
import pytest

from craton.modalities.image.overlay import LARGEST, SMALLEST, draw_masks, drawing_size, side_by_side

pytest.importorskip("PIL", reason="pictures need Pillow")


def test_sizes():
    assert drawing_size(480, 640) == (480, 640)
    assert drawing_size(100, 60) == (600, 360)
    assert drawing_size(1, 1) == (SMALLEST, SMALLEST)
    assert drawing_size(6000, 3000) == (LARGEST, LARGEST // 2)
    assert drawing_size(30_000, 1) == (LARGEST, 1)


@pytest.mark.parametrize("spotlight", [False, True])
def test_colours_lie_on_the_masks(spotlight):
    pixels = np.full((100, 160, 3), 128, np.uint8)
    height, width = drawing_size(100, 160)
    large, small = np.zeros((2, height, width), bool)
    large[40:300, 40:300] = True
    small[100:160, 100:160] = True
    drawn = draw_masks(pixels, [small, np.zeros_like(small), large], spotlight=spotlight)
    assert (drawn.shape, drawn.dtype) == ((height, width, 3), np.uint8)
    outside = drawn[350, 600]
    assert (outside < 90).all() if spotlight else (outside == 128).all()
    assert np.ptp(drawn[200, 200]) > 20
    assert np.abs(drawn[200, 200].astype(int) - drawn[130, 130]).max() > 20  # the small one is not hidden
    assert drawn[200, 40].min() > drawn[200, 60].min()  # a bright edge


def test_the_prompt_is_drawn():
    pixels = np.zeros((64, 64, 3), np.uint8)
    drawn = draw_masks(pixels, [], points=[(10, 20), (40, 50)], labels=[1, 0], box=(5, 5, 60, 60))
    inside, outside = drawn[205, 105], drawn[505, 405]
    assert inside.argmax() == 1
    assert outside.argmax() == 0
    assert (drawn[50, 300] == 255).all()
    assert (drawn[300, 300] == 0).all()
    assert side_by_side([drawn, drawn]).shape == (640, 640 * 2 + 12, 3)
