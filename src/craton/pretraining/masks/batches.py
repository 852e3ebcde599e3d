"""Scenes and prompts to batches: which ones form a step, and what is asked about each. Both are pure functions of
(seed, epoch, place), so a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from craton.data.plan import Indices, cut_rows, permutation
from craton.errors import UsageError
from craton.pretraining.masks.data import MaskSet
from craton.pretraining.masks.draws import Draws
from craton.pretraining.masks.settings import PromptSettings, SceneSettings

SCENES: Final = 78  # the key of draws that make scenes and prompts
CLICK_DRAWS: Final = 3  # of each prompt, before those of its corrections
BOX_DRAWS: Final = 5


@dataclass(frozen=True)
class MaskBatch:
    """pixels [B, 3, S, S], fp32, normalised. scenes [P]: which of them each prompt is about. masks [P, S, S], bool:
    what is meant. points [P, 2]: a click (x, y) in it. boxes [P, 4]: x0, y0, x1, y1 of its outermost pixels, with
    jitter. boxed [P]: whether the box is shown, or else the click. draws [P, corrections]: from 0 to 1, where later
    clicks go. asked [P]: false for prompts about nothing, which train nothing. patch: side of a patch."""

    pixels_BCHW: Tensor
    scenes_P: Tensor
    masks_PHW: Tensor
    points_P2: Tensor
    boxes_P4: Tensor
    boxed_P: Tensor
    draws_PR: Tensor
    asked_P: Tensor
    patch: int

    @property
    def tokens(self) -> int:
        """Patches of all scenes."""
        return sum(self.lengths)

    @property
    def trained(self) -> int:
        """All of them: each takes part in the masks."""
        return self.tokens

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each scene."""
        count, _, height, width = self.pixels_BCHW.shape
        return ((height // self.patch) * (width // self.patch),) * count

    def to(self, device: torch.device | str) -> MaskBatch:
        """The same batch on `device`."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "patch"}
        return replace(self, **tensors)


class SceneLoader:
    """The micro-batches of every step for one rank.

    batch: scenes of a global step; the last step of an epoch may hold fewer. micro: at most so many at once. mean, std:
    what the pixels, from 0 to 1, are normalised by.

    Raises UsageError where there is nothing to make scenes of or a number makes no sense.
    """

    def __init__(
        self,
        masks: MaskSet,
        *,
        batch: int,
        micro: int,
        patch: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        scenes: SceneSettings,
        prompts: PromptSettings,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not len(masks):
            raise UsageError("there is nothing to train on: the data holds no mask")
        for name, value in (("batch", batch), ("micro", micro)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1 (got {value})")
        self.masks, self.batch, self.micro, self.patch, self.seed = masks, batch, micro, patch, seed
        self.scenes, self.prompts, self.rank, self.world = scenes, prompts, rank, world
        self.steps_per_epoch = -(-len(masks) // batch)
        self._mean, self._std = (torch.tensor(list(values)).view(1, -1, 1, 1) for values in (mean, std))
        self._order = lru_cache(maxsize=1)(self._make_order)  # a memory of the last epoch's order, not a state

    def indices(self, step: int) -> Indices:
        """The places of a global step, of all ranks."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[within * self.batch : (within + 1) * self.batch]

    def step(self, index: int) -> list[MaskBatch]:
        """This rank's micro-batches of a global step (from 0, over all epochs)."""
        chosen, epoch = self.indices(index), index // self.steps_per_epoch
        cuts = cut_rows(len(chosen), self.world, self.micro)
        found = [self.make(chosen[part], epoch) for part in cuts[self.rank]]
        most = max(len(parts) for parts in cuts)
        return found + [self._nothing()] * (most - len(found))

    def make(self, places: Indices, epoch: int = 0) -> MaskBatch:
        """The batch of these places, as they are in this epoch."""
        size, each = self.masks.size, self.prompts.prompts
        pixels = np.zeros((len(places), size, size, 3), np.uint8)
        real = np.zeros((len(places), 1, size, size), np.bool_)
        masks = np.zeros((len(places), each, size, size), np.bool_)
        draws = np.zeros((len(places), each, CLICK_DRAWS + BOX_DRAWS + self.prompts.corrections))
        for row, place in enumerate(places.tolist()):
            stream = Draws(self.seed, SCENES, epoch, place)
            scene = self.masks.scene(place, self.scenes, stream)
            pixels[row] = scene.pixels
            real[row, :, : scene.height, : scene.width] = True
            order = stream.order(len(scene.masks))
            for prompt in range(each if order else 0):
                masks[row, prompt] = scene.masks[order[prompt % len(order)]]
            draws[row] = stream.many(*draws.shape[1:])
        raw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return self._asked(
            ((raw - self._mean) / self._std * torch.from_numpy(real)).contiguous(),
            masks.reshape(-1, size, size),
            draws.reshape(-1, draws.shape[-1]),
        )

    def all(self) -> Sequence[MaskBatch]:
        """This rank's share of an epoch, in order, for measuring, made when it is asked for. Every rank has as many
        batches."""
        return _Share(self)

    def _asked(self, pixels_BCHW: Tensor, masks_PHW: NDArray[np.bool_], draws_PX: NDArray[np.float64]) -> MaskBatch:
        click, box, later = np.split(draws_PX, [CLICK_DRAWS, CLICK_DRAWS + BOX_DRAWS], axis=1)
        central = np.where(click[:, 0] < self.prompts.central, click[:, 1], 0.0)
        return MaskBatch(
            pixels_BCHW,
            torch.arange(len(pixels_BCHW)).repeat_interleave(self.prompts.prompts),
            torch.from_numpy(masks_PHW),
            torch.from_numpy(clicks(masks_PHW, central, click[:, 2])),
            torch.from_numpy(boxes(masks_PHW, self.prompts.jitter * (2 * box[:, 1:] - 1))),
            torch.from_numpy(box[:, 0] < self.prompts.boxes),
            torch.from_numpy(later.astype(np.float32)),
            torch.from_numpy(masks_PHW.any((1, 2))),
            self.patch,
        )

    def _make_order(self, epoch: int) -> Indices:
        return permutation(len(self.masks), self.seed, epoch)

    def _nothing(self) -> MaskBatch:
        # What a rank runs beside others that still have scenes.
        batch = self.make(np.zeros(1, np.int64))
        return replace(batch, asked_P=torch.zeros_like(batch.asked_P))


class _Share(Sequence[MaskBatch]):
    def __init__(self, loader: SceneLoader) -> None:
        self._loader = loader
        self._places = np.arange(loader.rank, len(loader.masks), loader.world)

    def __len__(self) -> int:
        each = -(-len(self._loader.masks) // self._loader.world)  # of the rank that has most
        return -(-each // self._loader.micro)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        mine = self._places[number * self._loader.micro : (number + 1) * self._loader.micro]
        return self._loader.make(mine) if len(mine) else self._loader._nothing()


def depths(masks_PHW: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Steps up, down, left or right from each pixel to the next one outside its mask or the picture; 0 outside."""
    height, width = masks_PHW.shape[1:]
    found = np.pad(np.where(masks_PHW, height + width, 0).astype(np.int16), ((0, 0), (1, 1), (1, 1)))
    for axis in (1, 2):
        steps = np.arange(found.shape[axis], dtype=np.int16).reshape((-1, 1) if axis == 1 else (-1,))
        for turn in (slice(None), slice(None, None, -1)):
            view = found[:, turn] if axis == 1 else found[:, :, turn]
            view[:] = np.minimum.accumulate(view - steps, axis=axis) + steps
    return found[:, 1:-1, 1:-1]


def clicks(
    masks_PHW: NDArray[np.bool_], central_P: NDArray[np.float64], draws_P: NDArray[np.float64]
) -> NDArray[np.float32]:
    """A pixel (x, y) of each mask, [P, 2]: any of those whose depth is at least a share of the greatest one.

    central_P: that share, from 0 (anywhere inside) to 1 (the most interior). draws_P: which of them, from 0 to 1. Of an
    empty mask it is (0, 0).
    """
    depth_PN = depths(masks_PHW).reshape(len(masks_PHW), -1)
    deep_PN = depth_PN >= np.maximum(1, np.ceil(central_P * depth_PN.max(1)))[:, None]
    return chosen_pixels(torch.from_numpy(deep_PN.reshape(masks_PHW.shape)), torch.from_numpy(draws_P)).numpy()


def chosen_pixels(masks_PHW: Tensor, draws_P: Tensor) -> Tensor:
    """A pixel (x, y) of each mask, [P, 2], fp32; which one, a draw from 0 to 1 says. Of an empty mask it is (0, 0)."""
    width = masks_PHW.shape[2]
    counts_PN = masks_PHW.flatten(1).cumsum(1, dtype=torch.int32)
    # A draw of almost 1 may have been rounded to it.
    wanted_P = (draws_P * counts_PN[:, -1]).to(torch.int32).minimum(counts_PN[:, -1] - 1)
    place_P = (counts_PN > wanted_P[:, None]).to(torch.uint8).argmax(1)
    return torch.stack((place_P % width, place_P // width), 1).float()


def boxes(masks_PHW: NDArray[np.bool_], off_P4: NDArray[np.float64]) -> NDArray[np.float32]:
    """The outermost pixels x0, y0, x1, y1 of each mask, [P, 4], each moved by a share of the box's side and kept in the
    picture."""
    height, width = masks_PHW.shape[1:]
    columns, rows = (np.asarray(masks_PHW.any(axis)) for axis in (1, 2))
    found = np.stack((
        columns.argmax(1), rows.argmax(1), width - 1 - columns[:, ::-1].argmax(1), height - 1 - rows[:, ::-1].argmax(1),
    ), 1)  # fmt: skip
    sides = found[:, 2:] - found[:, :2] + 1
    moved = found + off_P4 * np.concatenate((sides, sides), 1)
    return np.clip(moved, 0, [width - 1, height - 1] * 2).astype(np.float32)
