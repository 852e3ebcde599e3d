"""The one block: attention and feed-forward around a residual stream, with the norms where the config puts them."""

from __future__ import annotations

from torch import Tensor, nn

from craton.trunk.attention import Attention, LatentAttention
from craton.trunk.config import ExpertsConfig, LayerConfig, NormConfig, NormPlace
from craton.trunk.feedforward import Experts, FeedForward
from craton.trunk.layout import Layout
from craton.trunk.norms import Norm


class BranchNorms(nn.Module):
    """The norms around one branch; a place without a norm passes x on."""

    def __init__(self, places: tuple[NormPlace, ...], config: NormConfig, width: int) -> None:
        super().__init__()
        for place in ("input", "output", "residual"):
            self.add_module(place, Norm(config, width) if place in places else nn.Identity())


class Block(nn.Module):
    """x[T, width] -> [T, width]."""

    def __init__(self, config: LayerConfig, width: int) -> None:
        super().__init__()
        self.parallel = config.parallel
        latent = config.attention.latent is not None
        self.attention = (LatentAttention if latent else Attention)(config.attention, width)
        experts = isinstance(config.feedforward, ExpertsConfig)
        self.feedforward = (Experts if experts else FeedForward)(config.feedforward, width)  # type: ignore[arg-type]
        self.attention_norm = BranchNorms(config.attention_norms, config.norm, width)
        self.feedforward_norm = BranchNorms(config.feedforward_norms, config.norm, width)

    def forward(self, x_TD: Tensor, layout: Layout, layer: int) -> Tensor:
        norms = self.attention_norm
        attended_TD = norms.output(self.attention(norms.input(x_TD), layout, layer))
        if not self.parallel:
            x_TD, attended_TD = norms.residual(x_TD + attended_TD), None
        norms = self.feedforward_norm
        fed_TD = norms.output(self.feedforward(norms.input(x_TD)))
        return norms.residual(x_TD + fed_TD if attended_TD is None else x_TD + attended_TD + fed_TD)
