"""Rotary position embeddings: frequencies (with every scaling), tables and their application."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from craton.trunk.config import RotaryConfig, RotaryScaling


def inverse_frequencies(config: RotaryConfig, long: bool = False) -> Tensor:
    """Radians per position of each rotated pair of one axis, fp32 [dims / 2 / axes]. `long` picks longrope's factors
    for long texts."""
    exponents = torch.arange(0, config.dims, 2 * config.axes, dtype=torch.float32) / config.dims
    frequencies = 1.0 / config.theta**exponents
    scaling = config.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / torch.tensor(scaling.long_factors if long else scaling.short_factors)
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(frequencies, config, scaling)


def _llama3(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    # Short wavelengths keep their frequency, long ones are divided by the factor, those between are blended.
    assert scaling.original_context is not None
    turns = scaling.original_context * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def _yarn(frequencies: Tensor, config: RotaryConfig, scaling: RotaryScaling) -> Tensor:
    # The pair that turns `turns` times within the original context sits at this (fractional) dimension.
    assert scaling.original_context is not None
    context = scaling.original_context

    def dimension(turns: float) -> float:
        return config.dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dims - 1)
    ramp = (torch.arange(config.dims // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / scaling.factor * stretched


class Rotary:
    """cos and sin for one set of positions, in the form that `apply` wants: fp32 [T, 1, dims], sin already signed."""

    def __init__(self, config: RotaryConfig, positions_T: Tensor, lengths_T: Tensor, dtype: torch.dtype) -> None:
        """positions_T: [T], or [T, axes] where a token's place is more than one number.

        lengths_T: how long the whole sequence of each token is so far, this pass's tokens included.

        Longrope picks by it, for each sequence alone: the long factors once it is longer than the original context.
        Keys that a cache already holds keep the factors of the pass that wrote them, as in the reference: whoever
        decodes across the boundary and wants what a single pass gives must compute the sequence anew there.
        """
        self.config = config
        device, scaling = positions_T.device, config.scaling
        angles = (positions_T.float()[..., None] * inverse_frequencies(config).to(device)).flatten(1)
        if scaling is not None and scaling.kind == "longrope":
            assert scaling.original_context is not None
            stretched = positions_T[:, None].float() * inverse_frequencies(config, long=True).to(device)
            angles = torch.where(lengths_T[:, None] > scaling.original_context, stretched, angles)
        cos, sin = angles.cos(), angles.sin()
        if config.interleaved:
            cos, sin = torch.stack((cos, cos), -1).flatten(1), torch.stack((-sin, sin), -1).flatten(1)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        factor = scaling.attention_factor if scaling is not None else 1.0
        self.cos = (cos * factor).to(dtype)[:, None]
        self.sin = (sin * factor).to(dtype)[:, None]

    def apply(self, x_THK: Tensor) -> Tensor:
        """Rotate the first `dims` of each head by its token's position."""
        dims = self.config.dims
        if dims < x_THK.shape[-1]:
            return torch.cat((self._rotate(x_THK[..., :dims]), x_THK[..., dims:]), -1)
        return self._rotate(x_THK)

    def _rotate(self, x: Tensor) -> Tensor:
        # The partner of each element: (x0, x1) -> (-x1, x0), the sign being folded into sin.
        if self.config.interleaved:
            partner = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
        else:
            partner = x.roll(self.config.dims // 2, -1)
        return torch.addcmul(x * self.cos, partner, self.sin)
