"""Next tokens of conversations with pictures: what projectors and adapters of image chat models are trained by."""

from __future__ import annotations

from torch import nn

from craton.data.batch import Batch
from craton.data.example import UNTRAINED
from craton.models import ImageChat
from craton.training.cross_entropy import chunked_cross_entropy, has_plain_head, token_losses
from craton.training.objective import LossParts


class SeeingNextToken:
    """Cross-entropy of every trained token, in nats, under an `ImageChat` that sees a batch's pictures. Counts tokens.

    Where the batch has the image token, the pictures' vectors stand, one tile after the other (Liu 2023, arXiv
    2304.08485). They have no targets.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        assert isinstance(model, ImageChat)
        seen_T = seen_ND = None
        if batch.pictures:
            seen_T = batch.ids_T == model.config.image_token
            seen_ND = model.see(batch.pixels().to(batch.ids_T.device)).flatten(0, 1)
        hidden_TD = model.hidden(batch.ids_T, batch.positions_T, batch.segments_T, seen_T=seen_T, seen_ND=seen_ND)
        rows_N = (batch.targets_T != UNTRAINED).nonzero()[:, 0]
        hidden_ND, targets_N = hidden_TD[rows_N], batch.targets_T[rows_N]
        if has_plain_head(model):
            loss_sum = chunked_cross_entropy(hidden_ND, model.head.weight, targets_N)
        else:
            loss_sum = token_losses(model.logits, hidden_ND, targets_N, model.config.vocab).sum()
        return LossParts(loss_sum, len(rows_N), {})
