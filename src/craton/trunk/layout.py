"""Where each row of a flat batch belongs: worked out once per forward pass, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from craton.trunk.cache import KVCache
from craton.trunk.config import AttentionConfig, RotaryConfig
from craton.trunk.positions import Rotary


@dataclass(frozen=True)
class View:
    """Which keys a group's queries see: keys [first, last) and, where that does not say it all, a mask."""

    first: int
    last: int
    causal: bool
    mask: Tensor | None  # bool [B, 1, n, last - first], True where a query sees a key


class Group:
    """`count` segments of `size` rows each that go through attention as one batch.

    rows: the group's rows of the flat batch. slots: its cache slots (None without a cache). starts: how many keys the
    cache holds already, per segment.
    """

    def __init__(self, rows: slice, slots: slice | None, size: int, starts: list[int], device: torch.device) -> None:
        self.rows, self.slots, self.size, self.starts = rows, slots, size, starts
        self.count = len(starts)
        self._device = device
        self._views: dict[tuple[str, int | None], View] = {}

    def view(self, attention: AttentionConfig) -> View:
        """The keys that this group's queries see under `attention`'s mask and window."""
        key = (attention.mask, attention.window)
        if key not in self._views:
            self._views[key] = self._make_view(*key)
        return self._views[key]

    def _make_view(self, kind: str, window: int | None) -> View:
        low, high = min(self.starts), max(self.starts)
        last = high + self.size
        if kind == "causal":
            first = max(0, low - window + 1) if window else 0
            if low == high and self.size == 1:
                return View(first, last, causal=False, mask=None)
            if high == 0 and (window is None or window >= self.size):
                return View(0, last, causal=True, mask=None)
        else:
            first = 0
            if low == high and (window is None or window // 2 >= last):
                return View(0, last, causal=False, mask=None)
        starts_B11 = torch.tensor(self.starts, device=self._device)[:, None, None]
        query_Bn1 = starts_B11 + torch.arange(self.size, device=self._device)[None, :, None]
        key_11S = torch.arange(first, last, device=self._device)[None, None]
        if kind == "causal":
            mask = key_11S <= query_Bn1
            if window:
                mask &= key_11S > query_Bn1 - window
        else:
            mask = key_11S < starts_B11 + self.size
            if window:
                mask = mask & ((key_11S - query_Bn1).abs() <= window // 2)
        return View(first, last, causal=False, mask=mask[:, None].expand(-1, 1, self.size, -1))


class Layout:
    """The shape of one forward pass: its groups, and the rotary tables that its layers ask for.

    positions_T: each token's place in its sequence. segments_T: which sequence it belongs to (with a cache: its slot);
    the rows of a segment stand together. A segment never sees another.
    """

    def __init__(
        self, positions_T: Tensor, segments_T: Tensor | None, cache: KVCache | None, dtype: torch.dtype
    ) -> None:
        self.positions_T, self.cache, self._dtype = positions_T, cache, dtype
        self._rotaries: dict[int, Rotary] = {}  # by the config's identity: hashing it would cost more than a kernel
        spans = _spans(segments_T, len(positions_T))
        self.groups: list[Group] = []
        self._lengths: list[tuple[int, int]] = []  # (rows, length of the sequence with them) of each segment
        merged: list[tuple[int, int, list[int], list[int]]] = []  # first row, size, segments, starts
        for segment, row, size in spans:
            start = cache.lengths[segment] if cache is not None else 0
            known = cache.expected[segment] if cache is not None else 0
            self._lengths.append((size, max(start + size, known)))
            joins = merged and merged[-1][1] == size and (cache is None or merged[-1][2][-1] + 1 == segment)
            if joins:
                merged[-1][2].append(segment)
                merged[-1][3].append(start)
            else:
                merged.append((row, size, [segment], [start]))
        for row, size, segments, starts in merged:
            slots = slice(segments[0], segments[-1] + 1) if cache is not None else None
            rows = slice(row, row + size * len(segments))
            self.groups.append(Group(rows, slots, size, starts, positions_T.device))
        if cache is not None:
            cache.reserve(max(length for _, length in self._lengths))

    def rotary(self, config: RotaryConfig) -> Rotary:
        """The tables of `config` for this pass's positions."""
        rotary = self._rotaries.get(id(config))
        if rotary is None:
            sizes, lengths = zip(*self._lengths, strict=True)
            device = self.positions_T.device
            lengths_T = torch.tensor(lengths, device=device).repeat_interleave(torch.tensor(sizes, device=device))
            rotary = self._rotaries[id(config)] = Rotary(config, self.positions_T, lengths_T, self._dtype)
        return rotary

    def advance(self) -> None:
        """Tell the cache that every layer has written this pass's keys and values."""
        if self.cache is None:
            return
        for group in self.groups:
            assert group.slots is not None
            for slot, start in zip(range(group.slots.start, group.slots.stop), group.starts, strict=True):
                self.cache.lengths[slot] = start + group.size


def _spans(segments_T: Tensor | None, rows: int) -> list[tuple[int, int, int]]:
    """(segment, first row, number of rows) of each run of equal segment ids."""
    if segments_T is None:
        return [(0, 0, rows)]
    ids = segments_T.tolist()
    spans: list[tuple[int, int, int]] = []
    first = 0
    for row in range(1, rows + 1):
        if row == rows or ids[row] != ids[first]:
            spans.append((ids[first], first, row - first))
            first = row
    return spans
