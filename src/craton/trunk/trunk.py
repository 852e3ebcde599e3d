"""The trunk: a stack of blocks over flat tokens."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from craton.trunk.block import Block
from craton.trunk.cache import KVCache
from craton.trunk.config import TrunkConfig
from craton.trunk.cross_attention import Context, ContextView
from craton.trunk.layout import Layout
from craton.trunk.norms import Norm


class Trunk(nn.Module):
    """The only Transformer (Vaswani 2017, arXiv 1706.03762)."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = nn.Embedding(config.positions.count, config.width) if config.positions is not None else None
        self.input_norm = Norm(config.input_norm, config.width) if config.input_norm is not None else None
        self.layers = nn.ModuleList(Block(layer, config.width) for layer in config.layers)
        self.final_norm = Norm(config.final_norm, config.width) if config.final_norm is not None else None
        self.checkpointing = False  # training: keep only each block's input and compute the rest again going backwards

    def forward(
        self,
        x_TD: Tensor,
        positions_T: Tensor,
        segments_T: Tensor | None = None,
        cache: KVCache | None = None,
        row: int | None = None,
        context: ContextView | None = None,
        taps: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [T, width] of flat tokens.

        x_TD: embedded tokens, sequences one after another. positions_T: each token's place in its sequence ([T, axes]
        where its rotary positions have several axes).
        segments_T: each token's sequence (none: all are one); with a cache, its slot. A sequence sees only itself.
        row: where whole sequences fill rows of so many tokens, that number (see `Layout`). context: what the layers
        with cross-attention see, from `read`. taps: is given the hidden states after each layer whose number is a key
        of it (before the final norm).
        """
        layout = Layout(positions_T, segments_T, cache, x_TD.dtype, row, context)
        if self.positions is not None:
            x_TD = x_TD + self.positions(positions_T).to(x_TD.dtype)
        if self.input_norm is not None:
            x_TD = self.input_norm(x_TD)
        for number, layer in enumerate(self.layers):
            if self.checkpointing:
                x_TD = checkpoint(layer, x_TD, layout, number, use_reentrant=False)
            else:
                x_TD = layer(x_TD, layout, number)
            if taps is not None and number in taps:
                taps[number] = x_TD
        layout.advance()
        return x_TD if self.final_norm is None else self.final_norm(x_TD)

    def read(self, context_CSW: Tensor) -> Context:
        """What cross-attention sees of C contexts of S vectors each: made once, it serves every pass."""
        blocks = (cast(Block, layer).cross_attention for layer in self.layers)
        return Context([block.read(context_CSW) for block in blocks if block is not None])


def sequence_layout(lengths: list[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """positions_T and segments_T of sequences of these lengths, packed one after another."""
    positions_T = torch.cat([torch.arange(n, device=device) for n in lengths])
    segments_T = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    return positions_T, segments_T
