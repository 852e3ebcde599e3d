"""Pictures laid into a square: against the published processor, and there and back again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import CheckpointError
from craton.modalities.image.longest_side import SquarePreparation

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

SHAPES = [(40, 100), (100, 41), (64, 64), (7, 5), (1, 90), (300, 299)]


def picture(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.peer
@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[5:])
@pytest.mark.parametrize(
    "ours",
    [SquarePreparation(side=64, mask=16), SquarePreparation(side=48, mask=8, filter="bicubic", mean=(0, 0.1, 1))],
)
def test_like_the_published_processor(ours, shape):
    pytest.importorskip("transformers")
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    theirs = SamImageProcessorPil(**ours.to_config())
    reference = theirs(Image.fromarray(picture(shape)), return_tensors="np")
    square, (x, y) = ours.prepare(picture(shape))
    assert square.dtype == np.float32
    assert square.shape == reference["pixel_values"][0].shape
    assert np.abs(square - reference["pixel_values"][0]).max() < 1e-5
    rows, columns = reference["reshaped_input_sizes"][0]
    assert ours.fitted(*shape) == (rows, columns)
    assert (x, y) == (columns / shape[1], rows / shape[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_come_back_as_by_three_interpolations(shape):
    import torch
    import torch.nn.functional as F

    ours = SquarePreparation(side=64, mask=16)
    logits = np.random.default_rng(1).normal(size=(3, 16, 16)).astype(np.float32)
    rows, columns = ours.fitted(*shape)
    large = F.interpolate(torch.from_numpy(logits)[None], (64, 64), mode="bilinear")[..., :rows, :columns]
    expected = F.interpolate(large, shape, mode="bilinear")[0].numpy()
    restored = ours.restore(logits, *shape)
    assert restored.dtype == np.float32
    assert np.abs(restored - expected).max() < 1e-5


@given(st.integers(1, 80), st.integers(1, 80), st.integers(8, 70))
@settings(max_examples=60, deadline=None)
def test_the_picture_lies_in_a_corner_of_the_square(height, width, side):
    ours = SquarePreparation(side=side, mean=(-1, -1, -1), std=(1, 1, 1))  # so that every pixel of it is above zero
    square, (x, y) = ours.prepare(np.zeros((height, width, 3), np.uint8))
    rows, columns = ours.fitted(height, width)
    assert side in (rows, columns)
    assert (square[:, :rows, :columns] == 1).all()
    assert square.sum() == 3 * rows * columns
    assert (round(x * width), round(y * height)) == (columns, rows)
    # What is the same everywhere stays so, and what is drawn on the picture covers it.
    assert np.allclose(ours.restore(np.full((1, 5, 5), 2, np.float32), height, width), 2)
    covered = ours.covered(np.zeros((2, side, side), np.float32), height, width)
    assert covered.shape == (2, rows, columns)


def test_files(tmp_path):
    ours = SquarePreparation(side=96, mask=24, mean=(0.1, 0.2, 0.3), filter="bicubic")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours.to_config()))
    assert SquarePreparation.read(tmp_path) == ours
    assert SquarePreparation.from_config({"image_processor_type": "SamImageProcessor"}, "here") == SquarePreparation()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "no square"),
        ({"size": {"shortest_edge": 3}}, "'size' is not"),
        ({"size": {"longest_edge": 1 << 20}}, "'size' is not"),
        ({"mask_size": 4}, "'mask_size' is not"),
        ({"pad_size": {"height": 64, "width": 32}}, "'pad_size'"),
        ({"do_pad": False}, "fill no square"),
        ({"do_resize": False}, "fill no square"),
        ({"do_center_crop": True, "crop_size": 9}, "nothing is cropped"),
        ({"size_divisor": 3}, "'size_divisor' is not known"),
        ({"image_std": [0, 1, 1]}, "image_std"),
    ],
)
def test_what_is_refused(change, match):
    with pytest.raises(CheckpointError, match=match):
        SquarePreparation.from_config({**SquarePreparation(side=64, mask=16).to_config(), **change}, "here")
