"""Masks drawn on their picture, for the eye: tinted, with a bright edge, and what was pointed at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from craton.modalities.image.files import Pixels

SMALLEST, LARGEST = 640, 2048  # pixels of the longer side of a drawing
TINT, SPOTLIGHT_TINT = 0.5, 0.3  # how much of a mask's pixels is its colour
GAP: Final = 12  # pixels between drawings that stand side by side
GOLDEN: Final = 137.508  # degrees from one hue to the next: any number of them stay apart
FIRST_HUE: Final = 250.0
INSIDE, OUTSIDE = (46, 204, 113), (235, 64, 52)  # points, as most annotation tools colour them
WHITE: Final = (255, 255, 255)


def drawing_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which masks of a picture of this size are drawn: small pictures are enlarged a whole number
    of times, large ones made smaller."""
    longest = max(height, width)
    ratio = max(1, SMALLEST // longest) if longest <= LARGEST else LARGEST / longest
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def draw_masks(
    pixels: Pixels,
    masks_HW: Iterable[NDArray[np.bool_]],
    *,
    points: Sequence[tuple[float, float]] = (),
    labels: Sequence[int] = (),
    box: Sequence[float] | None = None,
    spotlight: bool = False,
    first: int = 0,
) -> Pixels:
    """Masks on a picture, each in a colour of its own, the smaller over the larger.

    masks_HW: over the picture, at its `drawing_size`, which the drawing has, too. points, labels (1 inside, 0 outside),
    box: the prompt, in the picture's pixels. spotlight: what is in no mask is darkened. first: the number of the first
    mask's colour.
    """
    from PIL import Image

    masks = list(masks_HW)
    height, width = drawing_size(*pixels.shape[:2])
    shown = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    drawn_HW3: NDArray[np.float32] = np.array(shown, np.float32) / np.float32(255)
    if spotlight:
        lit_HW1 = _soft(np.logical_or.reduce(masks), 1.5)[..., None] if masks else np.float32(0)
        grey_HW1 = drawn_HW3 @ np.array((0.2126, 0.7152, 0.0722), np.float32)[:, None]
        dark_HW3 = 0.55 * (0.45 * drawn_HW3 + 0.55 * grey_HW1)
        drawn_HW3 = np.asarray(dark_HW3 + lit_HW1 * (drawn_HW3 - dark_HW3), np.float32)
    thick = max(height, width) / 500
    tint = SPOTLIGHT_TINT if spotlight else TINT
    there = [(number, mask_HW) for number, mask_HW in enumerate(masks, first) if mask_HW.any()]
    for number, mask_HW in sorted(there, key=lambda one: -int(one[1].sum())):
        hue, near = FIRST_HUE + GOLDEN * number, _around(mask_HW, margin=ceil(4 * thick))
        part_HW3 = _over(drawn_HW3[near], _soft(mask_HW[near], 0.7) * tint, _colour(0.68, hue))
        # Where a blurred mask is half there, its edge runs.
        edge_HW = 0.95 * np.clip(1.6 - 3.2 * np.abs(_soft(mask_HW[near], thick) - 0.5), 0, 1)
        drawn_HW3[near] = _over(part_HW3, edge_HW.astype(np.float32), _colour(0.88, hue))
    image = Image.fromarray(np.rint(np.clip(drawn_HW3, 0, 1) * 255).astype(np.uint8))
    ratio = (width / pixels.shape[1], height / pixels.shape[0])
    middles = [((x + 0.5) * ratio[0], (y + 0.5) * ratio[1]) for x, y in points]
    edges = None if box is None else [edge * ratio[number % 2] for number, edge in enumerate(box)]
    return np.array(_with_prompt(image, middles, labels, edges))


def side_by_side(drawings: Sequence[Pixels]) -> Pixels:
    """Drawings of one size in a row, white between them."""
    gap = np.full((len(drawings[0]), GAP, 3), 255, np.uint8)
    return np.concatenate([part for drawing in drawings for part in (gap, drawing)][1:], 1)


def _around(mask_HW: NDArray[np.bool_], margin: int) -> tuple[slice, slice]:
    """Rows and columns of what is True and so many more: of a whole picture, most masks are a small part."""
    sides = [np.flatnonzero(mask_HW.any(axis)) for axis in (1, 0)]
    rows, columns = (slice(max(0, int(side[0]) - margin), int(side[-1]) + 1 + margin) for side in sides)
    return rows, columns


def _over(
    under_HW3: NDArray[np.float32], cover_HW: NDArray[np.float32], colour_3: NDArray[np.float32]
) -> NDArray[np.float32]:
    cover_HW1 = cover_HW[..., None]
    return np.asarray(under_HW3 * (1 - cover_HW1) + colour_3 * cover_HW1, np.float32)


def _soft(mask_HW: NDArray[np.bool_], radius: float) -> NDArray[np.float32]:
    from PIL import Image, ImageFilter

    image = Image.fromarray(mask_HW.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, np.float32) / np.float32(255)


def _with_prompt(
    image: Any, points: Sequence[tuple[float, float]], labels: Sequence[int], box: Sequence[float] | None
) -> Any:
    """The prompt on a picture, drawn several times as large and made smaller, which rounds off its steps."""
    from PIL import Image, ImageDraw

    if not points and box is None:
        return image
    finer, size = max(2, 4 * SMALLEST // max(image.size)), max(image.size) / 100
    layer = Image.new("RGBA", (image.width * finer, image.height * finer), (*WHITE, 0))
    pen = ImageDraw.Draw(layer)
    if box is not None:
        pen.rectangle([edge * finer for edge in box], outline=(*WHITE, 255), width=round(size * 0.35 * finer) or 1)
    for (x, y), label in zip(points, labels, strict=True):
        for radius, colour in ((size * 1.25, WHITE), (size * 0.85, INSIDE if label else OUTSIDE)):
            around = [(x - radius) * finer, (y - radius) * finer, (x + radius) * finer, (y + radius) * finer]
            pen.ellipse(around, fill=(*colour, 255))
    layer = layer.resize(image.size, Image.Resampling.BOX)
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def _colour(lightness: float, hue: float) -> NDArray[np.float32]:
    """An sRGB colour (0 to 1) by lightness and hue in degrees, so that all hues look equally bright: OKLCH (Ottosson
    2020)."""
    chroma, angle = 0.15, np.deg2rad(hue)
    a, b = chroma * np.cos(angle), chroma * np.sin(angle)
    to_lms = np.array(
        ((1, 0.3963377774, 0.2158037573), (1, -0.1055613458, -0.0638541728), (1, -0.0894841775, -1.291485548))
    )
    to_rgb = np.array(
        (
            (4.0767416621, -3.3077115913, 0.2309699292),
            (-1.2684380046, 2.6097574011, -0.3413193965),
            (-0.0041960863, -0.7034186147, 1.707614701),
        )
    )
    linear = np.clip(to_rgb @ (to_lms @ (lightness, a, b)) ** 3, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).astype(np.float32)
