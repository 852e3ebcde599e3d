"""The benchmark of pictures and captions: concepts, the split by them, recall, chance and the floor."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # benchmarks are programs in a folder, not a package

import image_text  # noqa: E402
from image_text import Stamp  # noqa: E402


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("A brown hen.", "hen"),
        ("A sliced orange on a plate.", "orange"),
        ("An “Eiffel” tower in Paris.", "tower"),
        ("Two city houses.", "house"),
        ("Cherries!", "cherry"),
        ("The letter f.", "letter"),
        ("!", ""),
    ],
)
def test_main_nouns(caption, noun):
    assert image_text.main_noun(caption) == noun


def test_no_held_out_noun_is_anywhere_in_training():
    nouns = [f"{a}{b}" for a in "bcdfgklmnprtv" for b in ("ar", "el", "ip", "og")]
    stamps = [Stamp(Path(f"{noun}.png"), f"A red {noun}.", ("things",)) for noun in nouns]
    stamps += [Stamp(Path(f"{noun}.png"), f"A box with two {noun}s.", ("things",)) for noun in nouns]
    stamps += [Stamp(Path(f"{noun}.png"), "A hat.", (f"{noun}s",)) for noun in nouns]
    training, held_out = image_text.split(stamps)
    held = {one.noun for one in held_out}
    assert 3 < len(held) < len(nouns) / 2
    for one in training:
        assert not held & set(image_text.words_of(one.placed))
    assert image_text.split(stamps) == (training, held_out)
    # What a recipe is chosen by is a part of the training data, and no noun of it is left there.
    rest, chosen_by = image_text.split(training, image_text.VALIDATION)
    assert chosen_by
    assert not held & {one.noun for one in chosen_by}
    for one in rest:
        assert not {one.noun for one in chosen_by} & set(image_text.words_of(one.placed))


def test_recall_counts_any_right_picture_and_shares_out_equals():
    right = np.array([[True, True, False, False, False, False], [False] * 5 + [True]])
    scores = np.array([[0.1, 0.9, 0.2, 0.3, 0.4, 0.5], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    found = image_text.hits(scores, right)
    assert found[1].tolist() == [1, 0]
    assert found[5].tolist() == [1, 0]
    equal = image_text.hits(np.zeros((2, 6)), right)
    assert equal[1].mean() == pytest.approx(image_text.chance(right, 1), abs=0.06)
    assert image_text.chance(right, 1) == pytest.approx((2 / 6 + 1 / 6) / 2)
    assert image_text.chance(right, 5) == pytest.approx((1 + 5 / 6) / 2)


def test_the_floor_finds_colours_that_captions_name(tmp_path):
    pytest.importorskip("PIL", reason="pictures need Pillow")
    paths = []
    for number, colour in enumerate([(250, 0, 0), (0, 0, 250), (250, 9, 9), (9, 9, 250)]):
        paths.append(tmp_path / f"{number}.png")
        pixels = np.full((8, 8, 3), colour, np.uint8)
        paths[-1].write_bytes(image_text.encode_png(image_text.laid_on(pixels, None, np.array([255, 255, 255]))))
    captions = ["a red car"] * 5 + ["a blue car"] * 5
    nearest = image_text.nearest_colours([paths[0]] * 5 + [paths[1]] * 5, paths[2:])
    assert nearest.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    likeness = image_text.tfidf_likeness(["a blue hat", "a red hat"], captions)
    assert likeness[:, nearest].mean(-1).argmax(1).tolist() == [1, 0]


def test_settings_of_the_command_line_go_where_they_belong():
    own = image_text.changed(["patch=8", "training.batch=64", "augment.crop=0.4"], quick=True)
    assert own == {"training": {"steps": 40, "batch": 64}, "patch": 8, "augment": {"crop": 0.4}}
