"""The packed linear layers of a safetensors checkpoint: what each reader of a layout makes of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from craton.checkpoints.safetensors import TensorFolder
from craton.errors import FileFormatError

BITS: Final = (2, 3, 4, 8)
FLOATS: Final = ("F16", "BF16", "F32")
REMEDY: Final = "the file is damaged, or config.json belongs to another model: fetch them again"


@dataclass(frozen=True)
class Codes:
    """The content of one packed layer, unpacked: see `as_weight`."""

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None = None
    group_of_I: Tensor | None = None


@dataclass(frozen=True)
class PackedLayer:
    """A linear layer as the files hold it. group: inputs for each scale. parts: its tensors' names, the scales' first.

    read: unpacks it, and raises FileFormatError where its tensors contradict each other.
    """

    bits: int
    group: int
    symmetric: bool
    shape: tuple[int, int]
    parts: tuple[str, ...]
    read: Callable[[], Codes]


class Tensors:
    """The tensors of the packed layers, each checked before it is taken."""

    def __init__(self, folder: TensorFolder) -> None:
        self.folder = folder
        self.where = str(folder.files[0].path)

    def names(self, ending: str) -> list[str]:
        """The layers that have a tensor of this ending."""
        return [name.removesuffix(ending) for name in self.folder.tensors if name.endswith(ending)]

    def has(self, name: str) -> bool:
        return name in self.folder.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that must be there."""
        if name not in self.folder.tensors:
            raise FileFormatError(f"tensor {name!r} is missing", where=self.where, remedy=REMEDY)
        return self.folder.tensors[name].shape

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a matrix that must be there."""
        shape = self.shape(name)
        if len(shape) != 2 or not all(shape):
            raise FileFormatError(
                f"tensor {name!r} has shape {list(shape)}, which is no matrix's", where=self.where, remedy=REMEDY
            )
        return shape

    def check(self, name: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """Refuse a tensor that is absent or of another shape or element type."""
        found, dtype = self.shape(name), self.folder.tensors[name].dtype
        if found != shape:
            raise FileFormatError(
                f"tensor {name!r} has shape {list(found)}; its layer asks for {list(shape)}",
                where=self.where,
                remedy=REMEDY,
            )
        if dtype not in dtypes:
            raise FileFormatError(
                f"tensor {name!r} is {dtype}, not {' or '.join(dtypes)}", where=self.where, remedy=REMEDY
            )

    def get(self, name: str) -> Tensor:
        """A tensor that was checked."""
        return self.folder.tensor(name)

    def order(self, name: str, columns: int, group: int, groups: int) -> Tensor | None:
        """The group of each input by the tensor `name`; None where it is absent or says that they are in order."""
        if not self.has(name):
            return None
        self.check(name, (columns,), "I32", "I64")
        group_of_I = self.get(name).long()
        if columns and not 0 <= int(group_of_I.min()) <= int(group_of_I.max()) < groups:
            raise FileFormatError(
                f"tensor {name!r} names groups outside of 0 to {groups - 1}", where=self.where, remedy=REMEDY
            )
        return None if torch.equal(group_of_I, torch.arange(columns) // group) else group_of_I
