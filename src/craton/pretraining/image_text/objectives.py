"""Pictures and their captions by contrast: CLIP's softmax and SigLIP's sigmoid."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.data.picture_batches import PictureBatch
from craton.models import DualEncoder
from craton.training.gradient_caching import encode_in_parts
from craton.training.objective import LossParts

PairLoss = Literal["softmax", "sigmoid"]

MOST_SCALE: Final = log(100)  # CLIP's, section 2.5: beyond it training is not stable


class ImageText:
    """Tell which caption of the batch belongs to which picture, under a `DualEncoder`. Counts pictures.

    softmax: choose each picture's caption among all and each caption's picture among all, the mean of both (CLIP,
    Radford 2021, arXiv 2103.00020); the scale is kept at 100 or less. sigmoid: say of every pair whether it belongs
    together (SigLIP, Zhai 2023, arXiv 2303.15343). Captions of the same tokens are not negatives of one another: each
    is left out where the other stands.

    micro: pairs that go through the model at once; a larger batch takes a second pass forward (gradient caching) and
    gives the same gradients. The negatives are those of the batch, so `whole_steps` asks that a step is not cut.
    known: of a side of texts that is locked, the vector of each text (see `read_locked`).
    """

    whole_steps: ClassVar[bool] = True

    def __init__(self, loss: PairLoss, *, micro: int, known: Mapping[tuple[int, ...], Tensor] | None = None) -> None:
        self.loss, self.micro, self.known = loss, micro, known

    def __call__(self, model: nn.Module, batch: PictureBatch) -> LossParts:
        assert isinstance(model, DualEncoder)
        if self.loss == "softmax" and model.training:
            limit_scale(model)

        def encode(rows: slice) -> tuple[Tensor, ...]:
            return model.encode_images(batch.pixels_BCHW[rows]), self._encode_texts(model, batch.texts[rows])

        count = len(batch.texts)
        images_BD, texts_BD = encode_in_parts(
            encode, [slice(start, start + self.micro) for start in range(0, count, self.micro)]
        )
        logits_BB = model.logits(images_BD, texts_BD)
        equal_BB = _equal_texts(batch.texts).to(logits_BB.device)
        chosen_BB = logits_BB.masked_fill(equal_BB, float("-inf"))
        if self.loss == "softmax":
            both = (chosen_BB.log_softmax(dim).diagonal() for dim in (0, 1))
            loss = -sum(both, logits_BB.new_zeros(count)).sum() / 2
        else:
            signs_BB = 2 * torch.eye(count, device=logits_BB.device) - 1
            loss = -F.logsigmoid(signs_BB * logits_BB).masked_fill(equal_BB, 0.0).sum()
        rows_B = torch.arange(count, device=logits_BB.device)
        texts_found, images_found = ((chosen_BB.detach().argmax(dim) == rows_B).sum().float() for dim in (1, 0))
        metrics = {
            "text_found": texts_found,
            "picture_found": images_found,
            "scale": model.logits.scale.detach().float().exp() * count,
        }
        return LossParts(loss, count, metrics)

    def _encode_texts(self, model: DualEncoder, texts: tuple[tuple[int, ...], ...]) -> Tensor:
        if self.known is None:
            return model.encode_texts(texts)
        return torch.stack([self.known[ids] for ids in texts]).to(model.text_projection.weight.device)


@torch.no_grad()
def limit_scale(model: DualEncoder) -> None:
    """Bring a trained scale back to 100, where an update has taken it beyond."""
    if model.logits.scale.requires_grad:
        model.logits.scale.clamp_(max=MOST_SCALE)


def _equal_texts(texts: tuple[tuple[int, ...], ...]) -> Tensor:
    """True [B, B] where two different places hold the same tokens."""
    numbers: dict[tuple[int, ...], int] = {}
    text_B = torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])
    return (text_B[:, None] == text_B).fill_diagonal_(False)
