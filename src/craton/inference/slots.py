"""Who has which slot of the cache, what the others still hold, and the memory that all of it may take."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from craton.inference.prefix_store import BLOCK, Kind, PrefixStore
from craton.trunk import KVCache


class Tenant(Protocol):
    """Whoever has a slot."""

    @property
    def kind(self) -> Kind:
        """With which texts it may share."""

    @property
    def readable(self) -> list[int]:
        """The ids whose keys and values its slot holds and another text may share."""


@dataclass(frozen=True)
class _Held:
    kind: Kind
    ids: list[int]


class Slots:
    """The slots of a cache and its memory, counted in blocks of `BLOCK` positions.

    A tenant has as many blocks as it was given room for. A slot without a tenant keeps what the last one left, until
    another text takes it; then, and only then, its text is copied to the prefix store. Where memory is short, stored
    blocks go first, then what idle slots hold, the longest unused first; a tenant's blocks are taken by nobody.

    Slots are contiguous and not made of blocks, because attention then reads views instead of gathering; that an unused
    position costs no memory is the operating system's paging (see `KVCache`).
    """

    def __init__(self, cache: KVCache, slots: int, cache_bytes: int) -> None:
        """slots: how many tenants there can be. cache_bytes: of all keys and values together."""
        cache.reserve_slots(slots)
        self._cache, self._count = cache, slots
        self._store = PrefixStore(cache)
        self.total = cache_bytes // (BLOCK * cache.position_bytes)
        self._tenants: dict[int, Tenant] = {}
        self._given: dict[int, int] = {}  # slot -> the blocks of its tenant
        self._idle: OrderedDict[int, _Held] = OrderedDict()  # the longest unused first

    @property
    def used(self) -> int:
        """Blocks that are given to tenants, stored, or held by idle slots."""
        return sum(self._given.values()) + self._idle_blocks() + len(self._store)

    @property
    def used_bytes(self) -> int:
        """The same in bytes."""
        return self.used * BLOCK * self._cache.position_bytes

    def fits(self, positions: int, *, without: Collection[int | None] = ()) -> bool:
        """Whether there is a slot and memory for so many positions once these slots have no tenant any more. A block
        for each other tenant stays free: else who comes would soon have to go again for them to grow."""
        stay = [blocks + 1 for slot, blocks in self._given.items() if slot not in without]
        return len(stay) < self._count and sum(stay) + blocks_of(positions) <= self.total

    def found(self, kind: Kind, ids: Sequence[int]) -> int:
        """How many ids at the beginning of a text need not be read again."""
        return max(self._store.match(kind, ids), self._donor(kind, ids)[1])

    def place(self, tenant: Tenant, ids: Sequence[int], positions: int) -> tuple[int, int]:
        """Give a tenant a slot with room for `positions`; gives the slot, and how many of `ids` it holds already. There
        must be room (see `fits`)."""
        kind, blocks = tenant.kind, blocks_of(positions)
        given = sum(self._given.values())
        stored, (donor, shared) = self._store.match(kind, ids), self._donor(kind, ids)
        slot = self._choose(donor, shared, stored)
        if donor in self._idle:
            self._idle.move_to_end(donor)
            if slot != donor and given + blocks + blocks_of(len(self._idle[donor].ids)) > self.total:
                slot = donor  # there is no memory for both
        in_place, loads = slot == donor and shared >= stored, stored >= max(shared, 1)
        lost = self._idle.get(slot)
        if lost is not None:
            self._idle.move_to_end(slot)
        while (room := self.total - given - blocks - self._idle_blocks(besides=slot)) < 0:
            self._forget_idle()
        if lost is not None:
            if not in_place or len(lost.ids) - shared >= BLOCK:
                # What is asked for now goes before what may be asked for again.
                self._store.keep(lost.kind, lost.ids, slot, room, but=blocks_of(stored) if loads else 0)
            del self._idle[slot]
        held = self._cache.lengths[slot]
        start = shared if in_place else 0
        self._cache.truncate(slot, start)
        if not in_place:
            if loads:
                start = self._store.load(kind, ids, slot)
            elif shared and donor != slot:
                start = shared
                self._cache.copy(donor, slot, shared)
        while len(self._store) > room:
            self._store.drop()
        if held > positions:
            self._cache.release(slot)
        self._tenants[slot], self._given[slot] = tenant, blocks
        return slot, start

    def grow(self, slot: int, positions: int) -> bool:
        """Give a tenant room for so many positions, if there is memory for it."""
        more = blocks_of(positions) - self._given[slot]
        if more > 0:
            if sum(self._given.values()) + more > self.total:
                return False
            self._make_room(more)
            self._given[slot] += more
        return True

    def leave(self, slot: int) -> None:
        """A tenant has ended; its slot keeps what another text may share."""
        tenant = self._tenants.pop(slot)
        del self._given[slot]
        # What an interrupted step had not finished writing does not count.
        ids = tenant.readable[: self._cache.lengths[slot]]
        self._cache.truncate(slot, len(ids))
        if ids:
            self._idle[slot] = _Held(tenant.kind, ids)
        else:
            self._cache.release(slot)

    def vacate(self, slot: int) -> None:
        """Take a slot from its tenant. What it had read is stored, as far as there is memory for it."""
        tenant = self._tenants.pop(slot)
        del self._given[slot]
        ids = tenant.readable[: self._cache.lengths[slot]]
        self._store.keep(tenant.kind, ids, slot, self.total - sum(self._given.values()) - self._idle_blocks())
        self._cache.truncate(slot, 0)
        self._cache.release(slot)

    def check(self) -> None:
        """Raises RuntimeError if something is held that nobody accounts for. For a time without tenants."""
        if self._tenants or self._given:
            raise RuntimeError(f"slots {sorted(self._given)} still have tenants")
        for slot, length in enumerate(self._cache.lengths):
            held = len(self._idle[slot].ids) if slot in self._idle else 0
            if length != held:
                raise RuntimeError(f"slot {slot} holds {length} positions and should hold {held}")
        self._store.check()
        if self.used > self.total:
            raise RuntimeError(f"{self.used} blocks of memory are used and {self.total} are allowed")

    def _donor(self, kind: Kind, ids: Sequence[int]) -> tuple[int, int]:
        """The slot that holds the longest beginning of a text, an idle one if there is the choice, and its length; -1
        and 0 where none does."""
        best: tuple[int, bool, int] = (0, False, -1)
        for slot, held in self._idle.items():
            if held.kind == kind:
                best = max(best, (common_length(held.ids, ids), True, slot))
        for slot, tenant in self._tenants.items():
            if tenant.kind == kind:
                shared = min(common_length(tenant.readable, ids), self._cache.lengths[slot])
                best = max(best, (shared, False, slot))
        return (best[2], best[0]) if best[0] else (-1, 0)

    def _choose(self, donor: int, shared: int, stored: int) -> int:
        # A slot goes on where it loses little by it; else what it holds stays, and its beginning is copied.
        if donor in self._idle and shared >= stored and 2 * shared >= len(self._idle[donor].ids):
            return donor
        empty = [slot for slot in range(self._count) if slot not in self._tenants and slot not in self._idle]
        return empty[0] if empty else next((slot for slot in self._idle if slot != donor), next(iter(self._idle)))

    def _make_room(self, blocks: int) -> None:
        for _ in range(min(len(self._store), self.used + blocks - self.total)):
            self._store.drop()
        while self.used + blocks > self.total:
            self._forget_idle()

    def _forget_idle(self) -> None:
        slot, _ = self._idle.popitem(last=False)
        self._cache.truncate(slot, 0)
        self._cache.release(slot)

    def _idle_blocks(self, *, besides: int = -1) -> int:
        return sum(blocks_of(len(held.ids)) for slot, held in self._idle.items() if slot != besides)


def blocks_of(positions: int) -> int:
    """The blocks that so many positions take."""
    return -(-positions // BLOCK)


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items at their beginning two sequences of one type share."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
