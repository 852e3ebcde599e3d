"""Scenes of cut-outs: exact masks, occlusion, and the same scene for the same draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.pretraining.masks.draws import Draws
from craton.pretraining.masks.scenes import Annotated, annotated, background, generated, pasted, placed
from craton.pretraining.masks.settings import SceneSettings

pytest.importorskip("PIL", reason="pictures need Pillow")

STILL = SceneSettings(flip=False, colour=0.0)


def cutout(colour: tuple[int, int, int], height: int = 20, width: int = 20) -> np.ndarray:
    """An opaque rectangle."""
    return np.broadcast_to(np.array([*colour, 255], np.uint8), (height, width, 4)).copy()


RED, GREEN, BLUE = (cutout(colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250)))


@given(key=st.integers(0, 2**32), objects=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_mask_is_what_is_seen_of_a_thing(key, objects):
    cutouts = [RED, GREEN, BLUE]
    how = SceneSettings(objects=objects, flip=False, colour=0.0)
    scene = pasted(
        cutouts, 1, [np.full((50, 70, 3), 90, np.uint8)], how.model_copy(update={"plain": 0.0}), 48, Draws(key)
    )
    assert scene.pixels.shape == (48, 48, 3)
    assert scene.masks.shape == (len(scene.things), 48, 48)
    assert len(scene.things) <= objects
    assert scene.masks.sum(0).max(initial=0) <= 1  # no pixel belongs to two things
    for thing, mask in zip(scene.things, scene.masks, strict=True):
        assert mask.mean() >= 0.01
        # Of such a mask most pixels have the thing's colour; those at the edge are mixed.
        assert np.median(scene.pixels[mask][:, thing]) == 250
    again = pasted(
        cutouts, 1, [np.full((50, 70, 3), 90, np.uint8)], how.model_copy(update={"plain": 0.0}), 48, Draws(key)
    )
    assert np.array_equal(scene.pixels, again.pixels)
    assert np.array_equal(scene.masks, again.masks)


def test_what_covers_a_thing_is_taken_from_its_mask():
    how = SceneSettings(objects=2, smallest=1.0, largest=1.0, flip=False, colour=0.0)
    small = SceneSettings(objects=2, smallest=0.5, largest=0.5, flip=False, colour=0.0)
    found = [pasted([RED, GREEN], 0, [], how if key % 2 else small, 40, Draws(key)) for key in range(40)]
    both = [scene for scene in found if len(scene.things) == 2 and set(scene.things) == {0, 1}]
    assert both
    areas = [scene.masks.sum((1, 2)) for scene in both]
    # Two squares of one size: where they overlap, the one behind is smaller.
    assert any(one[0] < one[1] for one in areas)
    assert all(not (scene.masks[0] & scene.masks[1]).any() for scene in both)


def test_a_translucent_thing_has_no_mask():
    glass = np.full((20, 20, 4), 60, np.uint8)  # a quarter of the light, premultiplied
    scene = pasted([glass], 0, [], SceneSettings(objects=1), 32, Draws(3))
    assert scene.masks.shape == (0, 32, 32)


@given(key=st.integers(0, 2**32), height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_cutouts_of_any_shape_are_placed_into_the_scene(key, height, width):
    how = SceneSettings(smallest=0.3, largest=0.9, colour=0.5)
    colours, opacity = placed(cutout((200, 100, 50), height, width), how, 24, Draws(key))
    assert colours.shape == (24, 24, 3)
    assert opacity.max() == 1
    assert (colours <= 255 * opacity[..., None] + 1e-3).all()
    assert opacity.sum() <= (0.9 * 24 + 1) ** 2


def test_channels_change_places_in_a_share_of_all_cases():
    how = SceneSettings(smallest=1.0, largest=1.0, flip=False, colour=0.0)
    for share, wanted in ((0.0, {0}), (1.0, {0, 1, 2})):
        some = how.model_copy(update={"channels": share})
        colours = [placed(RED, some, 24, Draws(key))[0].max((0, 1)) for key in range(30)]
        assert {int(values.argmax()) for values in colours} == wanted
        assert all(sorted(values) == [0, 0, 250] for values in colours)
        pixels = np.broadcast_to(np.array([9, 90, 200], np.uint8), (12, 12, 3))
        seen = {
            tuple(background([pixels], some.model_copy(update={"plain": 0.0}), 12, Draws(key))[0, 0])
            for key in range(60)
        }
        assert len(seen) == (6 if share else 1)
        assert all(sorted(values) == [9, 90, 200] for values in seen)


@given(key=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_backgrounds_have_the_scenes_size(key):
    draws = Draws(key)
    assert generated(17, draws).shape == (17, 17, 3)
    picture = np.random.default_rng(0).integers(0, 256, (30, 9, 3), np.uint8)
    values = background([picture], SceneSettings(plain=0.5), 17, draws)
    assert values.shape == (17, 17, 3)
    assert values.min() >= 0
    assert values.max() <= 255


def test_outlined_pictures_lie_in_the_upper_left():
    pixels = np.full((10, 16, 3), 200, np.uint8)
    mask = np.zeros((1, 10, 16), np.bool_)
    mask[0, 2:5, 3:9] = True
    picture = Annotated(pixels, np.packbits(mask.reshape(1, -1), axis=1))
    assert np.array_equal(picture.masks, mask)
    scene = annotated(picture, STILL, 16, Draws(1))
    assert (scene.height, scene.width) == (10, 16)
    assert np.array_equal(scene.masks[0, :10], mask[0])
    assert not scene.masks[0, 10:].any()
    assert (scene.pixels[:10] == 200).all()
    flips = {annotated(picture, SceneSettings(colour=0.0), 16, Draws(key)).masks[0, 2, 3] for key in range(12)}
    assert flips == {np.True_, np.False_}
