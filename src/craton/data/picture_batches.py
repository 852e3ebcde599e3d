"""Pictures to batches: which ones form a step, and how each is changed by chance. Both are pure functions of (seed,
epoch, picture), so a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from craton.data.augmentation import AugmentSettings
from craton.data.pictures import PictureSet
from craton.data.plan import Indices, cut_rows, permutation
from craton.errors import UsageError

DRAWS: Final = 12  # random numbers for each view of a picture


@dataclass(frozen=True)
class PictureBatch:
    """pixels [B * views, C, H, W], fp32, normalised; the views of a picture stand in blocks: the first view of all, the
    second of all ... labels [B], -1 without one. indices [B]: the pictures' numbers. texts: token ids of the captions.
    patch: side of a patch, by which tokens are counted."""

    pixels_BCHW: Tensor
    labels_B: Tensor
    indices_B: Tensor
    patch: int
    views: int = 1
    texts: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Patches of all pictures."""
        return sum(self.lengths)

    @property
    def trained(self) -> int:
        """All of them: each patch takes part in its picture's loss."""
        return self.tokens

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each picture."""
        count, _, height, width = self.pixels_BCHW.shape
        return ((height // self.patch) * (width // self.patch),) * count

    def to(self, device: torch.device | str) -> PictureBatch:
        """The same batch on `device`."""
        return replace(
            self,
            pixels_BCHW=self.pixels_BCHW.to(device),
            labels_B=self.labels_B.to(device),
            indices_B=self.indices_B.to(device),
        )


class PictureLoader:
    """The micro-batches of every step for one rank.

    batch: pictures of a global step; the last step of an epoch may hold fewer. micro: at most so many at once, except
    where a step stays whole (whole_steps), for objectives that compare its pictures with one another. mean, std: what
    the pixels, from 0 to 1, are normalised by. views: how often a picture is in a batch, each time changed anew.

    Raises UsageError where there are no pictures or a number makes no sense.
    """

    def __init__(
        self,
        pictures: PictureSet,
        *,
        batch: int,
        micro: int,
        patch: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        rank: int = 0,
        world: int = 1,
        augment: AugmentSettings | None = None,
        views: int = 1,
        shuffle: bool = True,
        whole_steps: bool = False,
        texts: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        if not len(pictures):
            raise UsageError("there is nothing to train on: the data holds no picture")
        for name, value in (("batch", batch), ("micro", micro), ("views", views)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1 (got {value})")
        self.pictures, self.batch, self.micro, self.patch, self.seed = pictures, batch, micro, patch, seed
        self.rank, self.world, self.augment, self.views = rank, world, augment, views
        self.shuffle, self.whole_steps, self.texts = shuffle, whole_steps, texts
        self.steps_per_epoch = -(-len(pictures) // batch)
        self._mean, self._std = (torch.tensor(list(values)).view(1, -1, 1, 1) for values in (mean, std))
        # Memories of the last epoch, not a state.
        self._order, self._draws = lru_cache(maxsize=1)(self._make_order), lru_cache(maxsize=views)(self._make_draws)

    def indices(self, step: int) -> Indices:
        """The pictures of a global step, of all ranks."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[within * self.batch : (within + 1) * self.batch]

    def step(self, index: int) -> list[PictureBatch]:
        """This rank's micro-batches of a global step (from 0, over all epochs)."""
        chosen = self.indices(index)
        cuts = cut_rows(len(chosen), self.world, len(chosen) if self.whole_steps else self.micro)
        epoch, most = index // self.steps_per_epoch, max(len(parts) for parts in cuts)
        found = [self.make(chosen[part], epoch) for part in cuts[self.rank]]
        return found + [self._nothing()] * (most - len(found))

    def make(self, indices: Indices, epoch: int = 0) -> PictureBatch:
        """The batch of these pictures, as they are in this epoch."""
        raw = torch.from_numpy(self.pictures.pixels[indices]).permute(0, 3, 1, 2).float() / 255
        views = [
            raw if self.augment is None else augmented(raw, self._draws(epoch, view)[indices], self.augment)
            for view in range(self.views)
        ]
        labels = self.pictures.labels
        return PictureBatch(
            ((torch.cat(views) - self._mean) / self._std).contiguous(),
            torch.from_numpy(labels[indices]) if labels is not None else torch.full((len(indices),), -1),
            torch.from_numpy(indices),
            self.patch,
            self.views,
            tuple(self.texts[i] for i in indices) if self.texts is not None else (),
        )

    def all(self, most: int | None = None) -> Sequence[PictureBatch]:
        """This rank's share of all pictures, in order, for measuring: batches of at most `most` (none: `micro`), made
        when they are asked for. Every rank has as many."""
        return _Share(self, most or self.micro)

    def _make_order(self, epoch: int) -> Indices:
        count = len(self.pictures)
        return permutation(count, self.seed, epoch) if self.shuffle else np.arange(count)

    def _make_draws(self, epoch: int, view: int) -> NDArray[np.float32]:
        raw = np.random.Philox(np.random.SeedSequence((self.seed, 77, epoch, view))).random_raw(
            len(self.pictures) * DRAWS
        )
        return ((raw >> np.uint64(11)) * 2.0**-53).astype(np.float32).reshape(-1, DRAWS)

    def _nothing(self) -> PictureBatch:
        # What a rank runs beside others that still have pictures: one without a label and without a number.
        batch = self.make(np.zeros(1, np.int64))
        return replace(batch, labels_B=torch.full((1,), -1), indices_B=torch.full((1,), -1))


class _Share(Sequence[PictureBatch]):
    def __init__(self, loader: PictureLoader, most: int) -> None:
        self._loader, self._most = loader, most
        self._indices = np.arange(loader.rank, len(loader.pictures), loader.world)

    def __len__(self) -> int:
        each = -(-len(self._loader.pictures) // self._loader.world)  # of the rank that has most
        return -(-each // self._most)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        mine = self._indices[number * self._most : (number + 1) * self._most]
        return self._loader.make(mine) if len(mine) else self._loader._nothing()


def augmented(pixels_BCHW: Tensor, draws: NDArray[np.float32], how: AugmentSettings) -> Tensor:
    """Pictures (0 to 1) changed by their draws [B, DRAWS] (0 to 1): one affine map each, then colours, then a blot.

    Beyond the edge of a picture is what stands at its edge.
    """
    count, _, height, width = pixels_BCHW.shape
    u = torch.from_numpy(draws)
    if how.crop < 1 or how.shift or how.flip:
        area = how.crop + (1 - how.crop) * u[:, 0]
        aspect = torch.exp((2 * u[:, 1] - 1) * 0.2877) if how.crop < 1 else torch.ones(count)  # 3/4 to 4/3
        wide, high = ((area * a).sqrt().clamp(max=1) for a in (aspect, 1 / aspect))
        right = (2 * u[:, 2] - 1) * (1 - wide + 2 * how.shift)
        down = (2 * u[:, 3] - 1) * (1 - high + 2 * how.shift)
        mirror = torch.where(u[:, 4] < 0.5, -1.0, 1.0) if how.flip else torch.ones(count)
        nothing = torch.zeros(count)
        maps = torch.stack((wide * mirror, nothing, right, nothing, high, down), 1).view(count, 2, 3)
        grid = F.affine_grid(maps, list(pixels_BCHW.shape), align_corners=False)
        pixels_BCHW = F.grid_sample(pixels_BCHW, grid, padding_mode="border", align_corners=False)
    if how.colour:
        bright, contrast = (1 + how.colour * (2 * u[:, i, None, None, None] - 1) for i in (5, 6))
        mean = pixels_BCHW.mean((1, 2, 3), keepdim=True)
        pixels_BCHW = ((pixels_BCHW - mean) * contrast + mean * bright).clamp(0, 1)
    if how.erase:
        high, wide = (0.2 + 0.3 * u[:, i] for i in (7, 8))
        top, left = u[:, 9] * (1 - high), u[:, 10] * (1 - wide)
        rows, columns = (torch.arange(n) / n for n in (height, width))
        inside = (rows >= top[:, None]) & (rows < (top + high)[:, None])
        across = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
        chosen = u[:, 11] < how.erase
        blot = (inside[:, :, None] & across[:, None, :] & chosen[:, None, None])[:, None]
        pixels_BCHW = torch.where(blot, pixels_BCHW.mean((2, 3), keepdim=True), pixels_BCHW)
    return pixels_BCHW
