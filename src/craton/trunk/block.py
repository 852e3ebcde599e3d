"""The one block: attention and feed-forward around a residual stream, with the norms where the config puts them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from craton.trunk.attention import Attention, LatentAttention
from craton.trunk.config import ExpertsConfig, LayerConfig, NormConfig, NormPlace
from craton.trunk.cross_attention import CrossAttention
from craton.trunk.feedforward import Experts, FeedForward
from craton.trunk.layout import Layout
from craton.trunk.norms import Norm


class BranchNorms(nn.ModuleDict):
    """The norms around one branch, by their place; `at` passes x on where there is none."""

    def __init__(self, places: tuple[NormPlace, ...], config: NormConfig, width: int) -> None:
        super().__init__({place: Norm(config, width) for place in places})

    def at(self, place: NormPlace, x_TD: Tensor) -> Tensor:
        """x, normed if there is a norm at this place."""
        return self[place](x_TD) if place in self else x_TD


class LayerScale(nn.Module):
    """x[T, width] times a learned vector."""

    def __init__(self, initial: float, width: int) -> None:
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.full((width,), initial))

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD * self.weight.to(x_TD.dtype)


class Block(nn.Module):
    """x[T, width] -> [T, width]."""

    def __init__(self, config: LayerConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.parallel = config.parallel
        latent = config.attention.latent is not None
        self.attention = (LatentAttention if latent else Attention)(config.attention, width)
        experts = isinstance(config.feedforward, ExpertsConfig)
        self.feedforward = (Experts if experts else FeedForward)(config.feedforward, width)  # type: ignore[arg-type]
        self.attention_norm = BranchNorms(config.attention_norms, config.norm, width)
        self.feedforward_norm = BranchNorms(config.feedforward_norms, config.norm, width)
        if config.cross_attention is not None:
            self.cross_attention: CrossAttention | None = CrossAttention(config.cross_attention, width)
            self.cross_attention_norm = BranchNorms(config.cross_attention_norms, config.norm, width)
        else:
            self.cross_attention = None
        if config.layer_scale is not None:
            self.attention_scale: nn.Module = LayerScale(config.layer_scale, width)
            self.feedforward_scale: nn.Module = LayerScale(config.layer_scale, width)
        else:
            self.attention_scale = self.feedforward_scale = nn.Identity()

    def forward(self, x_TD: Tensor, layout: Layout, layer: int) -> Tensor:
        norms = self.attention_norm
        attended_TD = norms.at("output", self.attention_scale(self.attention(norms.at("input", x_TD), layout, layer)))
        stream_TD = norms.at("residual", x_TD + attended_TD)
        if self.cross_attention is not None:
            norms = self.cross_attention_norm
            crossed_TD = norms.at("output", self.cross_attention(norms.at("input", stream_TD), layout.context, layer))
            stream_TD = norms.at("residual", stream_TD + crossed_TD)
        norms = self.feedforward_norm
        fed_TD = self.feedforward(norms.at("input", x_TD if self.parallel else stream_TD))
        return norms.at("residual", stream_TD + norms.at("output", self.feedforward_scale(fed_TD)))
