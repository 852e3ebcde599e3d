"""COCO's annotations: which pictures there are, and the outlines of the things in them (polygons or run lengths)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from craton.data.json_values import parse_json
from craton.errors import DataError, FileFormatError, UsageError
from craton.modalities.image import Pixels, decode_rle, read_image
from craton.modalities.image.longest_side import SquarePreparation

MOST_JSON: Final = 1 << 30  # bytes of a file
MOST_CROSSINGS: Final = 1 << 22  # of an outline's edges and the rows of a picture


def read_coco(path: Path, size: int, images: str | None = None) -> Iterator[tuple[str, Pixels, NDArray[np.bool_]]]:
    """Every picture with an outlined thing: where it came from, its pixels [h, w, 3] with the longer side resized to
    `size`, and masks [M, h, w]. Crowds and things that vanish at this size are left out.

    images: the folder of the pictures (none: the file's own). Raises FileFormatError for what is no such file,
    DataError for a picture of another size than was outlined, and what `read_image` raises.
    """
    from PIL import Image

    document = _document(path)
    folder = Path(images).expanduser() if images is not None else path.parent
    outlines = _outlines(document, path)
    for number, image in enumerate(document["images"]):
        where = f"{path}: images[{number}]"
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
            _refuse("a picture has an id and a file_name", where)
        found = outlines.get(_key(image["id"], where), [])
        if not found:
            continue
        pixels = read_image(folder / image["file_name"])
        height, width = pixels.shape[:2]
        said = image.get("height", height), image.get("width", width)
        if said != (height, width):
            raise DataError(
                f"the picture is {height} x {width}, and {said[0]} x {said[1]} was outlined",
                where=str(folder / image["file_name"]),
                remedy="take the pictures that the annotations were made for",
            )
        rows, columns = SquarePreparation(side=size).fitted(height, width)
        small = (
            Image.fromarray(mask_of(outline, height, width, place).astype(np.uint8) * 255).resize(
                (columns, rows), Image.Resampling.BOX
            )
            for place, outline in found
        )
        masks = [mask for mask in (np.asarray(one) >= 128 for one in small) if mask.any()]
        if masks:
            resized = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR))
            yield str(folder / image["file_name"]), resized, np.stack(masks)


def mask_of(outline: Any, height: int, width: int, where: str) -> NDArray[np.bool_]:
    """The mask [H, W] of a `segmentation`: polygons [[x0, y0, x1, y1, ...], ...] or run lengths.

    Raises FileFormatError for anything else.
    """
    if isinstance(outline, dict):
        mask = decode_rle(outline, where)
        if mask.shape != (height, width):
            _refuse(f"a mask of {list(mask.shape)} for a picture of {height} x {width}", where)
        return mask
    if not isinstance(outline, list) or not outline or not all(_is_polygon(polygon) for polygon in outline):
        _refuse("an outline is a list of polygons [x0, y0, x1, y1, x2, y2, ...] or run lengths", where)
    mask = np.zeros((height, width), np.bool_)
    for polygon in outline:
        mask |= _filled(np.array(polygon, np.float64).reshape(-1, 2), height, width, where)
    return mask


def _filled(corners_N2: NDArray[np.float64], height: int, width: int, where: str) -> NDArray[np.bool_]:
    """The pixels [H, W] whose middles lie inside a polygon of (x, y): those with an odd number of its edges to their
    left, in their row."""
    (x_N, y_N), (next_x_N, next_y_N) = corners_N2.T, np.roll(corners_N2, -1, 0).T
    low_N, high_N = np.minimum(y_N, next_y_N), np.maximum(y_N, next_y_N)
    first_N, end_N = (np.clip(np.ceil(edge - 0.5), 0, height).astype(np.int64) for edge in (low_N, high_N))
    counts_N = end_N - first_N
    if counts_N.sum() > MOST_CROSSINGS:
        _refuse(f"the outline crosses more than {MOST_CROSSINGS:,} rows", where)
    edges = np.repeat(np.arange(len(counts_N)), counts_N)
    rows = np.arange(len(edges)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N) + first_N[edges]
    share = (rows + 0.5 - y_N[edges]) / (next_y_N - y_N)[edges]
    at = x_N[edges] + share * (next_x_N - x_N)[edges]
    columns = np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)
    crossings = np.zeros((height, width + 1), np.int32)
    np.add.at(crossings, (rows, columns), 1)
    return crossings[:, :width].cumsum(1) % 2 == 1


def _document(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MOST_JSON:
            raise FileFormatError(f"more than {MOST_JSON >> 30} GiB", where=str(path), remedy="split it")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise FileFormatError("the annotations are not UTF-8", where=str(path)) from None
    except OSError as error:
        raise UsageError(f"the annotations cannot be read: {error.strerror}", where=str(path)) from None
    document = parse_json(text, str(path))
    if not isinstance(document, dict) or not all(isinstance(document.get(k), list) for k in ("images", "annotations")):
        _refuse('COCO\'s annotations are {"images": [...], "annotations": [...]}', str(path))
    return document


def _outlines(document: Mapping[str, Any], path: Path) -> dict[int | str, list[tuple[str, Any]]]:
    """For the id of each picture its outlines, and where each stands."""
    found: dict[int | str, list[tuple[str, Any]]] = {}
    for number, one in enumerate(document["annotations"]):
        where = f"{path}: annotations[{number}]"
        if not isinstance(one, dict) or "image_id" not in one or "segmentation" not in one:
            _refuse("an annotation has an image_id and a segmentation", where)
        if not one.get("iscrowd"):
            found.setdefault(_key(one["image_id"], where), []).append((where, one["segmentation"]))
    return found


def _key(value: Any, where: str) -> int | str:
    if not isinstance(value, int | str):
        _refuse("the id of a picture is a number or a text", where)
    return value


def _is_polygon(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(isinstance(n, int | float) and math.isfinite(n) and abs(n) < 1e9 for n in value)
    )


def _refuse(what: str, where: str) -> NoReturn:
    raise FileFormatError(what, where=where, remedy="export the annotations again")
