"""Scenes with exact masks: cut-outs pasted on backgrounds, and pictures whose things somebody has outlined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from craton.modalities.image import Pixels
from craton.pretraining.masks.draws import Draws
from craton.pretraining.masks.settings import SceneSettings

LEAST: Final = 0.01  # of a scene's pixels: what is seen of a thing that is asked for
CENTRE: Final = 0.12  # the middle of a cut-out is not nearer to an edge than this share of the scene
CROP: Final = 0.4  # the smallest share of a background's shorter side
FLAT, GRADIENT, CLOUDS = range(3)  # kinds of generated backgrounds


@dataclass(frozen=True)
class Scene:
    """pixels [S, S, 3], uint8. masks [M, S, S]: of each thing what is seen of it; M may be 0. height, width: of what
    is picture and not filling below and to the right of it. things [M]: which cut-out each is, or which outline."""

    pixels: Pixels
    masks: NDArray[np.bool_]
    height: int
    width: int
    things: tuple[int, ...]


@dataclass(frozen=True)
class Annotated:
    """pixels [h, w, 3], the longer side as long as a scene's. bits [M, ...]: masks [M, h, w], packed."""

    pixels: Pixels
    bits: NDArray[np.uint8]

    @property
    def masks(self) -> NDArray[np.bool_]:
        """[M, h, w]."""
        height, width = self.pixels.shape[:2]
        flat = np.unpackbits(self.bits, axis=1, count=height * width)
        return flat.reshape(-1, height, width).astype(np.bool_)


def pasted(
    cutouts: Sequence[Pixels],
    main: int,
    backgrounds: Sequence[Pixels],
    settings: SceneSettings,
    size: int,
    draws: Draws,
) -> Scene:
    """Cut-out number `main` and up to `settings.objects` - 1 others on a background.

    cutouts: [h, w, 4], uint8, colours multiplied by the opacity, which is the last. A pixel belongs to a thing if at
    least half of its light comes from there.
    """
    canvas = background(backgrounds, settings, size, draws)
    chosen = [draws.below(len(cutouts)) for _ in range(draws.below(settings.objects))]
    chosen.insert(draws.below(len(chosen) + 1), main)
    shares: list[NDArray[np.float32]] = []
    for number in chosen:
        colours, opacity = placed(cutouts[number], settings, size, draws)
        canvas = canvas * (1 - opacity[..., None]) + colours
        shares = [share * (1 - opacity) for share in shares] + [opacity]
    masks = np.stack(shares) >= 0.5
    seen = masks.sum((1, 2)) >= LEAST * size**2
    things = tuple(number for number, enough in zip(chosen, seen, strict=True) if enough)
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), masks[seen], size, size, things)


def placed(
    cutout: Pixels, settings: SceneSettings, size: int, draws: Draws
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A cut-out at a size and place of chance: its colours [S, S, 3] (0 to 255, times the opacity), its opacity
    [S, S] (0 to 1)."""
    from PIL import Image

    height, width = cutout.shape[:2]
    # Equal shares of each doubling: a uniform draw would make nearly all of them large.
    longest = size * settings.smallest * (settings.largest / settings.smallest) ** draws.between(0, 1)
    sides = tuple(max(1, round(side * longest / max(height, width))) for side in (width, height))
    image = Image.frombytes("RGBX", (width, height), cutout.tobytes())
    values = np.asarray(image.resize(sides, Image.Resampling.BILINEAR), np.float32)
    if settings.flip and draws.chance(0.5):
        values = values[:, ::-1]
    opacity = values[..., 3] / np.float32(255)
    colours = _recoloured(values[..., :3], opacity, settings, draws)
    left, top = (round(size * draws.between(CENTRE, 1 - CENTRE) - side / 2) for side in sides)
    into, part = _overlap(top, left, values.shape[:2], size)
    whole_colours, whole_opacity = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.float32)
    whole_colours[into], whole_opacity[into] = colours[part], opacity[part]
    return whole_colours, whole_opacity


def background(pictures: Sequence[Pixels], settings: SceneSettings, size: int, draws: Draws) -> NDArray[np.float32]:
    """A random square of one of the pictures, or a generated one: [S, S, 3], from 0 to 255."""
    from PIL import Image

    if not pictures or draws.chance(settings.plain):
        return generated(size, draws)
    picture = pictures[draws.below(len(pictures))]
    height, width = picture.shape[:2]
    side = max(1, round(min(height, width) * draws.between(CROP, 1)))
    top, left = (draws.below(length - side + 1) for length in (height, width))
    image = Image.fromarray(picture[top : top + side, left : left + side])
    values = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32)
    if settings.flip and draws.chance(0.5):
        values = values[:, ::-1]
    return _recoloured(values, np.ones((size, size), np.float32), settings, draws)


def generated(size: int, draws: Draws) -> NDArray[np.float32]:
    """A plain, a graded or a cloudy background, with or without grain: [S, S, 3], from 0 to 255."""
    from PIL import Image

    first, second = 255 * draws.many(2, 3).astype(np.float32)
    kind = draws.below(3)
    canvas = np.broadcast_to(first, (size, size, 3))
    if kind == GRADIENT:
        x, y = np.meshgrid(*(np.linspace(-0.5, 0.5, size, dtype=np.float32),) * 2)
        turn = 2 * np.pi * draws.between(0, 1)
        share = 0.5 + (np.cos(turn) * x + np.sin(turn) * y) / np.sqrt(2)
        canvas = first + (second - first) * share[..., None]
    elif kind == CLOUDS:
        cells = 2 + draws.below(max(1, size // 6))
        values = np.rint(255 * draws.many(cells, cells)).astype(np.uint8)
        share = np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
        canvas = first + (second - first) * share[..., None]
    grain = 40 * draws.between(0, 1) ** 2 if draws.chance(0.5) else 0.0
    return np.clip(canvas + grain * (2 * draws.many(size, size, 1).astype(np.float32) - 1), 0, 255)


def annotated(picture: Annotated, settings: SceneSettings, size: int, draws: Draws) -> Scene:
    """An outlined picture in the upper left of a square."""
    height, width = picture.pixels.shape[:2]
    values, masks = picture.pixels.astype(np.float32), picture.masks
    if settings.flip and draws.chance(0.5):
        values, masks = values[:, ::-1], masks[..., ::-1]
    values = _recoloured(values, np.ones((height, width), np.float32), settings, draws)
    pixels, whole = np.zeros((size, size, 3), np.uint8), np.zeros((len(masks), size, size), np.bool_)
    pixels[:height, :width], whole[:, :height, :width] = np.rint(values), masks
    return Scene(pixels, whole, height, width, tuple(range(len(masks))))


def _recoloured(
    values: NDArray[np.float32], opacity: NDArray[np.float32], settings: SceneSettings, draws: Draws
) -> NDArray[np.float32]:
    """Brightness, contrast and the order of the channels changed by chance; colours are multiplied by the opacity
    before and after."""
    if settings.channels and draws.chance(settings.channels):
        values = values[..., draws.order(3)]
    bright, contrast = 1 + settings.colour * (2 * draws.many(2) - 1)
    mean = values.sum() / max(float(3 * opacity.sum()), 1e-6)
    changed = values * np.float32(contrast) + opacity[..., None] * np.float32(mean * (bright - contrast))
    return np.clip(changed, 0, 255 * opacity[..., None])


def _overlap(top: int, left: int, shape: Sequence[int], size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a rectangle at (top, left) lies in a square of `size`, and which part of it that is."""
    into = tuple(slice(max(0, start), min(size, start + side)) for start, side in zip((top, left), shape, strict=True))
    part = tuple(slice(s.start - start, s.stop - start) for s, start in zip(into, (top, left), strict=True))
    return (into[0], into[1]), (part[0], part[1])
