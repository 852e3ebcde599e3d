"""Vectors of a large batch in the memory of a small one: gradient caching (Gao 2021, arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Part = TypeVar("Part")


def encode_in_parts(encode: Callable[[Part], tuple[Tensor, ...]], parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """What `encode` makes of each part (vectors, row by row), joined; parts is not empty.

    With several parts nothing of the way to a vector is kept. Going backwards, a loss over all vectors first gives its
    gradient with respect to each of them; then each part is encoded again, now for its gradient, one part at a time.
    The gradients are those of all parts encoded together, dropout included; the price is a second pass forward.
    """
    if len(parts) == 1:
        return encode(parts[0])
    # A checkpoint around a whole part is just that: autograd asks for the parts in turn, the last one first, and lets
    # go of each before the next.
    made = [checkpoint(encode, part, use_reentrant=False) for part in parts]
    return tuple(torch.cat(rows) for rows in zip(*made, strict=True))
