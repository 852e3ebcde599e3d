"""LayerNorm and RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.trunk.config import NormConfig


class Norm(nn.Module):
    """Normalises the last dimension. x[..., size] -> [..., size], in x's dtype; statistics in fp32."""

    def __init__(self, config: NormConfig, size: int) -> None:
        super().__init__()
        self.config, self.size = config, (size,)
        self.weight = nn.Parameter(torch.full((size,), 1.0 - config.offset))
        self.bias = nn.Parameter(torch.zeros(size)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.config.offset if self.config.offset else self.weight
        if self.config.kind == "rms":
            return F.rms_norm(x, self.size, weight, self.config.eps)
        return F.layer_norm(x, self.size, weight, self.bias, self.config.eps)
