"""A weight matrix as small integers with a scale for each group of inputs: what every quantiser makes and every file of
quantised weights holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from craton.errors import UsageError


@dataclass(frozen=True)
class IntWeight:
    """weight[o, i] = (codes[o, i] - zeros[o, i // group]) * scales[o, i // group].

    bits: 2, 3, 4 or 8. codes_OI: int8, from -2^(bits - 1) to 2^(bits - 1) - 1. scales_OG: fp16, one for each `group`
    inputs (the last group of a row may be shorter). zeros_OG: int8 in the codes' own range; none: all are 0.
    """

    bits: int
    group: int
    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes_OI.shape
        expected = (rows, -(-columns // self.group))
        if tuple(self.scales_OG.shape) != expected or self.scales_OG.dtype != torch.float16:
            raise UsageError(
                f"scales are float16 {list(expected)}, not {self.scales_OG.dtype} {list(self.scales_OG.shape)}"
            )
        if self.zeros_OG is not None and tuple(self.zeros_OG.shape) != expected:
            raise UsageError(f"zeros are {list(expected)}, not {list(self.zeros_OG.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.codes_OI.shape
        return rows, columns

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, [out, in]; computed in fp32."""
        columns = self.codes_OI.shape[1]
        codes_OI = self.codes_OI.float()
        if self.zeros_OG is not None:
            codes_OI = codes_OI - self._spread(self.zeros_OG, columns)
        return (codes_OI * self._spread(self.scales_OG, columns)).to(dtype)

    def _spread(self, values_OG: Tensor, columns: int) -> Tensor:
        return values_OG.float().repeat_interleave(min(self.group, columns), 1)[:, :columns]

    @property
    def stored_bits(self) -> float:
        """Bits a weight on disk, scales and zeros included."""
        rows, columns = self.shape
        extra = self.scales_OG.numel() * (16 + (self.bits if self.zeros_OG is not None else 0))
        return self.bits + extra / (rows * columns)
