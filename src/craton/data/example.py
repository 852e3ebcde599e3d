"""What training reads: token sequences with their targets, and the examples that objectives look at as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

UNTRAINED: Final = -100
"""The target of a position that takes no part in the loss."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Tokens that see only one another. ids[n]; targets[n]: what each position shall predict, or UNTRAINED.

    Targets are made once, where the sequence is made (`next_token_targets`), and nothing behind shifts them again.
    """

    ids: Ids
    targets: Ids

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class ShownPicture:
    """A picture whose tokens stand in an example's only sequence. end: behind its last token. digest: of what the model
    sees of it. read: gives that, fp32 [tiles, channels, height, width], from the file each time, as the pictures of a
    whole run do not fit the memory; it raises DataError if the file is not what it was."""

    end: int
    tiles: int
    digest: bytes
    read: Callable[[], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Example:
    """Sequences that an objective looks at as one and that therefore never part: they share a micro-batch.

    One for language modelling and classification; chosen and rejected for preferences; anchor, positive and negatives
    for embeddings; the pieces of documents in one window of a stream of tokens for pretraining. label: the class, or
    for unpaired preferences whether the answer is wanted. origin: where it came from, "train.jsonl:17".
    pictures: in the order of their tokens.
    """

    sequences: tuple[TokenSequence, ...]
    label: int | None = None
    origin: str = ""
    pictures: tuple[ShownPicture, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def trained(self) -> int:
        """How many of its positions have a target."""
        return sum(int(np.count_nonzero(sequence.targets != UNTRAINED)) for sequence in self.sequences)


def next_token_targets(ids: Sequence[int] | Ids, trained: Sequence[bool] | npt.NDArray[np.bool_]) -> TokenSequence:
    """The sequence whose positions predict the token that follows, where that token is trained.

    ids[n], trained[n]: whether to learn to produce each token. By position and never by value, so that a padding token
    that is also the end of a sentence is learnt where it ends one. The first token is nobody's target.
    """
    ids_n = np.asarray(ids, dtype=np.int32)
    targets = np.full(len(ids_n), UNTRAINED, dtype=np.int32)
    if len(ids_n) > 1:
        targets[:-1] = np.where(np.asarray(trained, dtype=bool)[1:], ids_n[1:], UNTRAINED)
    return TokenSequence(ids_n, targets)


def untrained(ids: Sequence[int] | Ids) -> TokenSequence:
    """A sequence that is only read: the input of a classification or embedding head."""
    ids_n = np.asarray(ids, dtype=np.int32)
    return TokenSequence(ids_n, np.full(len(ids_n), UNTRAINED, dtype=np.int32))
