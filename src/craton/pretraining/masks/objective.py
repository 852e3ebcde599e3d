"""Clicks, boxes and corrections under a segmenter, as Segment Anything is trained (Kirillov 2023, section 3 and A)."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.models import Segmenter
from craton.models.segmenter import INSIDE, NO_POINT, OUTSIDE
from craton.pretraining.masks.batches import MaskBatch, chosen_pixels
from craton.training.objective import LossParts

FOCAL_WEIGHT: Final = 20.0


class PromptedMasks:
    """Say what a click or a box means, then do better with each click into what was wrong. Counts prompts.

    After the first prompt the model makes several guesses, of which the least loss is trained; after a correction, one
    guess. Each loss is 20 times the focal loss plus the dice loss (Milletari 2016, arXiv 1606.04797); beside it stands
    the squared error of the IoU that the model expects of its guesses. A prompt's loss is the mean of its rounds. The
    masks that it was wrong about come back to it as logits, without a gradient.

    shared: which share of a first prompt's loss all guesses have, the best one having the rest (Rupprecht 2017, arXiv
    1612.00197): guesses that are seldom the best are hardly trained otherwise, and chosen all the same.
    """

    def __init__(self, shared: float = 0.0) -> None:
        self.shared = shared

    def __call__(self, model: nn.Module, batch: MaskBatch) -> LossParts:
        assert isinstance(model, Segmenter)
        image_BCHW = model.encode(batch.pixels_BCHW)
        groups = [(batch.boxed_P, True), (~batch.boxed_P, False)]
        found = [
            _group(model, image_BCHW, batch, rows.nonzero()[:, 0], boxed, self.shared)
            for rows, boxed in groups
            if rows.any()
        ]
        loss, *sums = (torch.stack(parts).sum() for parts in zip(*found, strict=True))
        names = ("first_iou", "best_iou", "last_iou")
        metrics = {name: value.detach() for name, value in zip(names, sums, strict=True)}
        return LossParts(loss, int(batch.asked_P.sum()), metrics)


def _group(
    model: Segmenter, image_BCHW: Tensor, batch: MaskBatch, rows_G: Tensor, boxed: bool, shared: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over these prompts: the loss; the IoU of the guess that the model thought best after the first prompt, of
    its best guess, and of the last answer."""
    target_GHW, asked_G = batch.masks_PHW[rows_G], batch.asked_P[rows_G].float()
    image_GCHW = image_BCHW[batch.scenes_P[rows_G]]
    boxes_G4 = batch.boxes_P4[rows_G] if boxed else None
    points_GQ2 = batch.points_P2[rows_G][:, None]
    labels_GQ = torch.full((len(rows_G), 1), INSIDE, device=rows_G.device)
    if boxed:
        points_GQ2, labels_GQ = points_GQ2[:, :0], labels_GQ[:, :0]
    before_G1HW: Tensor | None = None
    losses_G = image_BCHW.new_zeros(len(rows_G), dtype=torch.float32)
    first_G = best_G = last_G = losses_G
    rounds = 1 + batch.draws_PR.shape[1]
    for number in range(rounds):
        logits_GMhw, expected_GM = model.decode(
            image_GCHW, points_GQ2, labels_GQ, boxes_G4, before_G1HW, several=number == 0
        )
        logits_GMhw, expected_GM = logits_GMhw.float(), expected_GM.float()
        logits_GMHW = F.interpolate(logits_GMhw, target_GHW.shape[1:], mode="bilinear")
        iou_GM = overlap(logits_GMHW.detach() > 0, target_GHW[:, None])
        loss_GM = mask_loss(logits_GMHW, target_GHW)
        losses_G = losses_G + loss_GM.amin(1).lerp(loss_GM.mean(1), shared) + (expected_GM - iou_GM).square().mean(1)
        taken_G1 = expected_GM.detach().argmax(1, keepdim=True)
        last_G = iou_GM.gather(1, taken_G1)[:, 0]
        if number == 0:
            first_G, best_G = last_G, iou_GM.amax(1)
        if number + 1 < rounds:
            before_G1HW = _taken(logits_GMhw.detach(), taken_G1)
            answer_GHW = _taken(logits_GMHW.detach(), taken_G1)[:, 0] > 0
            point_G2, label_G = correction(answer_GHW, target_GHW, batch.draws_PR[rows_G, number])
            points_GQ2 = torch.cat((points_GQ2, point_G2[:, None]), 1)
            labels_GQ = torch.cat((labels_GQ, label_G[:, None]), 1)
    loss, first, best, last = ((value * asked_G).sum() for value in (losses_G / rounds, first_G, best_G, last_G))
    return loss, first, best, last


def mask_loss(logits_GMHW: Tensor, target_GHW: Tensor) -> Tensor:
    """20 times the focal loss, the mean over pixels, plus the dice loss of each guess: [G, M], fp32."""
    target_GMHW = target_GHW[:, None].to(logits_GMHW.dtype).expand_as(logits_GMHW)
    chance_GMHW = logits_GMHW.sigmoid()
    entropy_GMHW = F.binary_cross_entropy_with_logits(logits_GMHW, target_GMHW, reduction="none")
    # Of a pixel inside 1 - p, of one outside p: what is missing to being right.
    missing_GMHW = (target_GMHW - chance_GMHW).abs()
    focal_GM = (missing_GMHW.square() * entropy_GMHW).mean((2, 3))
    both_GM = (chance_GMHW * target_GMHW).sum((2, 3))
    dice_GM = 1 - (2 * both_GM + 1) / (chance_GMHW.sum((2, 3)) + target_GMHW.sum((2, 3)) + 1)
    return FOCAL_WEIGHT * focal_GM + dice_GM


def overlap(masks_GMHW: Tensor, target_G1HW: Tensor) -> Tensor:
    """Intersection over union of bool masks, [G, M], fp32; 0 where both are empty."""
    both = (masks_GMHW & target_G1HW).sum((2, 3))
    return both / (masks_GMHW | target_G1HW).sum((2, 3)).clamp(min=1)


def correction(answer_GHW: Tensor, target_GHW: Tensor, draws_G: Tensor) -> tuple[Tensor, Tensor]:
    """A click (x, y) into what is wrong of an answer, [G, 2], and its label [G]: no point where nothing is."""
    wrong_GHW = answer_GHW ^ target_GHW
    point_G2 = chosen_pixels(wrong_GHW, draws_G)
    x_G, y_G = point_G2.long().unbind(1)
    missed_G = target_GHW[torch.arange(len(x_G), device=x_G.device), y_G, x_G]
    label_G = torch.where(missed_G, INSIDE, OUTSIDE)
    return point_G2, torch.where(wrong_GHW.any((1, 2)), label_G, torch.full_like(label_G, NO_POINT))


def _taken(logits_GMHW: Tensor, taken_G1: Tensor) -> Tensor:
    return torch.take_along_dim(logits_GMHW, taken_G1[..., None, None], 1)
