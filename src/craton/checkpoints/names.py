"""Between the tensor names of a published checkpoint and ours, in both directions.

A family lists `Entry`s. Most rename one tensor; the others also split, join or turn it, and each carries its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """`load` makes our tensors of theirs, `save` theirs of ours. by_rows: load only takes, splits or joins rows, so it
    may be applied to block-quantised rows as well. fp32: kept so whatever the model runs in, as rounding would change
    a choice that is made by them. linear: false where a linear layer of ours is something else of theirs."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda tensors: tensors
    save: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda tensors: tensors
    by_rows: bool = True
    fp32: bool = False
    linear: bool = True


def same(theirs: str, ours: str) -> Entry:
    """The same tensor under another name."""
    return Entry((theirs,), (ours,))


def transposed(theirs: str, ours: str) -> Entry:
    """[in, out] there (GPT-2's Conv1D), [out, in] here."""

    def turn(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0].T.contiguous()]

    return Entry((theirs,), (ours,), turn, turn, by_rows=False)


def row_parts(theirs: str, ours: Sequence[str], sizes: Sequence[int], *, transpose: bool = False) -> Entry:
    """One fused tensor there, several here, cut along the output rows (along the columns if transposed there)."""

    def load(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        tensor = tensors[0].T.contiguous() if transpose and tensors[0].dim() == 2 else tensors[0]
        cuts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return [tensor[a:b] for a, b in pairwise(cuts)]

    def save(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        joined = torch.cat(list(tensors))
        return [joined.T.contiguous() if transpose and joined.dim() == 2 else joined]

    return Entry((theirs,), tuple(ours), load, save, by_rows=not transpose)


def head_parts(theirs: str, ours: Sequence[str], heads: int) -> Entry:
    """One tensor there whose rows go [head, part, head_size] (GPT-NeoX), one tensor for each part here."""
    parts = len(ours)

    def load(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        rows_HPS = np.arange(tensors[0].shape[0]).reshape(heads, parts, -1)
        # An array of row numbers, which block-quantised rows understand as well.
        return [tensors[0][rows_HPS[:, part].reshape(-1)] for part in range(parts)]

    def save(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.stack([t.unflatten(0, (heads, -1)) for t in tensors], 1).flatten(0, 2)]

    return Entry((theirs,), tuple(ours), load, save)
