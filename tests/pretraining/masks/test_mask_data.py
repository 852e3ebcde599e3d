"""Cut-outs and COCO's annotations from files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import DataError, FileFormatError, UsageError
from craton.modalities.image import encode_png, encode_rle
from craton.pretraining.masks.coco import mask_of
from craton.pretraining.masks.data import read_cutout, read_masks

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

SQUARE = [[2, 2, 12, 2, 12, 8, 2, 8]]  # 10 wide, 6 high


def write_cutout(path, alpha, colour=(200, 40, 10)):
    pixels = np.concatenate((np.broadcast_to(np.array(colour, np.uint8), (*alpha.shape, 3)), alpha[..., None]), 2)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def alpha():
    found = np.zeros((30, 40), np.uint8)
    found[5:25, 10:20] = 255
    return found


@pytest.fixture
def coco(tmp_path):
    """Annotations of two pictures, one of them without a thing."""

    def write(segmentation=SQUARE, **changes):
        (tmp_path / "a.png").write_bytes(encode_png(np.full((10, 20, 3), 99, np.uint8)))
        document = {
            "images": [{"id": 7, "file_name": "a.png", "height": 10, "width": 20}, {"id": 8, "file_name": "none.png"}],
            "annotations": [
                {"id": 1, "image_id": 7, "segmentation": segmentation},
                {"id": 2, "image_id": 7, "segmentation": {"size": [1, 1], "counts": [1]}, "iscrowd": 1},
            ],
        } | changes
        (tmp_path / "instances.json").write_text(json.dumps(document))
        return tmp_path / "instances.json"

    return write


def test_a_cutout_is_what_is_not_transparent(tmp_path, alpha):
    write_cutout(tmp_path / "a.png", alpha)
    whole = read_cutout(tmp_path / "a.png", 64)
    assert whole.shape == (20, 10, 4)
    assert (whole == (200, 40, 10, 255)).all()
    small = read_cutout(tmp_path / "a.png", 10)
    assert small.shape == (10, 5, 4)
    # Half as opaque is half the colour: it is laid on anything by one product and one sum.
    write_cutout(tmp_path / "b.png", alpha // 255 * 128)
    assert np.abs(read_cutout(tmp_path / "b.png", 64).astype(int) - (100, 20, 5, 128)).max() <= 1


def test_what_is_no_cutout_is_skipped_and_counted(tmp_path, alpha):
    write_cutout(tmp_path / "a.png", alpha)
    (tmp_path / "plain.png").write_bytes(encode_png(np.zeros((9, 9, 3), np.uint8)))
    write_cutout(tmp_path / "opaque.png", np.full((9, 9), 255, np.uint8))
    write_cutout(tmp_path / "nothing.png", np.zeros((9, 9), np.uint8))
    found = read_masks([str(tmp_path)], size=16)
    assert (len(found), found.skipped) == (1, 3)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="3 pictures"):
        read_masks([str(tmp_path)], size=16)


def test_polygons_and_run_lengths_are_read_alike(coco):
    found = read_masks([str(coco())], size=20)
    assert len(found) == len(found.pictures) == len(found.origins) == 1
    mask = found.pictures[0].masks
    assert mask.shape == (1, 10, 20)
    assert mask[0, 2:8, 2:12].all()
    assert mask.sum() == 60
    again = read_masks([str(coco(encode_rle(mask[0])))], size=20)
    assert np.array_equal(again.pictures[0].masks, mask)
    assert again.digest == found.digest
    half = read_masks([str(coco())], size=10)
    assert half.pictures[0].pixels.shape == (5, 10, 3)
    assert half.pictures[0].masks.sum() == 15


def test_pictures_may_lie_elsewhere(coco, tmp_path):
    path = coco()
    (tmp_path / "in").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "in" / "a.png")
    with pytest.raises(UsageError):
        read_masks([str(path)], size=20)
    assert len(read_masks([str(path)], size=20, images=str(tmp_path / "in"))) == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"segmentation": [[1, 2, 3, 4]]}, "polygons"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "polygons"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e30]]}, "polygons"),
        ({"segmentation": []}, "polygons"),
        ({"segmentation": {"size": [5, 5], "counts": [25]}}, "mask of"),
        ({"segmentation": {"size": [10, 20], "counts": [5]}}, "runs"),
        ({"images": {}}, "COCO"),
        ({"images": [{"id": 7}]}, "file_name"),
        ({"images": [{"id": [7], "file_name": "a.png"}]}, "id"),
        ({"annotations": [{"image_id": 7}]}, "segmentation"),
        ({"annotations": [3]}, "segmentation"),
        ({"annotations": []}, "no mask"),
    ],
)
def test_broken_annotations_are_named(coco, changes, match):
    path = coco(**changes)
    with pytest.raises((FileFormatError, DataError), match=match) as caught:
        read_masks([str(path)], size=20)
    assert "instances.json" in str(caught.value.where)


def test_a_picture_of_another_size_than_was_outlined(coco, tmp_path):
    path = coco()
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((20, 10, 3), np.uint8)))
    with pytest.raises(DataError, match="20 x 10, and 10 x 20"):
        read_masks([str(path)], size=20)


def test_what_is_not_there(tmp_path, alpha):
    with pytest.raises(UsageError, match="neither a folder"):
        read_masks([str(tmp_path / "nowhere")], size=20)
    (tmp_path / "bad.json").write_bytes(b'{"images": [\xff')
    with pytest.raises(FileFormatError, match="UTF-8"):
        read_masks([str(tmp_path / "bad.json")], size=20)
    write_cutout(tmp_path / "a.png", alpha)
    with pytest.raises(UsageError, match="no such"):
        read_masks([str(tmp_path)], size=20, backgrounds=[str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no pictures"):
        read_masks([str(tmp_path)], size=20, backgrounds=[str(tmp_path / "empty")])


def test_parts_are_apart(tmp_path, alpha):
    for number in range(10):
        write_cutout(tmp_path / f"{number}.png", alpha, (number, 0, 0))
    found = read_masks([str(tmp_path)], size=16)
    rest, part = found.split(0.3, seed=1)
    assert (len(rest), len(part)) == (7, 3)
    assert set(rest.origins) | set(part.origins) == set(found.origins)
    assert [len(some) for some in found.split(0.0, seed=1)] == [10, 0]
    assert rest.digest != found.digest


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers(-10, 10**6) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts"]), inner),
        max_leaves=20,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_outline_is_a_mask_or_refused(outline):
    try:
        mask = mask_of(outline, 6, 9, "here")
    except FileFormatError:
        return
    assert mask.shape == (6, 9)
    assert mask.dtype == np.bool_


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=6), min_size=2, max_size=2))
@settings(max_examples=50, deadline=None)
def test_outlines_far_outside_are_drawn(sides):
    count = min(map(len, sides))
    polygon = [value for pair in zip(sides[0][:count], sides[1][:count], strict=True) for value in pair]
    assert mask_of([polygon], 5, 7, "here").shape == (5, 7)
