"""Classification of pictures."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from craton.data.picture_batches import PictureBatch
from craton.training.objective import LossParts


class ImageClassification:
    """Cross-entropy of each picture's class under an `ImageClassifier`, in nats. Counts the pictures with a label.

    label_smoothing: the share of the target that is spread over all classes while training (Szegedy 2015, arXiv
    1512.00567); what is measured is the plain loss.
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: PictureBatch) -> LossParts:
        logits_BC = model(batch.pixels_BCHW)
        labelled = (batch.labels_B >= 0).nonzero()[:, 0]
        logits_NC, labels_N = logits_BC[labelled].float(), batch.labels_B[labelled]
        correct = (logits_NC.detach().argmax(-1) == labels_N).sum().float()
        smoothing = self.label_smoothing if model.training else 0.0
        loss = F.cross_entropy(logits_NC, labels_N, reduction="sum", label_smoothing=smoothing)
        return LossParts(loss, len(labelled), {"correct": correct})
