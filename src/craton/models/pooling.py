"""From token vectors to one vector for each text."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from craton.config import Settings


class PoolingConfig(Settings):
    """How a sentence encoder was trained to be read (Reimers & Gurevych 2019, arXiv 1908.10084).

    mode: the mean of the token vectors, the first ("cls") or the last one. max_tokens: the longest text that its
    makers meant (None: the model's context).
    """

    mode: Literal["mean", "cls", "last"] = "mean"
    normalise: bool = True
    max_tokens: PositiveInt | None = None


def pool(hidden_TD: Tensor, lengths: list[int], config: PoolingConfig) -> Tensor:
    """One fp32 vector [B, width] for each of the packed sequences of these lengths."""
    lengths_B = torch.tensor(lengths, device=hidden_TD.device)
    ends_B = lengths_B.cumsum(0)
    if config.mode == "last":
        pooled_BD = hidden_TD[ends_B - 1].float()
    elif config.mode == "cls":
        pooled_BD = hidden_TD[ends_B - lengths_B].float()
    else:
        pooled_BD = torch.stack([part.float().mean(0) for part in hidden_TD.split(lengths)])
    return F.normalize(pooled_BD, dim=-1) if config.normalise else pooled_BD
