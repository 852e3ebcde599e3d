"""Where each row of a flat batch belongs: worked out once per forward pass, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from craton.trunk.cache import KVCache
from craton.trunk.config import AttentionConfig, RotaryConfig
from craton.trunk.cross_attention import ContextView
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

    The groups of a layout stand one after another in the flat batch. slots: its cache slots (None without a cache).
    starts: how many keys the cache holds already, per segment.
    """

    def __init__(
        self,
        slots: slice | None,
        size: int,
        starts: list[int],
        device: torch.device,
        segments_Bn: Tensor | None = None,
    ) -> None:
        """segments_Bn: where a row of the batch holds more than one segment, the segment of each of its tokens."""
        self.slots, self.size, self.starts, self.segments_Bn = slots, size, starts, segments_Bn
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
        if self.segments_Bn is not None:
            return View(0, self.size, causal=False, mask=self._segment_mask(self.segments_Bn, kind, window))
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

    def _segment_mask(self, segments_Bn: Tensor, kind: str, window: int | None) -> Tensor:
        index_n = torch.arange(self.size, device=self._device)
        distance_nn = index_n[:, None] - index_n
        if kind == "causal":
            near = distance_nn >= 0
            if window:
                near &= distance_nn < window
        else:
            near = distance_nn.abs() <= window // 2 if window else torch.ones_like(distance_nn, dtype=torch.bool)
        return ((segments_Bn[:, :, None] == segments_Bn[:, None]) & near)[:, None]


class Layout:
    """The shape of one forward pass: its groups, and the rotary tables that its layers ask for.

    positions_T: each token's place in its sequence. segments_T: which sequence it belongs to (with a cache: its slot);
    the rows of a segment stand together. A segment never sees another. row: attention runs on rows of so many tokens,
    which whole segments fill, so that its shapes do not depend on theirs. context: what cross-attention sees.
    """

    def __init__(
        self,
        positions_T: Tensor,
        segments_T: Tensor | None,
        cache: KVCache | None,
        dtype: torch.dtype,
        row: int | None = None,
        context: ContextView | None = None,
    ) -> None:
        self.positions_T, self.cache, self.context, self._dtype = positions_T, cache, context, dtype
        self._rotaries: dict[int, Rotary] = {}  # by the config's identity: hashing it would cost more than a kernel
        if row is not None:
            self._lay_rows(row, segments_T)
            return
        spans = _spans(segments_T, len(positions_T))
        self.groups: list[Group] = []
        self._lengths: list[tuple[int, int]] = []  # (rows, length of the sequence with them) of each segment
        merged: list[tuple[int, list[int], list[int]]] = []  # size, segments, starts
        for segment, size in spans:
            start = cache.lengths[segment] if cache is not None else 0
            known = cache.expected[segment] if cache is not None else 0
            self._lengths.append((size, max(start + size, known)))
            joins = merged and merged[-1][0] == size and (cache is None or merged[-1][1][-1] + 1 == segment)
            if joins:
                merged[-1][1].append(segment)
                merged[-1][2].append(start)
            else:
                merged.append((size, [segment], [start]))
        for size, segments, starts in merged:
            slots = slice(segments[0], segments[-1] + 1) if cache is not None else None
            self.groups.append(Group(slots, size, starts, positions_T.device))
        if cache is not None:
            cache.reserve(max(length for _, length in self._lengths))

    def _lay_rows(self, row: int, segments_T: Tensor | None) -> None:
        assert self.cache is None, "rows are read without a cache"
        assert len(self.positions_T) % row == 0, "whole rows only"
        count = len(self.positions_T) // row
        segments_Bn = segments_T.view(count, row) if segments_T is not None else None
        if segments_Bn is not None and bool((segments_Bn[:, 0] == segments_Bn[:, -1]).all()):
            segments_Bn = None  # one segment a row: the causal kernel needs no mask
        self._lengths = [(row, row)] * count
        self.groups = [Group(None, row, [0] * count, self.positions_T.device, segments_Bn)]

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


def _spans(segments_T: Tensor | None, rows: int) -> list[tuple[int, int]]:
    """(segment, number of rows) of each run of equal segment ids."""
    if segments_T is None:
        return [(0, rows)]
    return [(segment, len(list(run))) for segment, run in groupby(segments_T.tolist())]
