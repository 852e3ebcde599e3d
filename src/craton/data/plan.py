"""How an epoch is ordered and a global step is cut into micro-batches: pure functions of a few integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Cuts = list[list[Indices]]
"""For each rank its micro-batches, each the indices of its examples within the step."""


def permutation(n: int, *key: int) -> Indices:
    """The numbers below `n` in an order that `key` alone decides.

    Sorted draws of Philox rather than Generator.permutation: numpy promises to keep the raw stream of a bit generator
    the same from version to version, and what Generator makes of it not; a run must resume in next year's numpy.
    """
    draws = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(draws, kind="stable")


def cut_step(lengths: npt.NDArray[np.int64], world: int, micro_tokens: int) -> Cuts:
    """Cut a step of examples with `lengths` tokens into micro-batches of at most `micro_tokens` for `world` ranks.

    Ranks are balanced by tokens; an example longer than `micro_tokens` has a micro-batch of its own. Micro-batches go
    from full to sparse, so that ranks that step together have work of about one size.
    """
    return [_pack(share, lengths, micro_tokens) for share in _balance(lengths, world)]


def cut_rows(rows: int, world: int, per_batch: int) -> Cuts:
    """Cut a step of `rows` equal windows into micro-batches of at most `per_batch`, as equal in size as can be.

    The fewest micro-batches that hold them; then sizes differ by one at most, so that compiled kernels see few shapes.
    """
    shares = [np.arange(rank, rows, world) for rank in range(world)]
    count = -(-len(shares[0]) // per_batch)
    return [[part for part in np.array_split(share, count) if len(part)] for share in shares]


def _balance(lengths: npt.NDArray[np.int64], world: int) -> list[Indices]:
    """Longest processing time first (Graham 1969): each example, longest first, goes to the rank with the least."""
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for index in _longest_first(lengths):
        rank = loads.index(min(loads))
        shares[rank].append(int(index))
        loads[rank] += int(lengths[index])
    return [np.array(share, dtype=np.int64) for share in shares]


def _pack(share: Indices, lengths: npt.NDArray[np.int64], micro_tokens: int) -> list[Indices]:
    """First-fit decreasing: at most 11/9 of the fewest micro-batches possible (Johnson 1973). `share` is sorted."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in share:
        size = int(lengths[index])
        place = next((k for k, left in enumerate(room) if size <= left), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(micro_tokens)
        bins[place].append(int(index))
        room[place] -= size
    fullest_first = sorted(range(len(bins)), key=lambda k: room[k])
    return [np.array(bins[k], dtype=np.int64) for k in fullest_first]


def _longest_first(lengths: Sequence[int] | npt.NDArray[np.int64]) -> Indices:
    return np.argsort(-np.asarray(lengths), kind="stable")
