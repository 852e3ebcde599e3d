"""What conversion to GGUF does to a tensor beside renaming it, and how that is undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from craton.checkpoints.weights import QuantizedTensor, Weight

Config = Mapping[str, Any]


class Change(Protocol):
    """From Hugging Face's tensor to the file's (`store`) and back (`restore`), for one config.json."""

    def store(self, tensor: Tensor, config: Config) -> Tensor: ...

    def restore(self, weight: Weight, config: Config) -> Weight: ...

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the other side."""


@dataclass(frozen=True)
class RowsSwapped:
    """Rows that go [groups, a, b, rest] at Hugging Face's go [groups, b, a, rest] in the file; nothing is unpacked."""

    split: Callable[[Config], tuple[int, int, int, int]]

    def store(self, tensor: Tensor, config: Config) -> Tensor:
        return tensor[self._order(tensor.shape[0], config)]

    def restore(self, weight: Weight, config: Config) -> Weight:
        return weight[np.argsort(self._order(weight.shape[0], config))]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def _order(self, rows: int, config: Config) -> npt.NDArray[np.int64]:
        return np.arange(rows).reshape(self.split(config)).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Shifted:
    """A constant that the file's numbers have on top."""

    by: float

    def store(self, tensor: Tensor, config: Config) -> Tensor:
        return tensor.float() + self.by

    def restore(self, weight: Weight, config: Config) -> Weight:
        return _plain(weight) - self.by

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


@dataclass(frozen=True)
class Turned:
    """Matrices are [in, out] at Hugging Face's (GPT-2's Conv1D) and [out, in] in the file."""

    def store(self, tensor: Tensor, config: Config) -> Tensor:
        return tensor.T if tensor.dim() == 2 else tensor

    def restore(self, weight: Weight, config: Config) -> Weight:
        plain = _plain(weight)
        return plain.T if plain.dim() == 2 else plain

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1]


@dataclass(frozen=True)
class Unpacked:
    """Nothing but that the model wants plain numbers, should the file hold blocks."""

    def store(self, tensor: Tensor, config: Config) -> Tensor:
        return tensor

    def restore(self, weight: Weight, config: Config) -> Weight:
        return _plain(weight)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


def _plain(weight: Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


# Llama's rotary halves [2, half] become pairs [half, 2] within each head.
INTERLEAVED_Q = RowsSwapped(lambda config: (config["num_attention_heads"], 2, -1, 1))
INTERLEAVED_K = RowsSwapped(lambda config: (config["num_key_value_heads"], 2, -1, 1))
# GPT-NeoX's [heads, parts] become [parts, heads].
PARTS_FIRST = RowsSwapped(lambda config: (1, config["num_attention_heads"], 3, -1))
PLUS_ONE = Shifted(1.0)
TURNED = Turned()
UNPACKED = Unpacked()
