"""A head that reads a speech model's encoder without its decoder: connectionist temporal classification."""

from __future__ import annotations

from torch import Tensor, nn

from craton.models.seq2seq import Seq2Seq
from craton.trunk import Linear


class CTCSeq2Seq(nn.Module):
    """A speech model with a second head, over its encoder's vectors (joint CTC and attention: Watanabe 2017, "Hybrid
    CTC/attention architecture for end-to-end speech recognition").

    labels: tokens of plain text, the ids below it. The id `labels` itself, which ends a text, is the blank of CTC
    (Graves 2006, "Connectionist temporal classification").
    """

    def __init__(self, seq2seq: Seq2Seq, labels: int) -> None:
        super().__init__()
        self.seq2seq, self.blank = seq2seq, labels
        self.ctc_head = Linear(seq2seq.config.encoder.width, labels + 1)

    def label_logits(self, encoded_BSD: Tensor) -> Tensor:
        """Logits [B, S, labels + 1] of the label at each of the encoder's vectors."""
        logits_BSL: Tensor = self.ctc_head(encoded_BSD)
        return logits_BSL
