"""Prompts, and that batches are pure functions of (seed, epoch, place)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from craton.errors import UsageError
from craton.pretraining.masks.batches import MaskBatch, SceneLoader, boxes, chosen_pixels, clicks, depths
from craton.pretraining.masks.data import MaskSet
from craton.pretraining.masks.scenes import Annotated
from craton.pretraining.masks.settings import PromptSettings, SceneSettings

pytest.importorskip("PIL", reason="pictures need Pillow")

SOME_MASKS = arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)))


def masks(count: int = 5, size: int = 16) -> MaskSet:
    """Discs of several colours, and an outlined picture that is not square."""
    y, x = np.mgrid[:12, :12] - 5.5
    inside = (np.hypot(x, y) < 6)[..., None]
    cutouts = [np.where(inside, np.array([50 * n, 99, 200 - n, 255]), 0).astype(np.uint8) for n in range(count)]
    outline = np.zeros((1, 8, 16), np.bool_)
    outline[0, 2:6, 4:12] = True
    picture = Annotated(np.full((8, 16, 3), 30, np.uint8), np.packbits(outline.reshape(1, -1), axis=1))
    return MaskSet(tuple(cutouts), (picture,), (), size, tuple(map(str, range(count + 1))))


def loader(**changes) -> SceneLoader:
    given = {
        "batch": 4, "micro": 2, "patch": 4, "mean": (0.5,) * 3, "std": (0.25,) * 3, "seed": 3,
        "scenes": SceneSettings(), "prompts": PromptSettings(),
    } | changes  # fmt: skip
    return SceneLoader(masks(), **given)


def equal(a: MaskBatch, b: MaskBatch) -> bool:
    return all(
        torch.equal(value, getattr(b, name)) for name, value in vars(a).items() if isinstance(value, torch.Tensor)
    )


def test_steps_are_pure_functions_of_seed_and_number():
    first, second = loader(), loader()
    for step in (5, 0, 2, 5):  # in any order
        assert all(equal(a, b) for a, b in zip(first.step(step), second.step(step), strict=True))
    assert first.steps_per_epoch == 2
    assert sorted(np.concatenate([first.indices(2), first.indices(3)]).tolist()) == list(range(6))
    place = np.array([1])
    assert equal(first.make(place, 4), second.make(place, 4))
    assert not equal(first.make(place, 4), first.make(place, 5))
    assert not equal(first.make(place, 4), loader(seed=4).make(place, 4))
    # What a scene is does not hang on its neighbours.
    both = first.make(np.array([0, 1]), 4)
    assert torch.equal(both.pixels_BCHW[1:], first.make(place, 4).pixels_BCHW)
    assert torch.equal(both.points_P2[4:], first.make(place, 4).points_P2)


def test_prompts_point_at_what_is_meant():
    batch = loader(micro=4, prompts=PromptSettings(prompts=3, boxes=0.5, jitter=0.0)).step(0)[0]
    assert (batch.tokens, batch.trained, batch.lengths) == (64, 64, (16,) * 4)
    assert batch.scenes_P.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch.asked_P.all()
    assert 0 < batch.boxed_P.sum() < 12
    for mask, (x, y), box in zip(batch.masks_PHW, batch.points_P2.long(), batch.boxes_P4, strict=True):
        assert mask[y, x]
        rows, columns = mask.nonzero().unbind(1)
        assert box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]


def test_what_is_filled_up_is_zero():
    batch = loader().make(np.array([5]))
    assert not batch.pixels_BCHW[0, :, 8:].any()
    assert batch.pixels_BCHW[0, :, :8].all()


def test_ranks_share_a_step():
    alone = loader(micro=1).step(0)
    shared = [loader(micro=1, rank=rank, world=3).step(0) for rank in range(3)]
    assert [len(part) for part in shared] == [2, 2, 2]
    idle = [batch for part in shared for batch in part if not batch.asked_P.any()]
    busy = [batch for part in shared for batch in part if batch.asked_P.any()]
    assert (len(idle), len(busy)) == (2, 4)
    assert all(any(equal(batch, other) for other in alone) for batch in busy)


def test_all_is_measured_once():
    found = [loader(rank=rank, world=2).all() for rank in range(2)]
    assert [len(part) for part in found] == [2, 2]
    seen = sum(len(batch.pixels_BCHW) for part in found for batch in part if batch.asked_P.any())
    assert seen == 6
    with pytest.raises(IndexError):
        found[0][2]


def test_nonsense_is_refused():
    with pytest.raises(UsageError, match="micro must be at least 1"):
        loader(micro=0)
    with pytest.raises(UsageError, match="no mask"):
        SceneLoader(
            masks().take(np.array([], np.int64)), batch=1, micro=1, patch=4, mean=(0,) * 3, std=(1,) * 3, seed=0,
            scenes=SceneSettings(), prompts=PromptSettings(),
        )  # fmt: skip


@given(SOME_MASKS)
@settings(max_examples=60, deadline=None)
def test_depth_is_the_way_to_the_next_pixel_outside(masks_PHW):
    found = depths(masks_PHW)
    padded = np.pad(masks_PHW, ((0, 0), (1, 1), (1, 1)))
    for mask, depth in zip(padded, found, strict=True):
        outside = np.argwhere(~mask)
        for y, x in np.ndindex(depth.shape):
            assert depth[y, x] == np.abs(outside - (y + 1, x + 1)).sum(1).min()


@given(SOME_MASKS, st.floats(0, 1), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_clicks_lie_inside(masks_PHW, central, draw):
    count = len(masks_PHW)
    found = clicks(masks_PHW, np.full(count, central), np.full(count, draw))
    for mask, depth, (x, y) in zip(masks_PHW, depths(masks_PHW), found.astype(int), strict=True):
        if mask.any():
            assert depth[y, x] >= max(1, central * depth.max())
        else:
            assert (x, y) == (0, 0)


def test_every_pixel_can_be_chosen():
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[0, 2, 0] = True
    draws = torch.tensor([0.0, 0.49, 0.5, 0.999, 1.0])
    found = chosen_pixels(mask.expand(5, -1, -1), draws)
    assert found.tolist() == [[2, 1], [2, 1], [0, 2], [0, 2], [0, 2]]


@given(SOME_MASKS, st.floats(-0.5, 0.5))
@settings(max_examples=60, deadline=None)
def test_boxes_stay_in_the_picture(masks_PHW, off):
    found = boxes(masks_PHW, np.full((len(masks_PHW), 4), off))
    height, width = masks_PHW.shape[1:]
    assert (found >= 0).all()
    assert (found <= [width - 1, height - 1] * 2).all()
