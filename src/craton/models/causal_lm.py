"""The causal language model: token embedding, trunk, head."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from craton.config import Settings
from craton.trunk import KVCache, Linear, Trunk, TrunkConfig


class CausalLMConfig(Settings):
    """context: the longest sequence the checkpoint was made for. tied: the head's weight is the embedding's."""

    vocab: PositiveInt
    context: PositiveInt
    trunk: TrunkConfig
    tied: bool
    embedding_scale: PositiveFloat | None = None
    head_bias: bool = False
    logit_softcap: PositiveFloat | None = None


class CausalLM(nn.Module):
    """Next-token logits of flat token ids."""

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.trunk.width)
        self.trunk = Trunk(config.trunk)
        self.head = Linear(config.trunk.width, config.vocab, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.compute_dtype: torch.dtype | None = None  # training: of all activations; None: the embedding's

    def hidden(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        segments_T: Tensor | None = None,
        cache: KVCache | None = None,
        row: int | None = None,
    ) -> Tensor:
        """Final hidden states [T, width]; see `Trunk.forward` for positions, segments, cache and row."""
        x_TD = self.embedding(ids_T)
        if self.compute_dtype is not None:
            x_TD = x_TD.to(self.compute_dtype)
        if self.config.embedding_scale is not None:
            # In the model's dtype, as Gemma was trained: sqrt(3072) is 55.5 in bfloat16 and not 55.4.
            x_TD = x_TD * torch.tensor(self.config.embedding_scale, dtype=x_TD.dtype)
        return self.trunk(x_TD, positions_T, segments_T, cache, row)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, vocab] of hidden states; take only the rows you need, the head is the largest product."""
        logits_TV = self.head(hidden_TD)
        cap = self.config.logit_softcap
        return logits_TV if cap is None else (logits_TV / cap).tanh() * cap

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, segments_T: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits [T, vocab] at every position."""
        return self.logits(self.hidden(ids_T, positions_T, segments_T, cache))
