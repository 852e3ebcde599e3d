"""The bidirectional encoder: token embedding and trunk."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from craton.config import Settings
from craton.trunk import Linear, Trunk, TrunkConfig


class EncoderConfig(Settings):
    """context: the longest text in tokens. token_types: rows of the segment-A/segment-B embedding (0: none).

    pooler: the checkpoint carries BERT's dense layer over the first token, which classification heads read.
    """

    vocab: PositiveInt
    context: PositiveInt
    trunk: TrunkConfig
    token_types: NonNegativeInt = 0
    pooler: bool = False


class Encoder(nn.Module):
    """Token vectors of flat token ids."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        self.embedding = nn.Embedding(config.vocab, width)
        self.token_types = nn.Embedding(config.token_types, width) if config.token_types else None
        self.trunk = Trunk(config.trunk)
        self.pooler = Linear(width, width) if config.pooler else None
        self.compute_dtype: torch.dtype | None = None  # training: of all activations; None: the embedding's

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        segments_T: Tensor | None = None,
        types_T: Tensor | None = None,
        row: int | None = None,
    ) -> Tensor:
        """Token vectors [T, width]. types_T: which part of a pair each token belongs to (none: all to the first).

        See `Trunk.forward` for positions, segments and row.
        """
        x_TD = self.embedding(ids_T)
        if self.token_types is not None:
            x_TD = x_TD + (self.token_types.weight[0] if types_T is None else self.token_types(types_T))
        if self.compute_dtype is not None:
            x_TD = x_TD.to(self.compute_dtype)
        return self.trunk(x_TD, positions_T, segments_T, row=row)
