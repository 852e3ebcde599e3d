"""Weights that are still in a file's own form, and the modules that keep block-quantised ones that way in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.checkpoints.gguf import GGMLType, dequantize


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix of block-quantised rows as GGUF stores them: uint8 [rows, bytes of a row]."""

    kind: GGMLType
    blocks: npt.NDArray[np.uint8]
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, [rows, columns]."""
        return torch.from_numpy(dequantize(self.blocks, self.kind)).view(self.shape).to(dtype)

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> QuantizedTensor:
        """Some of the rows; quantisation runs along a row, so nothing is lost."""
        blocks = self.blocks[index]
        return QuantizedTensor(self.kind, blocks, (len(blocks), *self.shape[1:]))


Weight = Tensor | QuantizedTensor


class WeightSource(Protocol):
    """An opened checkpoint file under Hugging Face's tensor names."""

    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]  # how each is stored, in the format's own words: "F32", "BF16", "Q4_0", ...

    def weight(self, name: str) -> Weight:
        """The named tensor, as the file holds it."""

    def release(self) -> None:
        """Give back the memory that reading has filled so far: the weights have been copied to their own place."""


class QuantizedLinear(nn.Module):
    """A linear layer over block-quantised weights. Right for every block type and slow: it dequantises at each call;
    the inference engine puts a kernel in its place."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.quantized = weight
        self.out_features, self.in_features = weight.shape
        self.bias: nn.Parameter | None = nn.Parameter(bias, requires_grad=False) if bias is not None else None

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.quantized.dequantize(x_TD.dtype), self.bias)


class QuantizedEmbedding(nn.Module):
    """A token embedding over block-quantised rows: only the rows asked for are dequantised, to `dtype`."""

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized, self.dtype = weight, dtype
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids_T: Tensor) -> Tensor:
        return self.quantized[ids_T.cpu().numpy()].dequantize(self.dtype)
