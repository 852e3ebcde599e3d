"""Beginnings of texts that were read before: copies of their keys and values, in blocks that texts share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from craton.trunk import KVCache

# Positions of a block. Smaller blocks find a little more of a text and cost more calls to copy; with 64 numbers of 16
# bits a head, a block fills whole pages of memory.
BLOCK = 32


class Kind(NamedTuple):
    """What texts must have in common before they share anything: whose they are (a salt keeps one key's texts from
    another's), and whether LongRoPE rotates their keys by its long frequencies."""

    salt: str
    stretched: bool


# What stands before a block, the block before it by its number or the beginning of a text, and the block's own ids. A
# dictionary finds it by its hash and then compares it whole, so two texts whose hashes agree are still two texts; and a
# number is never used again, so a block whose predecessor was dropped can never continue another text.
_Key = tuple[int | Kind, tuple[int, ...]]


@dataclass(frozen=True)
class _Block:
    number: int
    tensors: list[Tensor]  # of each layer the keys [G, BLOCK, K], then of each the values


class PrefixStore:
    """Blocks of `BLOCK` positions of all layers, each behind the block that stood before it; the block that was not
    used for the longest time is dropped first.

    A block is never newer than the one before it, so what is dropped first is always the end of a text.
    """

    def __init__(self, cache: KVCache) -> None:
        """cache: whose slots are copied from and to."""
        self._cache = cache
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._made = 0

    def __len__(self) -> int:
        """How many blocks it holds."""
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for block in self._blocks.values() for tensor in block.tensors)

    def match(self, kind: Kind, ids: Sequence[int]) -> int:
        """How many ids at the beginning of a text are held; their blocks count as used now."""
        chain = [key for key, _ in self._chain(kind, ids)]
        self._touch(chain)
        return len(chain) * BLOCK

    def load(self, kind: Kind, ids: Sequence[int], slot: int) -> int:
        """Make a slot of the cache hold what is held of a text; gives how many positions that is."""
        chain = [block for _, block in self._chain(kind, ids)]
        length = len(chain) * BLOCK
        self._cache.reserve(length)
        targets = (*self._cache.keys, *self._cache.values)
        for target, parts in zip(targets, zip(*(block.tensors for block in chain), strict=True), strict=bool(chain)):
            torch.cat(parts, 1, out=target[slot, :, :length])
        self._cache.lengths[slot] = length
        return length

    def keep(self, kind: Kind, ids: Sequence[int], slot: int, room: int, *, but: int = 0) -> None:
        """Copy the whole blocks of a text that a slot of the cache holds, from its beginning, and drop as many older
        ones as keep the store within `room` blocks; of these, the last `but` used are not dropped."""
        count = max(0, min(len(ids) // BLOCK, room - but))
        keys = [key for key, _ in self._chain(kind, ids[: count * BLOCK])]
        self._touch(keys)
        while len(self) > but + len(keys) and len(self) + count - len(keys) > room:
            self.drop()
        known = len(keys)
        sources = [
            t[slot, :, known * BLOCK : count * BLOCK].unflatten(1, (-1, BLOCK)).unbind(1)
            for t in (*self._cache.keys, *self._cache.values)
            if count > known
        ]
        before = self._blocks[keys[-1]].number if keys else kind
        for i, tensors in enumerate(zip(*sources, strict=True)):
            first = (known + i) * BLOCK
            keys.append((before, tuple(ids[first : first + BLOCK])))
            self._made += 1
            self._blocks[keys[-1]] = _Block(self._made, [tensor.clone() for tensor in tensors])
            before = self._made
        self._touch(keys)

    def drop(self) -> None:
        """Forget the block that was not used for the longest time."""
        self._blocks.popitem(last=False)

    def check(self) -> None:
        """Raises RuntimeError if a block has lost the one before it, or has another size than the cache says."""
        numbers: set[int] = set()
        for (before, ids), block in reversed(self._blocks.items()):
            if len(ids) != BLOCK or not (isinstance(before, Kind) or before in numbers):
                raise RuntimeError(f"block {block.number} of the prefix store stands behind nothing")
            numbers.add(block.number)
        if self.nbytes != len(self) * BLOCK * self._cache.position_bytes:
            raise RuntimeError(f"{len(self)} blocks of the prefix store have {self.nbytes} bytes")

    def _chain(self, kind: Kind, ids: Sequence[int]) -> Iterator[tuple[_Key, _Block]]:
        before: int | Kind = kind
        for first in range(0, len(ids) - BLOCK + 1, BLOCK):
            key = (before, tuple(ids[first : first + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                return
            yield key, block
            before = block.number

    def _touch(self, keys: Sequence[_Key]) -> None:
        for key in reversed(keys):  # the end of a text first: it is the older
            self._blocks.move_to_end(key)
