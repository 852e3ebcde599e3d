"""The sentence encoder: a language model or an encoder, and one vector for each text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from craton.models.causal_lm import CausalLM
from craton.models.encoder import Encoder
from craton.models.pooling import PoolingConfig, pool


class Embedder(nn.Module):
    """Text vectors (Reimers & Gurevych 2019, arXiv 1908.10084). Nothing is learnt beside the backbone, so a checkpoint
    of it is the backbone's, with its pooling."""

    def __init__(self, backbone: CausalLM | Encoder, pooling: PoolingConfig) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling

    def forward(self, ids_T: Tensor, positions_T: Tensor, segments_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """One fp32 vector [B, width] for each of the packed texts of these lengths."""
        read = self.backbone.hidden if isinstance(self.backbone, CausalLM) else self.backbone
        return pool(read(ids_T, positions_T, segments_T), list(lengths), self.pooling)
