"""Where pictures for training come from: folders, records and IDX files, all as one array of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from craton.data.idx import is_idx, labels_of, read_idx
from craton.data.labels import LabelMap
from craton.data.records import read_records
from craton.errors import DataError, FileFormatError, UsageError
from craton.modalities.image import ImagePreprocessing, Pixels, list_images, read_image

MOST_BYTES: Final = 8 * 1024**3  # of all pictures together, which stay in memory
TABLES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
REPORT_EVERY: Final = 500


class _Found(NamedTuple):
    pixels: Pixels  # [H, W, 3] or [H, W]
    label: str | None
    caption: str | None
    origin: str


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one size. pixels [N, H, W, channels], uint8. labels [N]: numbers of `names`; None without classes.
    captions: a text for each, or None. origins: where each came from."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    names: tuple[str, ...]
    captions: tuple[str, ...] | None
    origins: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def digest(self) -> str:
        """SHA-256 of all that is learnt, in order."""
        state = hashlib.sha256(repr(self.pixels.shape).encode())
        state.update(np.ascontiguousarray(self.pixels).data)
        state.update(b"" if self.labels is None else self.labels.tobytes())
        state.update(repr((self.names, self.captions)).encode())
        return state.hexdigest()

    def take(self, indices: NDArray[np.int64]) -> PictureSet:
        """These pictures, in this order."""
        return replace(
            self,
            pixels=self.pixels[indices],
            labels=None if self.labels is None else self.labels[indices],
            captions=None if self.captions is None else tuple(self.captions[i] for i in indices),
            origins=tuple(self.origins[i] for i in indices),
        )

    def split(self, share: float, seed: int) -> tuple[PictureSet, PictureSet]:
        """(the rest, a random `share` of the pictures): none if the share is 0, at least one otherwise."""
        count = min(max(1, round(share * len(self))), len(self) - 1) if share else 0
        order = np.random.default_rng((seed, 1)).permutation(len(self))
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))


def read_pictures(
    sources: Sequence[str],
    *,
    size: int,
    channels: Literal[1, 3] = 3,
    names: Sequence[str] = (),
    shape: ImagePreprocessing | None = None,
    labelled: bool = True,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> PictureSet:
    """Every picture of `sources`, its shorter side resized to `size` and the middle square of it.

    A source is a folder whose subfolders are classes, a folder of pictures, an IDX file of pictures (its labels are
    taken from the file beside it), or a table (.jsonl, .csv ...) of records {"image": PATH, "label": ..., "caption":
    ...} whose paths are relative to it. Either all pictures have a label or none has; so for captions. names: the
    classes, where they are known already. shape: how a model prepares pictures, where it is to see them as it will
    later. labelled: false to pay no heed to labels.

    Raises UsageError for what is not there or too large, DataError for classes that do not fit, FileFormatError for
    files that are no pictures.
    """
    shape = shape or ImagePreprocessing.square(size, channels=channels)
    if shape.floating:
        raise UsageError("pictures for this model are prepared in floating point", remedy="take a ViT or a DINOv2")
    pixels: list[NDArray[np.uint8]] = []
    labels: list[str | None] = []
    captions: list[str | None] = []
    origins: list[str] = []
    for source in sources:
        on_progress(f"reading {source}")
        for found in _read(Path(source).expanduser()):
            if size * size * channels * (len(pixels) + 1) > MOST_BYTES:
                raise UsageError(
                    f"more than {len(pixels):,} pictures of {size} x {size} do not fit {MOST_BYTES >> 30} GiB",
                    remedy="take fewer, or a smaller --image-size",
                )
            pixels.append(_squared(found.pixels, shape))
            labels.append(found.label if labelled else None)
            captions.append(found.caption)
            origins.append(found.origin)
            if len(pixels) % REPORT_EVERY == 0:
                on_progress(f"{len(pixels):,} pictures read")
    if not pixels:
        raise UsageError(
            "there are no pictures", where=", ".join(sources), remedy="name a folder, a table or IDX files"
        )
    numbers, classes = _numbered(labels, origins, names)
    texts = _all_or_none(captions, origins, "caption")
    return PictureSet(np.stack(pixels), numbers, classes, texts, tuple(origins))


def _squared(pixels: Pixels, shape: ImagePreprocessing) -> NDArray[np.uint8]:
    if pixels.shape[:2] == shape.size and pixels.ndim == 2 and shape.channels == 1:
        return pixels[..., None]
    whole = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)
    return np.moveaxis(shape.resized(whole), 0, 2)


def _read(path: Path) -> Iterator[_Found]:
    if path.is_dir():
        yield from _read_folder(path)
    elif not path.is_file():
        raise UsageError("there is no such file or folder", where=str(path), remedy="check the path")
    elif is_idx(path):
        yield from _read_idx(path)
    elif path.suffix.lower() in TABLES:
        yield from _read_table(path)
    else:
        yield _Found(read_image(path), None, None, str(path))


def _read_folder(folder: Path) -> Iterator[_Found]:
    files = list_images(folder)
    # Subfolders are classes where every picture lies in one.
    classes = all(len(path.relative_to(folder).parts) > 1 for path in files)
    for path in files:
        yield _Found(read_image(path), path.relative_to(folder).parts[0] if classes else None, None, str(path))


def _read_idx(path: Path) -> Iterator[_Found]:
    pictures, beside = read_idx(path), labels_of(path)
    if pictures.ndim != 3:
        raise FileFormatError(f"an array of {pictures.ndim} dimensions is no series of pictures", where=str(path))
    labels = read_idx(beside) if beside is not None else None
    if labels is not None and labels.shape != pictures.shape[:1]:
        raise FileFormatError(f"{len(pictures)} pictures, but labels {list(labels.shape)}", where=str(beside))
    for number, pixels in enumerate(pictures):
        yield _Found(pixels, None if labels is None else str(labels[number]), None, f"{path}#{number}")


def _read_table(path: Path) -> Iterator[_Found]:
    for record in read_records(path):
        image, label, caption = (record.value.get(key) for key in ("image", "label", "caption"))
        if not isinstance(image, str):
            raise DataError(
                "a record of a picture names its file", where=record.origin, remedy='write {"image": "a.png", ...}'
            )
        if not (caption is None or isinstance(caption, str)):
            raise DataError("a caption is a text", where=record.origin)
        yield _Found(
            read_image(path.parent / image),
            None if label is None or label == "" else str(label),
            caption or None,
            record.origin,
        )


def _numbered(
    labels: Sequence[str | None], origins: Sequence[str], names: Sequence[str]
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    whole = _all_or_none(labels, origins, "label")
    if whole is None:
        return None, ()
    classes = tuple(names) or LabelMap.of(iter(whole)).names
    known = {name: number for number, name in enumerate(classes)}
    strange = next((i for i, label in enumerate(whole) if label not in known), None)
    if strange is not None:
        raise DataError(
            f"the class {whole[strange]!r} is not among the model's",
            where=origins[strange],
            remedy=f"its classes: {', '.join(classes[:20])}",
        )
    return np.array([known[label] for label in whole], np.int64), classes


def _all_or_none(values: Sequence[str | None], origins: Sequence[str], what: str) -> tuple[str, ...] | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    if len(there) < len(values):
        raise DataError(
            f"{len(values) - len(there)} of {len(values)} pictures have no {what}",
            where=origins[values.index(None)],
            remedy=f"give every picture a {what}, or none",
        )
    return tuple(there)
