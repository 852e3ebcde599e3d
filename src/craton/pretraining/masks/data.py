"""Where masks come from: cut-outs with an alpha channel, and COCO's annotations. All of it stays in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from craton.data.pictures import MOST_BYTES
from craton.errors import DataError, UsageError
from craton.modalities.image import Pixels, list_images, read_alpha, read_image
from craton.pretraining.masks.coco import read_coco
from craton.pretraining.masks.draws import Draws
from craton.pretraining.masks.scenes import Annotated, Scene, annotated, pasted
from craton.pretraining.masks.settings import SceneSettings

OPAQUE: Final = 128  # of 255: what belongs to a cut-out
FEWEST: Final = 16  # opaque pixels of a cut-out
ROOM: Final = 3  # backgrounds are kept so many times as large as a scene, as squares of them are enlarged
REPORT_EVERY: Final = 500


@dataclass(frozen=True)
class MaskSet:
    """What scenes are made of. cutouts: [h, w, 4] each, colours multiplied by the opacity, which is the last.
    pictures: with masks of things in them. backgrounds: [h, w, 3] each. size: side of a scene. origins: of the
    cut-outs, then of the pictures. skipped: pictures without anything transparent or opaque."""

    cutouts: tuple[Pixels, ...]
    pictures: tuple[Annotated, ...]
    backgrounds: tuple[Pixels, ...]
    size: int
    origins: tuple[str, ...]
    skipped: int = 0

    def __len__(self) -> int:
        """Scenes of an epoch: every cut-out is the main thing of one, every picture is one."""
        return len(self.cutouts) + len(self.pictures)

    @property
    def digest(self) -> str:
        """SHA-256 of all that is learnt, in order."""
        state = hashlib.sha256(repr((self.size, len(self.cutouts), len(self.pictures))).encode())
        arrays = [*self.cutouts, *(part for one in self.pictures for part in (one.pixels, one.bits))]
        for array in (*arrays, *self.backgrounds):
            state.update(repr(array.shape).encode())
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def scene(self, place: int, settings: SceneSettings, draws: Draws) -> Scene:
        """Scene number `place` of an epoch."""
        if place < len(self.cutouts):
            return pasted(self.cutouts, place, self.backgrounds, settings, self.size, draws)
        return annotated(self.pictures[place - len(self.cutouts)], settings, self.size, draws)

    def take(self, places: NDArray[np.int64]) -> MaskSet:
        """These cut-outs and pictures, on the same backgrounds."""
        count = len(self.cutouts)
        return replace(
            self,
            cutouts=tuple(self.cutouts[i] for i in places if i < count),
            pictures=tuple(self.pictures[i - count] for i in places if i >= count),
            origins=tuple(self.origins[i] for i in places),
        )

    def split(self, share: float, seed: int) -> tuple[MaskSet, MaskSet]:
        """(the rest, a random `share` of cut-outs and pictures): none if the share is 0, at least one otherwise."""
        count = min(max(1, round(share * len(self))), len(self) - 1) if share else 0
        order = np.random.default_rng((seed, 1)).permutation(len(self))
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))


def read_masks(
    sources: Sequence[str],
    *,
    size: int,
    backgrounds: Sequence[str] = (),
    images: str | None = None,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> MaskSet:
    """Everything of `sources`, for scenes of `size` x `size` pixels.

    A source is a folder of cut-outs (pictures with an alpha channel; others are skipped and counted) or a file of
    COCO's annotations (.json), whose pictures lie beside it or in `images`. backgrounds: pictures, or folders of them.

    Raises UsageError for what is not there or too large, DataError for data without a mask, FileFormatError for files
    that are no pictures or no annotations.
    """
    cutouts: list[Pixels] = []
    pictures: list[Annotated] = []
    origins: tuple[list[str], list[str]] = [], []
    room, skipped = _Room(), 0
    for source in sources:
        on_progress(f"reading {source}")
        path = Path(source).expanduser()
        if path.is_dir():
            for file in list_images(path):
                cutout = read_cutout(file, size)
                if cutout is None:
                    skipped += 1
                    continue
                room.take(cutout)
                cutouts.append(cutout)
                origins[0].append(str(file))
        elif path.suffix.lower() == ".json" and path.is_file():
            for origin, pixels, masks in read_coco(path, size, images):
                pictures.append(Annotated(pixels, np.packbits(masks.reshape(len(masks), -1), axis=1)))
                room.take(pictures[-1].pixels, pictures[-1].bits)
                origins[1].append(origin)
                if len(pictures) % REPORT_EVERY == 0:
                    on_progress(f"{len(pictures):,} pictures read")
        else:
            raise UsageError(
                "this is neither a folder of cut-outs nor a file of COCO's annotations",
                where=source,
                remedy="name a folder of pictures with an alpha channel, or instances.json",
            )
    if not cutouts and not pictures:
        raise DataError(
            f"there is no mask in it ({skipped:,} pictures have nothing transparent, or nothing else)",
            where=", ".join(sources),
            remedy="cut-outs are PNG or WebP files whose background is transparent",
        )
    behind = []
    for pixels in _backgrounds(backgrounds, ROOM * size):
        room.take(pixels)
        behind.append(pixels)
    return MaskSet(tuple(cutouts), tuple(pictures), tuple(behind), size, tuple(origins[0] + origins[1]), skipped)


def read_cutout(path: Path, size: int) -> Pixels | None:
    """What is not transparent of a picture, at most `size` long: [h, w, 4], uint8, colours multiplied by the opacity;
    None for a picture that is all or nearly nothing.

    Raises what `craton.modalities.image.read_image` raises.
    """
    from PIL import Image

    alpha = read_alpha(path)
    if alpha is None or int((alpha >= OPAQUE).sum()) < FEWEST or alpha.min() >= OPAQUE:
        return None
    # Colours come laid on white, which is taken off again.
    pixels = read_image(path).astype(np.int16) - (255 - alpha[..., None].astype(np.int16))
    rows, columns = (np.flatnonzero((alpha > 0).any(axis)) for axis in (1, 0))
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    whole = np.concatenate((np.clip(pixels, 0, 255).astype(np.uint8), alpha[..., None]), 2)[part]
    height, width = whole.shape[:2]
    scale = min(1.0, size / max(height, width))
    sides = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.frombytes("RGBX", (width, height), np.ascontiguousarray(whole).tobytes())
    small = np.asarray(image.resize(sides, Image.Resampling.BOX))
    return small if int((small[..., 3] >= OPAQUE).sum()) >= FEWEST else None


def _backgrounds(sources: Sequence[str], shortest: int) -> Iterator[Pixels]:
    from PIL import Image

    for source in sources:
        path = Path(source).expanduser()
        if not path.exists():
            raise UsageError("there is no such file or folder", where=source, remedy="check --backgrounds")
        files = list_images(path) if path.is_dir() else [path]
        if not files:
            raise UsageError("there are no pictures", where=source, remedy="check --backgrounds")
        for file in files:
            pixels = read_image(file)
            scale = min(1.0, shortest / min(pixels.shape[:2]))
            sides = tuple(max(1, round(side * scale)) for side in (pixels.shape[1], pixels.shape[0]))
            yield np.asarray(Image.fromarray(pixels).resize(sides, Image.Resampling.BOX))


class _Room:
    """Counts bytes, and stops before memory does."""

    def __init__(self) -> None:
        self._bytes = 0

    def take(self, *arrays: NDArray[np.uint8]) -> None:
        self._bytes += sum(array.nbytes for array in arrays)
        if self._bytes > MOST_BYTES:
            raise UsageError(
                f"the pictures and masks do not fit {MOST_BYTES >> 30} GiB",
                remedy="take fewer, or a smaller --image-size",
            )
