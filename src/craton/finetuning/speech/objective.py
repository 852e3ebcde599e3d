"""What a speech model learns: the next token of the text, its labels along the sound, or both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.data.example import UNTRAINED
from craton.data.speech_batches import SpeechBatch
from craton.models import Seq2Seq
from craton.models.ctc import CTCSeq2Seq
from craton.training.cross_entropy import token_losses
from craton.training.objective import LossParts


class SpeechRecognition:
    """(1 - w) cross-entropy of the decoder's tokens + w CTC of the encoder's labels, in nats (Watanabe 2017).

    ctc_weight: w. 0 is sequence-to-sequence alone, of a `Seq2Seq`; else the model is a `CTCSeq2Seq`, and at 1 its
    decoder takes no part. Counts the decoder's trained tokens, or at w = 1 the labels.
    """

    def __init__(self, ctc_weight: float = 0.0) -> None:
        self.ctc_weight = ctc_weight

    def __call__(self, model: nn.Module, batch: SpeechBatch) -> LossParts:
        weight = self.ctc_weight
        seq2seq = model.seq2seq if isinstance(model, CTCSeq2Seq) else model
        assert isinstance(seq2seq, Seq2Seq)
        encoded_BSD = seq2seq.encode(batch.mel_BMF)
        loss = encoded_BSD.new_zeros((), dtype=torch.float32)
        parts: dict[str, Tensor] = {}
        if weight < 1:
            parts["decoder_loss"] = _next_tokens(seq2seq, encoded_BSD, batch)
            loss = loss + (1 - weight) * parts["decoder_loss"]
        if weight > 0:
            assert isinstance(model, CTCSeq2Seq)
            parts["ctc_loss"] = _labels_loss(model, encoded_BSD, batch)
            loss = loss + weight * parts["ctc_loss"]
        count = batch.trained if weight < 1 else sum(batch.label_counts)
        metrics = {name: part.detach() for name, part in parts.items()} if 0 < weight < 1 else {}
        return LossParts(loss, count, metrics)


def _next_tokens(model: Seq2Seq, encoded_BSD: Tensor, batch: SpeechBatch) -> Tensor:
    numbers = [number for number, rows in enumerate(batch.rows) for _ in range(rows)]
    positions_T = torch.cat([torch.arange(rows) for rows in batch.rows]).to(batch.ids_T.device)
    segments_T = torch.tensor(numbers, device=batch.ids_T.device)
    view = model.decoder.read(encoded_BSD).view(numbers)
    hidden_TD = model.hidden(batch.ids_T, positions_T, segments_T, view)
    rows_N = (batch.targets_T != UNTRAINED).nonzero()[:, 0]
    hidden_ND, targets_N = hidden_TD[rows_N], batch.targets_T[rows_N]
    # Through the head as it stands: an adapter may be on it.
    losses_N = token_losses(model.logits, hidden_ND, targets_N, model.config.vocab)
    # A batch without targets still has a gradient, of zero.
    return losses_N.sum() + 0.0 * hidden_TD.sum()


def _labels_loss(model: CTCSeq2Seq, encoded_BSD: Tensor, batch: SpeechBatch) -> Tensor:
    count, vectors = encoded_BSD.shape[:2]
    there = [number for number, labels in enumerate(batch.label_counts) if labels]
    logs_BSL = model.label_logits(encoded_BSD).float().log_softmax(-1)
    if not there:
        return 0.0 * logs_BSL.sum()
    lengths = torch.tensor([batch.label_counts[number] for number in there])
    heard = torch.full((len(there),), vectors)
    logs_SBL = logs_BSL[there].transpose(0, 1) if len(there) < count else logs_BSL.transpose(0, 1)
    return F.ctc_loss(logs_SBL, batch.labels_N, heard, lengths, blank=model.blank, reduction="sum", zero_infinity=True)
