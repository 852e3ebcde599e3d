"""The benchmark of clicks: the split, the questions, and the peers on pictures whose answer is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
pytest.importorskip("scipy", reason="the peers need SciPy")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # benchmarks are programs in a folder, not a package

import segmentation  # noqa: E402
from image_text import Stamp  # noqa: E402


@pytest.fixture
def question():
    """A red disc on blue: (pixels, mask, click, box)."""
    y, x = np.mgrid[: segmentation.SIZE, : segmentation.SIZE]
    wanted = np.hypot(x - 20, y - 30) < 9
    rng = np.random.default_rng(0)
    colours = np.where(wanted[..., None], (210, 40, 30), (30, 60, 190)) + rng.integers(-6, 7, (*wanted.shape, 3))
    click, box = segmentation.interior(wanted), segmentation.box_of(wanted)
    return segmentation.Question(colours.astype(np.uint8), wanted, click, box, "disc")


def test_no_noun_and_no_photo_is_in_two_parts(tmp_path):
    nouns = [f"{a}{b}" for a in "bcdfgklmnprtv" for b in ("ar", "el", "ip", "og")]
    stamps = [Stamp(Path(f"{noun}.png"), f"A red {noun}.", ("things",)) for noun in nouns]
    stamps += [Stamp(Path(f"{noun}.png"), f"A box with two {noun}s.", ("things",)) for noun in nouns]
    stamps += [Stamp(Path(f"{noun}.png"), f"A {noun}.", ("symbols",)) for noun in nouns[:3]]
    names = [*segmentation.TEST_PHOTOS, *segmentation.VALIDATION_PHOTOS, *segmentation.NO_PHOTOS, "grass"]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    parts = segmentation.split(stamps, [tmp_path])
    training, validation, test = parts
    held = {one.noun for part in (validation, test) for one in part.stamps}
    assert validation.stamps
    assert test.stamps
    assert not {one.noun for one in validation.stamps} & {one.noun for one in test.stamps}
    assert not any(held & set(segmentation.words_of(one.caption)) for one in training.stamps)
    assert not any("symbols" in one.folders for part in parts for one in part.stamps)
    assert [{path.stem for path in part.photos} for part in parts] == [
        {"grass"}, segmentation.VALIDATION_PHOTOS, segmentation.TEST_PHOTOS,
    ]  # fmt: skip
    assert segmentation.split(stamps, [tmp_path]) == parts


def test_photos_that_lie_beside_the_stamps_are_found(tmp_path):
    without = segmentation.photo_folders(tmp_path / "stamps")
    (tmp_path / "templates").mkdir()
    assert segmentation.photo_folders(tmp_path / "stamps") == [tmp_path / "templates", *without]


def test_questions_are_the_same_each_time(tmp_path):
    alpha = np.zeros((20, 20), np.uint8)
    alpha[3:17, 3:17] = 255
    pixels = np.concatenate((np.full((20, 20, 3), 200, np.uint8), alpha[..., None]), 2)
    Image.fromarray(pixels).save(tmp_path / "box.png")
    part = segmentation.Part([Stamp(tmp_path / "box.png", "A box.", ("things",))], [])
    found = segmentation.questions(part, tmp_path / "a", seed=1)
    again = segmentation.questions(part, tmp_path / "b", seed=1)
    assert len(found) == len(again) >= segmentation.SCENES
    for one, other in zip(found, again, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert (one.click, one.box, one.noun) == (other.click, other.box, "box")
        assert one.wanted[one.click[1], one.click[0]]
        assert one.wanted.mean() >= 0.01


def test_clicks_and_boxes_of_a_mask(question):
    assert question.click == (20, 30)
    assert question.box == (12, 22, 29, 39)
    assert segmentation.overlap(question.wanted, question.wanted) == 1
    assert segmentation.overlap(~question.wanted, question.wanted) == 0


def test_parts_of_a_mask():
    mask = np.zeros((5, 9), np.bool_)
    mask[1, 1:3] = mask[3, 4:8] = True
    assert segmentation.holding(mask, (1, 1)).sum() == 2
    assert segmentation.holding(mask, (0, 0)).sum() == 0
    assert segmentation.largest(mask).sum() == 4
    assert segmentation.largest(mask & False).sum() == 0


@pytest.mark.parametrize("kind", ["click", "box"])
def test_peers_solve_what_is_easy(question, kind):
    peers = segmentation.peers(kind)
    assert ("GrabCut" in peers) == (importlib.util.find_spec("cv2") is not None)
    for ways in peers.values():
        way, peer = segmentation.choose(ways, [question])
        assert peer is ways[way]
        assert segmentation.overlap(peer(question), question.wanted) > 0.95
