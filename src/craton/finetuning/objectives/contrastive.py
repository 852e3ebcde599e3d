"""Text vectors by contrast: pull a text to what belongs to it, push it from what does not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.data.batch import Batch
from craton.errors import UsageError
from craton.training.objective import LossParts

# Anchors whose scores are held at once while negatives are mined.
MINED_AT_ONCE = 1024


class InfoNCE:
    """Choose each anchor's positive among all positives and negatives of the batch, by cosine similarity.

    InfoNCE (van den Oord 2018, arXiv 1807.03748) with in-batch negatives, which is multiple-negatives ranking
    (Henderson 2017, arXiv 1705.00652). An example is an anchor, its positive and any number of mined negatives. What
    cannot be a negative is left out: a copy of the anchor or of its positive, and the positive of an equal anchor.
    symmetric: the mean of that and of choosing each positive's anchor among all anchors. Counts anchors.

    The negatives are those of the micro-batch, so a step that is cut into several has another, easier loss:
    `whole_steps` asks the loop not to cut it.
    """

    whole_steps: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 0.05, symmetric: bool = False) -> None:
        """Raises UsageError for a temperature that is not above 0."""
        if not temperature > 0:
            raise UsageError(f"a temperature of {temperature} is not above 0")
        self.temperature, self.symmetric = temperature, symmetric

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        if any(count < 2 for count in batch.sequences):
            raise UsageError(
                "an anchor needs a positive", remedy='use records {"anchor": ..., "positive": ..., "negatives": [...]}'
            )
        vectors_SD = F.normalize(model(batch.ids_T, batch.positions_T, batch.segments_T, batch.lengths).float(), dim=-1)
        device = vectors_SD.device
        counts_A = torch.tensor(batch.sequences, dtype=torch.int64, device=device)
        anchors_A = counts_A.cumsum(0) - counts_A
        positives_A = anchors_A + 1
        candidate_S = torch.ones(len(vectors_SD), dtype=torch.bool, device=device)
        candidate_S[anchors_A] = False
        # Positives in the order of their anchors, then the mined negatives: candidate a is the positive of anchor a.
        negative_S = candidate_S.index_fill(0, positives_A, False)
        candidates_C = torch.cat((positives_A, negative_S.nonzero()[:, 0]))

        text_S = _texts(batch).to(device)
        text_A1, own_A1, text_C = text_S[anchors_A, None], text_S[positives_A, None], text_S[candidates_C]
        false_AC = (text_C == own_A1) | (text_C == text_A1)
        false_AA = text_A1 == text_A1.T
        false_AC[:, : len(anchors_A)] |= false_AA
        scores_AC = vectors_SD[anchors_A] @ vectors_SD[candidates_C].T / self.temperature
        losses_A, correct_A = _choose_diagonal(scores_AC, false_AC)
        if self.symmetric:
            back_AA = false_AA | (own_A1 == text_A1.T)
            back_A, _ = _choose_diagonal(scores_AC[:, : len(anchors_A)].T, back_AA)
            losses_A = (losses_A + back_A) / 2
        return LossParts(losses_A.sum(), len(anchors_A), {"correct": correct_A.sum().float()})


def _choose_diagonal(scores_AC: Tensor, false_AC: Tensor) -> tuple[Tensor, Tensor]:
    """Of choosing candidate a for row a, false negatives left out: the loss [A], and whether it scores highest [A]."""
    rows_A = torch.arange(len(scores_AC), device=scores_AC.device)
    false_AC = false_AC.index_put((rows_A, rows_A), false_AC.new_zeros(()))
    masked_AC = scores_AC.masked_fill(false_AC, float("-inf"))
    return F.cross_entropy(masked_AC, rows_A, reduction="none"), masked_AC.detach().argmax(-1) == rows_A


def _texts(batch: Batch) -> Tensor:
    """A number for each sequence [S], the same for those of the same tokens."""
    numbers: dict[tuple[int, ...], int] = {}
    parts = batch.ids_T.cpu().split(list(batch.lengths))
    return torch.tensor([numbers.setdefault(tuple(part.tolist()), len(numbers)) for part in parts])


@torch.no_grad()
def mine_negatives(
    anchors_AD: Tensor, candidates_CD: Tensor, positives: Sequence[Collection[int]], count: int
) -> Tensor:
    """The rows [A, count] of the candidates nearest to each anchor that are none of its positives, nearest first.

    positives: for each anchor, the rows of all candidates that may belong to it, itself included where it is one.
    Raises UsageError where fewer than `count` others remain.
    """
    fewest = min((len(candidates_CD) - len(set(own)) for own in positives), default=count)
    if fewest < count:
        raise UsageError(
            f"an anchor has {fewest} candidates that are not its positives, fewer than the {count} to mine",
            remedy="mine fewer negatives or among more candidates",
        )
    anchors_AD, candidates_CD = (F.normalize(vectors.float(), dim=-1) for vectors in (anchors_AD, candidates_CD))
    mined = []
    for start in range(0, len(anchors_AD), MINED_AT_ONCE):
        scores_RC = anchors_AD[start : start + MINED_AT_ONCE] @ candidates_CD.T
        for row, own in enumerate(positives[start : start + MINED_AT_ONCE]):
            scores_RC[row, list(own)] = float("-inf")
        mined.append(scores_RC.topk(count).indices)
    return torch.cat(mined) if mined else torch.empty(0, count, dtype=torch.int64)
