"""The data of a training benchmark as a file that every contender reads: the same tokens and targets in one order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from craton.data.example import TokenSequence, next_token_targets


def random_windows(count: int, length: int, vocab: int, seed: int) -> list[TokenSequence]:
    """Windows of random tokens, each predicting all its tokens but the first, as transformers trains a text."""
    rng = np.random.default_rng(seed)
    return [next_token_targets(ids, [True] * length) for ids in rng.integers(0, vocab, (count, length))]


def save_sequences(path: Path, sequences: Sequence[TokenSequence]) -> Path:
    """Write them in this order."""
    np.savez(
        path,
        ids=np.concatenate([sequence.ids for sequence in sequences]),
        targets=np.concatenate([sequence.targets for sequence in sequences]),
        lengths=np.array([len(sequence) for sequence in sequences]),
    )
    return path


def load_sequences(path: str | Path) -> list[TokenSequence]:
    """What `save_sequences` wrote."""
    with np.load(path, allow_pickle=False) as file:
        borders = np.cumsum(file["lengths"])[:-1]
        parts = zip(np.split(file["ids"], borders), np.split(file["targets"], borders), strict=True)
        return [TokenSequence(ids, targets) for ids, targets in parts]


def sorted_within(sequences: Sequence[TokenSequence], parts: Sequence[int]) -> list[TokenSequence]:
    """The sequences cut into `parts` of so many each, every part sorted by length: the batches of a part hold what they
    held in all, and hardly any padding."""
    result: list[TokenSequence] = []
    for size in parts:
        result += sorted(sequences[len(result) : len(result) + size], key=len)
    return result
