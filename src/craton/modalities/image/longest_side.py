"""Pictures for a model that looks at one square: resized by their longer side and filled up to the right and below, as
Segment Anything does it (Kirillov 2023, arXiv 2304.02643); and what it finds there back at the picture's own size."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt

from craton.config import Settings
from craton.errors import CheckpointError
from craton.modalities.image.files import Pixels
from craton.modalities.image.preprocessing import (
    FILTERS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Filter,
    ImagePreprocessing,
    from_hf,
    processor_kind,
    processor_values,
)

LARGEST: Final = 4096  # pixels of the square's side

# What the published processor does where its file says nothing.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "size": {"longest_edge": 1024}, "mask_size": {"longest_edge": 256}, "resample": 2,
    "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "do_pad": True, "do_resize": True,
}  # fmt: skip


class SquarePreparation(Settings):
    """How a picture is laid into a square. side: of the square, in pixels. mask: side of the masks that the model draws
    over it. The picture is resized so that its longer side fills the square, rescaled (times `rescale`), normalised by
    `mean` and `std`, and filled up with zeros to the right and below."""

    side: PositiveInt = Field(default=1024, le=LARGEST)
    mask: PositiveInt = Field(default=256, le=LARGEST)
    filter: Filter = "bilinear"
    rescale: PositiveFloat = 1 / 255
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the square that a picture of this size takes; the rest is filled up."""
        ratio = self.side / max(height, width)
        # A line of one pixel's width stays one.
        return max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))

    def prepare(self, pixels_HWC: Pixels) -> tuple[NDArray[np.float32], tuple[float, float]]:
        """pixels [H, W, 3], uint8 -> fp32 [3, side, side], and by what an x and a y of the picture are multiplied to
        become those of the square. The two differ a little, because sides are whole numbers."""
        height, width = pixels_HWC.shape[:2]
        rows, columns = self.fitted(height, width)
        square_3SS = np.zeros((3, self.side, self.side), np.float32)
        square_3SS[:, :rows, :columns] = self._pixels(rows, columns).prepare(pixels_HWC)
        return square_3SS, (columns / width, rows / height)

    def restore(self, logits_Mhw: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
        """Masks over the square, at any resolution, -> fp32 [M, height, width] over the picture of this size.

        They are enlarged to the square, what was filled up is cut off, and the rest takes the picture's size, each time
        by bilinear interpolation.
        """
        rows, columns = self.fitted(height, width)
        down_Hh = _interpolation(logits_Mhw.shape[1], self.side, rows, height)
        across_Ww = _interpolation(logits_Mhw.shape[2], self.side, columns, width)
        return np.asarray(down_Hh @ logits_Mhw @ across_Ww.T, np.float32)

    def covered(self, logits_Mhw: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
        """The part of masks over the square, [M, h', w'], that lies on a picture of this size, at their resolution."""
        rows, columns = self.fitted(height, width)
        kept = (-(-rows * logits_Mhw.shape[1] // self.side), -(-columns * logits_Mhw.shape[2] // self.side))
        return logits_Mhw[:, : kept[0], : kept[1]]

    def to_config(self) -> dict[str, Any]:
        """The `preprocessor_config.json` from which transformers prepares pictures in the same way."""
        return {
            "image_processor_type": "SamImageProcessor",
            "size": {"longest_edge": self.side},
            "pad_size": {"height": self.side, "width": self.side},
            "mask_size": {"longest_edge": self.mask},
            "mask_pad_size": {"height": self.mask, "width": self.mask},
            "do_resize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": FILTERS.index(self.filter),
            "rescale_factor": self.rescale,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @classmethod
    def read(cls, folder: Path) -> SquarePreparation:
        """What the files of a checkpoint say. Raises CheckpointError where they say nothing, or what is not known."""
        return cls.from_config(*processor_values(folder))

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> SquarePreparation:
        """A `preprocessor_config.json` of SAM.

        Raises CheckpointError for another type of processor, and for an option that is not known: pixels that are
        prepared in another way give other masks.
        """
        kind = processor_kind(values)
        if kind != "Sam":
            raise CheckpointError(
                f"pictures are prepared by {kind or 'nobody'!r}, which lays them into no square",
                where=where,
                remedy="known: SamImageProcessor",
            )
        options = {**_DEFAULTS, **{key: value for key, value in values.items() if value is not None}}
        side, mask = (_edge(options.pop(key), key, where) for key in ("size", "mask_size"))
        for key, wanted in (("pad_size", side), ("mask_pad_size", mask)):
            if options.pop(key, {"height": wanted, "width": wanted}) != {"height": wanted, "width": wanted}:
                _no(f"the square has sides of {wanted}, so {key!r} has them too", key, where)
        for key in ("do_pad", "do_resize"):
            if not options[key]:
                _no("pictures that keep their size fill no square", key, where)
        del options["do_pad"]
        # What is left is what a processor that resizes to a square knows as well.
        square = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
        pixels = from_hf({**options, **square}, where)
        if pixels.channels != 3 or pixels.crop:
            raise CheckpointError("the square is of three colours, and nothing is cropped", where=where)
        return cls(side=side, mask=mask, filter=pixels.filter, rescale=pixels.rescale, mean=pixels.mean, std=pixels.std)

    def _pixels(self, rows: int, columns: int) -> ImagePreprocessing:
        return ImagePreprocessing(
            size=(rows, columns), filter=self.filter, rescale=self.rescale, mean=self.mean, std=self.std
        )


@lru_cache(maxsize=4)
def _interpolation(mask: int, side: int, kept: int, out: int) -> NDArray[np.float32]:
    # [out, mask]: enlarging to the square, cutting off and resizing are linear, so that one product does all three.
    return _stretched(_stretched(np.eye(mask, dtype=np.float32), side)[:kept], out)


def _stretched(values_NX: NDArray[np.float32], out: int) -> NDArray[np.float32]:
    """So many rows of others, by linear interpolation; the pixels' outer edges lie on each other."""
    size = len(values_NX)
    at = np.clip((np.arange(out) + 0.5) * (size / out) - 0.5, 0, size - 1)
    before = np.floor(at).astype(int)
    after, part_N1 = np.minimum(before + 1, size - 1), (at - before).astype(np.float32)[:, None]
    return values_NX[before] * (1 - part_N1) + values_NX[after] * part_N1


def _edge(value: Any, key: str, where: str) -> int:
    edge = value.get("longest_edge") if isinstance(value, dict) else None
    if not isinstance(edge, int) or isinstance(edge, bool) or not 0 < edge <= LARGEST or len(value) > 1:
        _no(f"{key!r} is not {{'longest_edge': N}} with N from 1 to {LARGEST}", key, where)
    return edge


def _no(what: str, key: str, where: str) -> NoReturn:
    raise CheckpointError(what, where=f"{where}: key {key!r}")
