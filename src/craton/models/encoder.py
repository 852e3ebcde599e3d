"""The bidirectional encoder: token embedding, trunk, and the pooling that makes one vector of a text."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from craton.config import Settings
from craton.trunk import Trunk, TrunkConfig

Pooling = Literal["mean", "cls", "last"]


class EncoderConfig(Settings):
    """context: the longest text that the positions allow. max_tokens: the longest that the makers of the sentence
    encoder meant (None: the context). token_types: rows of the segment-A/segment-B embedding (0: none).

    pooling, normalise: how token vectors become a text's vector (None: the checkpoint does not say). pooler: the
    checkpoint carries BERT's dense layer over the first token, which classification heads read.
    """

    vocab: PositiveInt
    context: PositiveInt
    trunk: TrunkConfig
    token_types: NonNegativeInt = 0
    pooler: bool = False
    max_tokens: PositiveInt | None = None
    pooling: Pooling | None = None
    normalise: bool = False


class Encoder(nn.Module):
    """Token vectors of flat token ids, and their pooling to one vector for each text."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        self.embedding = nn.Embedding(config.vocab, width)
        self.token_types = nn.Embedding(config.token_types, width) if config.token_types else None
        self.trunk = Trunk(config.trunk)
        self.pooler = nn.Linear(width, width) if config.pooler else None

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, segments_T: Tensor | None = None, types_T: Tensor | None = None
    ) -> Tensor:
        """Token vectors [T, width]. types_T: which part of a pair each token belongs to (none: all to the first)."""
        x_TD = self.embedding(ids_T)
        if self.token_types is not None:
            x_TD = x_TD + (self.token_types.weight[0] if types_T is None else self.token_types(types_T))
        return self.trunk(x_TD, positions_T, segments_T)

    def pool(self, hidden_TD: Tensor, lengths: list[int], pooling: Pooling, normalise: bool) -> Tensor:
        """One vector [B, width] for each of the packed sequences of these lengths."""
        ends = torch.tensor(lengths, device=hidden_TD.device).cumsum(0)
        if pooling == "last":
            pooled_BD = hidden_TD[ends - 1]
        elif pooling == "cls":
            pooled_BD = hidden_TD[ends - torch.tensor(lengths, device=hidden_TD.device)]
        else:
            pooled_BD = torch.stack([part.float().mean(0) for part in hidden_TD.split(lengths)])
        return F.normalize(pooled_BD.float(), dim=-1) if normalise else pooled_BD.float()
