"""The masked language model: an encoder, and logits of the tokens that were hidden from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.config import Settings
from craton.models.encoder import Encoder, EncoderConfig
from craton.trunk import Linear, NormConfig, TrunkConfig
from craton.trunk.config import Activation
from craton.trunk.feedforward import ACTIVATIONS
from craton.trunk.norms import Norm


class MaskedLMConfig(Settings):
    """activation and norm: of the layer between the encoder and the tied output embedding."""

    encoder: EncoderConfig
    activation: Activation
    norm: NormConfig

    @property
    def trunk(self) -> TrunkConfig:
        """The encoder's."""
        return self.encoder.trunk

    @property
    def vocab(self) -> int:
        """The encoder's."""
        return self.encoder.vocab

    @property
    def context(self) -> int:
        """The longest text in tokens."""
        return self.encoder.context


class MaskedLM(nn.Module):
    """Logits of the token at each position itself (BERT, Devlin 2018, arXiv 1810.04805)."""

    def __init__(self, config: MaskedLMConfig) -> None:
        super().__init__()
        width = config.trunk.width
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.dense = Linear(width, width)
        self.norm = Norm(config.norm, width)
        self.bias = nn.Parameter(torch.zeros(config.vocab))

    def hidden(
        self, ids_T: Tensor, positions_T: Tensor, segments_T: Tensor | None = None, row: int | None = None
    ) -> Tensor:
        """Token vectors [T, width]; see `Trunk.forward` for positions, segments and row."""
        hidden_TD: Tensor = self.encoder(ids_T, positions_T, segments_T, row=row)
        return hidden_TD

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, vocab] of token vectors; take only the rows you need, the last product is the largest."""
        x_TD = self.norm(ACTIVATIONS[self.config.activation](self.dense(hidden_TD)))
        return F.linear(x_TD, self.encoder.embedding.weight.to(x_TD.dtype), self.bias.to(x_TD.dtype))

    def forward(self, ids_T: Tensor, positions_T: Tensor, segments_T: Tensor | None = None) -> Tensor:
        """Logits [T, vocab] at every position."""
        return self.logits(self.hidden(ids_T, positions_T, segments_T))
