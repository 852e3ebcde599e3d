"""The loader: which examples form step n, on which rank and in which micro-batch. It has no state to lose.

What a step holds is a pure function of (seed, epoch, step), so a run resumes from three integers, and on another number
of ranks or with other micro-batches it still sees the same examples in the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from craton.data.batch import Batch, collate
from craton.data.example import Example, untrained
from craton.data.plan import Indices, cut_rows, cut_step, permutation
from craton.errors import UsageError


class ExampleSource(Protocol):
    """Examples by index. lengths[len]: tokens of each, known without reading them. row: where all examples are windows
    of one fixed length, that length."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...

    @property
    def row(self) -> int | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class OrderedSource(Protocol):
    """A source that says itself what an epoch holds: some examples never, some more than once (a mixture)."""

    def order(self, seed: int, epoch: int, shuffle: bool) -> Indices:
        """len(source) indices, in the order of the epoch."""


@runtime_checkable
class EpochSource(Protocol):
    """A source whose examples are other ones in each epoch (masks drawn anew)."""

    def at_epoch(self, epoch: int) -> ExampleSource:
        """The examples as they are in this epoch, under the same indices."""


class ListSource:
    """Examples held in memory."""

    row: int | None = None

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self.lengths = np.array([example.tokens for example in examples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


class Loader:
    """The micro-batches of every step for one rank.

    batch: examples of a global step, over all ranks; the last step of an epoch may hold fewer. micro_tokens: at most so
    many tokens in a micro-batch, except where a single example is longer. sequences_together: the examples of a rank's
    step stay in one micro-batch whatever its size, for objectives that compare them with one another (in-batch
    negatives).

    Raises UsageError where there are no examples or a number makes no sense.
    """

    def __init__(
        self,
        source: ExampleSource,
        *,
        batch: int,
        micro_tokens: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        sequences_together: bool = False,
    ) -> None:
        if len(source) == 0:
            raise UsageError("there is nothing to train on: the data holds no example")
        for name, value in (("batch", batch), ("micro_tokens", micro_tokens), ("world", world)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1 (got {value})")
        if not 0 <= rank < world or seed < 0:
            raise UsageError(f"rank {rank} of {world} with seed {seed}: want 0 <= rank < world and seed >= 0")
        self.source, self.batch, self.micro_tokens, self.seed = source, batch, micro_tokens, seed
        self.rank, self.world, self.shuffle, self.sequences_together = rank, world, shuffle, sequences_together
        self.steps_per_epoch = -(-len(source) // batch)
        self._lengths = np.asarray(source.lengths, dtype=np.int64)
        # A memory of the last epoch's order, not a state.
        self._order = lru_cache(maxsize=1)(self._make_order)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a global step belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> Indices:
        """The examples of a global step, of all ranks, as indices into the source."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[within * self.batch : (within + 1) * self.batch]

    def step(self, index: int) -> list[Batch]:
        """This rank's micro-batches of a global step (from 0, over all epochs).

        Every rank has the same number, because ranks step together: where one has fewer, the rest are `empty_batch`es.
        """
        examples = self.indices(index)
        source = self.source.at_epoch(self.epoch_of(index)) if isinstance(self.source, EpochSource) else self.source
        cuts = self._cut(examples)
        micro_batches = [self._collate(source, examples[part]) for part in cuts[self.rank]]
        missing = max(len(parts) for parts in cuts) - len(micro_batches)
        if missing:
            row = self.source.row is not None
            micro_batches += [empty_batch(1 if row else len(self.source[int(examples[0])].sequences))] * missing
        return micro_batches

    def _make_order(self, epoch: int) -> Indices:
        if isinstance(self.source, OrderedSource):
            return self.source.order(self.seed, epoch, self.shuffle)
        return permutation(len(self.source), self.seed, epoch) if self.shuffle else np.arange(len(self.source))

    def _cut(self, examples: Indices) -> list[list[Indices]]:
        row = self.source.row
        if row is not None and not self.sequences_together:
            return cut_rows(len(examples), self.world, max(1, self.micro_tokens // row))
        lengths = self._lengths[examples]
        room = int(lengths.sum()) if self.sequences_together else self.micro_tokens
        return cut_step(lengths, self.world, room)

    def _collate(self, source: ExampleSource, indices: Indices) -> Batch:
        examples = [source[int(i)] for i in indices]
        if source.row is None:
            # Neighbours of one length go through attention as one batch (craton.trunk.layout).
            examples.sort(key=lambda example: [len(sequence) for sequence in example.sequences], reverse=True)
        return collate(examples, row=source.row)


def empty_batch(sequences: int = 1) -> Batch:
    """What a rank runs beside others that still have examples: untrained tokens that belong to no example.

    sequences: of one token each, as many as an example has, so that objectives for pairs find a pair.
    """
    batch = collate([Example((untrained([0]),) * sequences)])
    return replace(batch, sequences=(), labels=batch.labels[:0])
