"""Models that cut out of a picture what a click, a box or an earlier mask means, or everything that is in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.errors import CheckpointError, UsageError
from craton.inference import native
from craton.inference.images import Picture
from craton.inference.linears import prepare
from craton.inference.plan import DTypeChoice, Plan, make_plan
from craton.inference.segmentation_settings import EverythingSettings
from craton.modalities.image import Pixels, RunLengths, check_pixels, decode_rle, encode_rle, read_image
from craton.modalities.image.longest_side import SquarePreparation
from craton.modalities.image.overlay import draw_masks, drawing_size
from craton.models import Segmenter, SegmenterConfig
from craton.store import find

OFFSET: Final = 1.0  # how far the threshold moves, in logits, where a mask's stability is measured
TOGETHER: Final = 64  # points of a grid that are asked at once


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a picture.

    rle: its mask as COCO's run lengths. area: its pixels. box: (x0, y0, x1, y1), the edges around them, in pixels; all
    0 where the mask is empty. predicted_iou: how well the model expects it to fit, 1 at best. stability: the overlap
    (IoU) of the masks at thresholds a little above and below. logits: fp32, low resolution, over the square that the
    model saw: what can be fed back. point: the (x, y) of the grid that found it, for `SeenPicture.everything`.
    """

    rle: RunLengths
    area: int
    box: tuple[int, int, int, int]
    predicted_iou: float
    stability: float
    logits: NDArray[np.float32]
    point: tuple[float, float] | None = None

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[H, W] of the picture; made anew at each call."""
        return decode_rle(self.rle)

    def annotation(self) -> dict[str, Any]:
        """As COCO's annotations and SA-1B's say it: "bbox" is x, y, width, height."""
        x0, y0, x1, y1 = self.box
        said: dict[str, Any] = {
            "segmentation": self.rle,
            "area": self.area,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "predicted_iou": round(self.predicted_iou, 6),
            "stability_score": round(self.stability, 6),
        }
        return said | ({"point_coords": [list(self.point)]} if self.point is not None else {})


class _Prompt(NamedTuple):
    """A checked prompt in pixels of the square, a batch of one."""

    points_1Q2: Tensor | None
    labels_1Q: Tensor | None
    box_14: Tensor | None
    mask_11HW: Tensor | None

    @property
    def ambiguous(self) -> bool:
        """Whether models are trained to make several guesses at it: a first point or a first box alone."""
        points = 0 if self.points_1Q2 is None else self.points_1Q2.shape[1]
        return self.mask_11HW is None and points + (self.box_14 is not None) == 1


class _Found(NamedTuple):
    """Masks of several prompts, fp32, and how well each is expected to fit."""

    logits_BMhw: NDArray[np.float32]
    iou_BM: NDArray[np.float32]


class SegmentationModel:
    """A loaded model that segments. Make one with `craton.load_segmenter`."""

    def __init__(
        self, name: str, checkpoint: Checkpoint, module: Segmenter, preparation: SquarePreparation, plan: Plan
    ) -> None:
        self.name, self.checkpoint, self.module, self.plan = name, checkpoint, module, plan
        self.preparation = preparation

    @torch.inference_mode()
    def look(self, picture: Picture, *, mirrored: bool = False) -> SeenPicture:
        """See a picture, once for all that will be asked about it.

        mirrored: see its mirror image as well; each answer is then the mean of both, which costs twice as much.
        Raises UsageError for a file that is not there, FileFormatError for one that is no picture.
        """
        pixels = check_pixels(picture) if isinstance(picture, np.ndarray) else read_image(picture)
        square_3SS, scale = self.preparation.prepare(pixels)
        squares = [square_3SS, self.preparation.prepare(pixels[:, ::-1])[0]] if mirrored else [square_3SS]
        return SeenPicture(self, pixels, self.module.encode(torch.from_numpy(np.stack(squares))), scale)


class SeenPicture:
    """A picture that a model has seen, and what can be asked about it. Points and boxes are in the picture's pixels, x
    to the right and y down from the upper left corner, of the picture as it is shown: turned as its EXIF tag says."""

    def __init__(
        self, model: SegmentationModel, pixels: Pixels, images_VCHW: Tensor, scale: tuple[float, float]
    ) -> None:
        self.pixels = pixels
        # One view, or also that of the mirror image.
        self._model, self._images_VCHW, self._scale = model, images_VCHW, scale

    @property
    def height(self) -> int:
        """Of the picture, in pixels."""
        return len(self.pixels)

    @property
    def width(self) -> int:
        """Of the picture, in pixels."""
        return self.pixels.shape[1]

    @torch.inference_mode()
    def segment(
        self,
        points: ArrayLike | None = None,
        labels: Sequence[int] | None = None,
        box: Sequence[float] | None = None,
        logits: NDArray[np.float32] | None = None,
        *,
        several: bool = False,
    ) -> list[Segment]:
        """What is meant by points, a box, an earlier mask, or all of these together.

        points: [N, 2], (x, y) each; labels: 1 for each point inside and 0 for each outside (none: all inside). box: x0,
        y0, x1, y1. logits: of an earlier answer's `Segment.logits`, which is made better. several: the model's guesses
        at a prompt that may mean a thing, a part or what holds them, the likeliest first; else one. A single point or
        box may mean all of these, so there the one is the likeliest of the guesses.

        Raises UsageError for a prompt that says nothing, or lies outside the picture, and for logits of another size.
        """
        prompt = self._checked(points, labels, box, logits)
        found = self._decoded(*prompt, several=several or prompt.ambiguous)
        order = np.argsort(-found.iou_BM[0], kind="stable")
        chosen = order if several else order[:1]
        return [self._segment(found.logits_BMhw[0, m], float(found.iou_BM[0, m])) for m in chosen]

    def everything(
        self,
        settings: EverythingSettings = EverythingSettings(),  # noqa: B008  (immutable)
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Segment]:
        """All that can be found, the best first: a grid of points asks, masks that are doubtful or found already are
        left out. on_progress: is told the points asked and all of them."""
        points_N2 = _grid(settings.points_per_side) * (self.width, self.height)
        kept: list[tuple[float, float, NDArray[np.float32], NDArray[np.float64]]] = []
        for start in range(0, len(points_N2), TOGETHER):
            some = points_N2[start : start + TOGETHER]
            found = self._at(some)
            for b, m in zip(*np.nonzero(found.iou_BM >= settings.min_iou), strict=True):
                stability = self._stability(found.logits_BMhw[b, m])
                if stability >= settings.min_stability:
                    # A copy, or each would keep its whole batch in memory.
                    kept.append((float(found.iou_BM[b, m]), stability, found.logits_BMhw[b, m].copy(), some[b]))
            on_progress(min(start + TOGETHER, len(points_N2)), len(points_N2))
        # First at the model's own resolution, which is cheap; there one row more or less may already be another box.
        coarse_N4 = np.array([_box(self._covered(one[2]) > 0) for one in kept]).reshape(-1, 4)
        chosen = without_overlaps(coarse_N4, np.array([one[0] for one in kept]), settings.max_overlap)
        segments = [
            self._segment(logits, iou, stability, (float(point[0]), float(point[1])))
            for iou, stability, logits, point in (kept[i] for i in chosen)
        ]
        segments = [segment for segment in segments if segment.area]
        boxes_N4 = np.array([segment.box for segment in segments]).reshape(-1, 4)
        scores_N = np.array([segment.predicted_iou for segment in segments])
        return [segments[i] for i in without_overlaps(boxes_N4, scores_N, settings.max_overlap)]

    def draw(
        self,
        segments: Sequence[Segment],
        points: Sequence[tuple[float, float]] = (),
        labels: Sequence[int] = (),
        box: Sequence[float] | None = None,
        *,
        spotlight: bool = False,
        first: int = 0,
    ) -> Pixels:
        """Segments in colours on the picture, and the prompt where it is given: pixels [H, W, 3] of
        `overlay.drawing_size`. spotlight, first: see `overlay.draw_masks`."""
        size = drawing_size(self.height, self.width)
        masks = (self._model.preparation.restore(one.logits[None], *size)[0] > 0 for one in segments)
        return draw_masks(self.pixels, masks, points=points, labels=labels, box=box, spotlight=spotlight, first=first)

    @torch.inference_mode()
    def _at(self, points_B2: NDArray[np.float64]) -> _Found:
        points_B12 = torch.tensor(points_B2 * self._scale, dtype=torch.float32)[:, None]
        return self._decoded(points_B12, torch.ones(len(points_B2), 1, dtype=torch.long), None, None, several=True)

    def _decoded(
        self,
        points_BQ2: Tensor | None,
        labels_BQ: Tensor | None,
        box_B4: Tensor | None,
        mask_B1HW: Tensor | None,
        *,
        several: bool,
    ) -> _Found:
        decode = self._model.module.decode
        logits_BMhw, iou_BM = decode(self._images_VCHW[:1], points_BQ2, labels_BQ, box_B4, mask_B1HW, several=several)
        logits_BMhw, iou_BM = logits_BMhw.float(), iou_BM.float()
        if len(self._images_VCHW) == 2:
            # What a user would say of the mirror image; and its answer, turned back.
            across = self.width * self._scale[0]
            if points_BQ2 is not None:
                x_BQ, y_BQ = points_BQ2.unbind(-1)
                points_BQ2 = torch.stack((across - self._scale[0] - x_BQ, y_BQ), -1)
            if box_B4 is not None:
                x0_B, y0_B, x1_B, y1_B = box_B4.unbind(-1)
                box_B4 = torch.stack((across - x1_B, y0_B, across - x0_B, y1_B), -1)
            mask_B1HW = self._mirrored(mask_B1HW) if mask_B1HW is not None else None
            other_BMhw, other_BM = decode(
                self._images_VCHW[1:], points_BQ2, labels_BQ, box_B4, mask_B1HW, several=several
            )
            logits_BMhw, iou_BM = (
                (logits_BMhw + self._mirrored(other_BMhw.float())) / 2,
                (iou_BM + other_BM.float()) / 2,
            )
        return _Found(logits_BMhw.numpy(), iou_BM.numpy())

    def _mirrored(self, logits_BMhw: Tensor) -> Tensor:
        """Masks over the square, with what lies on the picture mirrored in it."""
        count, side = logits_BMhw.shape[-1], self._model.preparation.side
        covered = self._model.preparation.fitted(self.height, self.width)[1] * count / side
        # The picture may end within a column, so that a mirrored one lies between two.
        at_w = (covered - 1 - torch.arange(count)).clamp(0, count - 1)
        left_w = at_w.long()
        right_w = (left_w + 1).clamp(max=count - 1)
        return torch.lerp(logits_BMhw[..., left_w], logits_BMhw[..., right_w], at_w - left_w)

    def _segment(
        self,
        logits_hw: NDArray[np.float32],
        iou: float,
        stability: float | None = None,
        point: tuple[float, float] | None = None,
    ) -> Segment:
        mask_HW = self._model.preparation.restore(logits_hw[None], self.height, self.width)[0] > 0
        x0, y0, x1, y1 = (int(edge) for edge in _box(mask_HW))
        stability = self._stability(logits_hw) if stability is None else stability
        return Segment(
            encode_rle(mask_HW), int(mask_HW.sum()), (x0, y0, x1, y1), iou, stability, logits_hw.copy(), point
        )

    def _covered(self, logits_hw: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._model.preparation.covered(logits_hw[None], self.height, self.width)[0]

    def _stability(self, logits_hw: NDArray[np.float32]) -> float:
        # At the model's own resolution: at the picture's it is nearly the same, and costs a hundred times as much.
        covered = self._covered(logits_hw)
        large = int((covered > -OFFSET).sum())
        return int((covered > OFFSET).sum()) / large if large else 0.0

    def _checked(
        self,
        points: ArrayLike | None,
        labels: Sequence[int] | None,
        box: Sequence[float] | None,
        logits: NDArray[np.float32] | None,
    ) -> _Prompt:
        points_1Q2, labels_1Q = self._points(points, labels)
        if points_1Q2 is None and box is None and logits is None:
            raise UsageError(
                "nothing says what to segment", remedy="give a point, a box or an earlier mask, or ask for everything"
            )
        box_14 = self._box_prompt(box) if box is not None else None
        return _Prompt(points_1Q2, labels_1Q, box_14, self._mask_prompt(logits) if logits is not None else None)

    def _points(self, points: ArrayLike | None, labels: Sequence[int] | None) -> tuple[Tensor | None, Tensor | None]:
        points_Q2 = np.asarray([] if points is None else points, np.float64)
        if not points_Q2.size:
            if labels is not None and len(labels):
                raise UsageError("labels without points", remedy="give as many points")
            return None, None
        if points_Q2.ndim != 2 or points_Q2.shape[1] != 2:
            raise UsageError(f"points are (x, y) each, not of shape {list(points_Q2.shape)}")
        for x, y in points_Q2:
            if not (0 <= x < self.width and 0 <= y < self.height):
                raise UsageError(f"the point {x:g}, {y:g} lies outside the picture", remedy=self._size_said())
        labels = [1] * len(points_Q2) if labels is None else list(labels)
        if len(labels) != len(points_Q2) or not all(label in (0, 1) for label in labels):
            raise UsageError(
                f"labels {labels} for {len(points_Q2)} points", remedy="give each point 1 (inside) or 0 (outside)"
            )
        return (
            torch.tensor(points_Q2 * self._scale, dtype=torch.float32)[None],
            torch.tensor(labels, dtype=torch.long)[None],
        )

    def _box_prompt(self, box: Sequence[float]) -> Tensor:
        edges_4 = np.asarray(box, np.float64)
        if edges_4.shape != (4,) or not np.isfinite(edges_4).all():
            raise UsageError(f"a box is four numbers, x0, y0, x1, y1, not {box}")
        x0, y0, x1, y1 = edges_4
        where = f"box {x0:g}, {y0:g}, {x1:g}, {y1:g}"
        if x0 >= x1 or y0 >= y1:
            raise UsageError(
                "the box has no area, or its corners are swapped",
                where=where,
                remedy="give its upper left corner first: x0 < x1 and y0 < y1",
            )
        if x0 < 0 or y0 < 0 or x1 > self.width or y1 > self.height:
            raise UsageError("the box reaches out of the picture", where=where, remedy=self._size_said())
        return torch.tensor(edges_4 * (self._scale * 2), dtype=torch.float32)[None]

    def _mask_prompt(self, logits: NDArray[np.float32]) -> Tensor:
        wanted = self._model.module.config.mask_size
        if logits.shape not in (wanted, (1, *wanted)) or not np.isfinite(logits).all():
            raise UsageError(
                f"an earlier mask is finite logits {list(wanted)}, not {list(logits.shape)}"
                + ("" if np.isfinite(logits).all() else " with NaN or infinity in them"),
                remedy="feed back what this model gave for this picture",
            )
        return torch.tensor(logits.reshape(1, 1, *wanted), dtype=torch.float32)

    def _size_said(self) -> str:
        return (
            f"the picture has {self.width} x {self.height} pixels: x from 0 to {self.width}, y from 0 to {self.height}"
        )


def load_segmenter(name: str | Path, *, dtype: DTypeChoice = "auto", threads: int | None = None) -> SegmentationModel:
    """Load a model that segments what it is pointed at: a stored name, "hf:org/name" or a folder.

    dtype, threads: see `craton.inference.model.load`.

    Raises UsageError for another model, CheckpointError for one whose files disagree, and what loading raises.
    """
    checkpoint = Checkpoint.open(find(str(name)).path)
    if not isinstance(checkpoint.config, SegmenterConfig):
        raise UsageError(
            f"{name} segments nothing: it is a {checkpoint.hf['architectures'][0]}",
            remedy="take a promptable segmenter: one in SamModel's layout, or your own",
        )
    preparation = SquarePreparation.read(checkpoint.folder)
    if preparation.side != checkpoint.config.side:
        raise CheckpointError(
            f"pictures are prepared with sides of {preparation.side}, and the model sees {checkpoint.config.side}",
            where=str(checkpoint.folder),
            remedy="preprocessor_config.json belongs to another model; fetch it again",
        )
    plan = make_plan(checkpoint, dtype, threads)
    torch.set_num_threads(plan.threads)
    native.set_threads(plan.threads)
    module = checkpoint.load(plan.dtype, packed=plan.packed)
    assert isinstance(module, Segmenter)
    prepare(module, prepack=plan.prepack, tiles=plan.tiles, release=checkpoint.source.release, parts=plan.parts)
    return SegmentationModel(str(name), checkpoint, module, preparation, plan)


def without_overlaps(boxes_N4: NDArray[Any], scores_N: NDArray[Any], most: float) -> list[int]:
    """Non-maximum suppression: the numbers of boxes (x0, y0, x1, y1), the best first, none of which overlaps a better
    one by more than `most` (IoU)."""
    areas_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    left, chosen = np.argsort(-scores_N, kind="stable"), []
    while len(left):
        best, rest = left[0], left[1:]
        chosen.append(int(best))
        upper_R2 = np.maximum(boxes_N4[best, :2], boxes_N4[rest, :2])
        lower_R2 = np.minimum(boxes_N4[best, 2:], boxes_N4[rest, 2:])
        shared_R = np.clip(lower_R2 - upper_R2, 0, None).prod(1)
        # Two empty boxes share nothing, of nothing.
        left = rest[shared_R <= most * (areas_N[best] + areas_N[rest] - shared_R)]
    return chosen


def _grid(side: int) -> NDArray[np.float64]:
    """[side * side, 2]: the middles (x, y) of so many equal parts of the unit square, row by row."""
    middles = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(middles, middles, indexing="ij")
    return np.stack((x.ravel(), y.ravel()), 1)


def _box(mask_HW: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The edges x0, y0, x1, y1 around what is True; all 0 where nothing is."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
