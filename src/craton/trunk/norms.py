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
        config = self.config
        if config.kind == "layer":
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.layer_norm(x, self.size, self.weight.to(x.dtype), bias, config.eps)
        if not config.offset:
            return F.rms_norm(x, self.size, self.weight.to(x.dtype), config.eps)
        # In fp32 to the end: 1 + w in bfloat16 would lose most of a small w.
        return F.rms_norm(x.float(), self.size, self.weight.float() + config.offset, config.eps).to(x.dtype)
