"""Flat packed batches: sequences one after another, no padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from craton.data.example import UNTRAINED, Example, ShownPicture


@dataclass(frozen=True)
class Batch:
    """Flat tokens. ids_T, positions_T, segments_T, targets_T: int64; targets are -100 where nothing is trained.

    lengths: of the sequences, in order. sequences: how many of them each example has. labels: one for each example, -1
    where it has none. row: where every `row` tokens form one row of fixed length (windows of a token stream), that
    length; attention then runs on rows of one shape, whatever documents they hold. pictures: of all examples, in the
    order of their tokens.
    """

    ids_T: Tensor
    positions_T: Tensor
    segments_T: Tensor
    targets_T: Tensor
    lengths: tuple[int, ...]
    sequences: tuple[int, ...]
    labels: Tensor
    row: int | None = None
    pictures: tuple[ShownPicture, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return len(self.ids_T)

    @property
    def trained(self) -> int:
        """Positions that have a target."""
        return int((self.targets_T != UNTRAINED).sum())

    def pixels(self) -> Tensor:
        """What a model sees of all pictures: fp32 [tiles, channels, height, width], read from their files."""
        return torch.from_numpy(np.concatenate([picture.read() for picture in self.pictures]))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return replace(
            self,
            ids_T=self.ids_T.to(device),
            positions_T=self.positions_T.to(device),
            segments_T=self.segments_T.to(device),
            targets_T=self.targets_T.to(device),
            labels=self.labels.to(device),
        )


def collate(examples: Sequence[Example], row: int | None = None) -> Batch:
    """Pack examples, whole and in order, into one flat batch. Positions restart and segments change at a sequence."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    lengths = tuple(len(sequence) for sequence in sequences)
    positions = [np.arange(n) for n in lengths]
    segments = np.repeat(np.arange(len(lengths)), lengths)
    return Batch(
        ids_T=_tensor([sequence.ids for sequence in sequences]),
        positions_T=_tensor(positions),
        segments_T=torch.from_numpy(segments),
        targets_T=_tensor([sequence.targets for sequence in sequences]),
        lengths=lengths,
        sequences=tuple(len(example.sequences) for example in examples),
        labels=torch.tensor([-1 if e.label is None else e.label for e in examples], dtype=torch.int64),
        row=row,
        pictures=tuple(picture for example in examples for picture in example.pictures),
    )


def _tensor(parts: list[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64))
