"""Classification of texts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from craton.data.batch import Batch
from craton.errors import UsageError
from craton.training.objective import LossParts


class Classification:
    """Cross-entropy of each example's class under a `Classifier`, in nats. Counts the examples that have a label."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        if any(count != 1 for count in batch.sequences):
            raise UsageError("an example to classify is one text", remedy='use records {"text": ..., "label": ...}')
        logits_BC = model(batch.ids_T, batch.positions_T, batch.segments_T, batch.lengths)
        labelled = (batch.labels >= 0).nonzero()[:, 0]
        logits_NC, labels_N = logits_BC[labelled].float(), batch.labels[labelled]
        correct = (logits_NC.detach().argmax(-1) == labels_N).sum().float()
        return LossParts(F.cross_entropy(logits_NC, labels_N, reduction="sum"), len(labelled), {"correct": correct})
