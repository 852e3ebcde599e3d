"""Pictures in pieces: how Idefics 3 and SmolVLM look at a large picture, and the text that stands for it in a prompt.

The picture is resized, cut into square tiles, and the whole of it is added at a tile's size. Laurençon et al.,
"Building and better understanding vision-language models" (2024); Marafioti et al., "SmolVLM" (2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from craton.config import Settings
from craton.errors import CheckpointError
from craton.modalities.image.files import Pixels
from craton.modalities.image.preprocessing import HALF, ImagePreprocessing, from_hf, processor_kind, processor_values

TYPES: Final = ("Idefics3", "SmolVLM")
LONGEST: Final = 4096  # their processors resize no picture to more

# What stands in the prompt; the tokenisers of both families know these as single tokens.
IMAGE: Final = "<image>"
AROUND: Final = "<fake_token_around_image>"
WHOLE: Final = "<global-img>"

# What their processors do where the file says nothing.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}, "resample": 1,
    "image_mean": HALF, "image_std": HALF, "do_image_splitting": True, "do_resize": True,
}  # fmt: skip
# do_pad: fills up a batch whose pictures have different numbers of tiles, never a tile.
_UNREAD: Final = frozenset(("do_pad", "return_row_col_info", "video_sampling"))


class Grid(NamedTuple):
    """How many tiles a picture is cut into; 0 x 0 where it is not cut and the whole is its only tile."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """How many pictures the model sees: the pieces, row by row, and last the whole."""
        return self.rows * self.columns + 1

    def text(self, tokens: int) -> str:
        """What stands in the prompt in the place of one `<image>`. tokens: how many a tile becomes."""
        marks = IMAGE * tokens
        lines = [
            "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}>{marks}" for column in range(self.columns)) + "\n"
            for row in range(self.rows)
        ]
        return "".join(lines) + ("\n" if lines else "") + f"{AROUND}{WHOLE}{marks}{AROUND}"


class ImageSplitting(Settings):
    """How a picture is cut. longest: its longer side is resized to so many pixels, and then both sides to multiples of
    `tile`. split: False where only the whole is shown. whole: how the whole is prepared, which says how a tile is
    normalised, too."""

    longest: PositiveInt = Field(default=1456, le=LONGEST)
    tile: PositiveInt = 364
    split: bool = True
    whole: ImagePreprocessing = ImagePreprocessing(size=(364, 364), filter="lanczos")

    def grid(self, height: int, width: int) -> Grid:
        """How a picture of this size is cut."""
        if not self.split:
            return Grid(0, 0)
        height, width = self._tiled(*self._resized(height, width))
        grid = Grid(height // self.tile, width // self.tile)
        return grid if grid != (1, 1) else Grid(0, 0)

    def prepare(self, pixels: Pixels) -> NDArray[np.float32]:
        """pixels [H, W, 3], uint8 -> fp32 [tiles, 3, tile, tile], in the order of `Grid`."""
        grid, size = self.grid(*pixels.shape[:2]), self._resized(*pixels.shape[:2])
        resized = self._resize(pixels, *size)
        if not grid.rows:
            return self.whole.prepare(resized)[None]
        # One after the other, as the published processors do: each resizing rounds.
        large = self._resize(resized, *self._tiled(*size))
        prepared = self.whole.model_copy(update={"resize": "no"}).prepare(large)
        cut = prepared.reshape(3, grid.rows, self.tile, grid.columns, self.tile).transpose(1, 3, 0, 2, 4)
        return np.concatenate([cut.reshape(-1, 3, self.tile, self.tile), self.whole.prepare(large)[None]])

    def to_hf(self) -> dict[str, Any]:
        """The `preprocessor_config.json` from which transformers cuts pictures in the same way."""
        return {
            **self.whole.to_hf(),
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": self.longest},
            "max_image_size": {"longest_edge": self.tile},
            "do_image_splitting": self.split,
            "do_pad": True,
        }

    def _resize(self, pixels: Pixels, height: int, width: int) -> Pixels:
        return np.moveaxis(self.whole.resized_to(height, width).resized(pixels), 0, 2)

    # Both sizes come out as the published processors' do, by division in floating point.
    def _resized(self, height: int, width: int) -> tuple[int, int]:
        shape = width / height
        if width >= height:
            short = int(self.longest / shape)
            return max(short + short % 2, 1), self.longest
        short = int(self.longest * shape)
        return self.longest, max(short + short % 2, 1)

    def _tiled(self, height: int, width: int) -> tuple[int, int]:
        shape = width / height
        if width >= height:
            width = self._multiple(width)
            return self._multiple(int(width / shape)), width
        height = self._multiple(height)
        return height, self._multiple(int(height * shape))

    def _multiple(self, side: int) -> int:
        return ceil(side / self.tile) * self.tile


def read_splitting(folder: Path) -> ImageSplitting:
    """What the files of a checkpoint say. Raises CheckpointError where they say nothing, or what is not known."""
    return splitting_from_hf(*processor_values(folder))


def splitting_from_hf(values: Mapping[str, Any], where: str) -> ImageSplitting:
    """A `preprocessor_config.json` of Idefics 3 or SmolVLM.

    Raises CheckpointError for another type of processor, and for an option that is not known.
    """
    kind = processor_kind(values)
    if kind not in TYPES:
        raise CheckpointError(
            f"pictures are prepared by {kind or 'nobody'!r}, which does not cut them",
            where=where,
            remedy=f"known: {', '.join(f'{name}ImageProcessor' for name in TYPES)}",
        )
    given = {key: value for key, value in values.items() if value is not None and key not in _UNREAD}
    options = {**_DEFAULTS, **given}
    longest, tile = (_edge(options.pop(key), key, where) for key in ("size", "max_image_size"))
    split = bool(options.pop("do_image_splitting"))
    if not options["do_resize"]:
        raise CheckpointError("pictures that are not resized cannot be cut", where=f"{where}: key 'do_resize'")
    # What is left is what a processor that resizes to a square knows as well.
    square = {"image_processor_type": "ViTImageProcessor", "size": {"height": tile, "width": tile}}
    whole = from_hf({**options, **square}, where)
    if whole.channels != 3 or whole.crop:
        raise CheckpointError("tiles are of three colours and not cropped", where=where)
    return ImageSplitting(longest=longest, tile=tile, split=split, whole=whole)


def _edge(value: Any, key: str, where: str) -> int:
    edge = value.get("longest_edge") if isinstance(value, dict) else None
    if not isinstance(edge, int) or not 0 < edge <= LONGEST or len(value) > 1:
        raise CheckpointError(
            f"{key!r} is not {{'longest_edge': N}} with N from 1 to {LONGEST}", where=f"{where}: key {key!r}"
        )
    return edge
