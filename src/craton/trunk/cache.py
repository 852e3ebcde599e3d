"""Keys and values of what was already read, one slot per sequence."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from craton.trunk.config import AttentionConfig, TrunkConfig

# Slots grow by whole chunks, so that a long answer is copied a few times and not once per token.
CHUNK = 256

# Of an int8 row: the largest code, the bytes of its scale, and what a row of zeros is taken for, lest it divide by 0.
CODES, SCALE_BYTES, LEAST = 127, 4, 1e-30


class KVCache:
    """A slot of the cache holds one sequence: per layer keys [slot, G, position, K] and values [slot, G, position, V].

    A token's segment id is its slot. The trunk writes each forward pass's keys and values behind what the slot holds
    and then advances `lengths`. Every slot has room for the longest sequence, in chunks.

    A slot's positions stand one behind the other, so that attention reads views and gathers nothing. The paging is the
    operating system's: on a CPU the memory is mapped and not touched, so a position that was never written costs
    address space and no memory, and one long sequence among many slots costs no more than itself.

    dtype int8: a head's numbers at one position are a row of codes with their scale behind them (see `pack_rows`), so
    whatever copies, stores or drops positions needs to know nothing of it. Everywhere else `write` and `read` do.

    expected: how long each sequence is known to become; LongRoPE rotates all of a sequence by its length, so what is
    read of it in pieces must know the whole.
    """

    def __init__(self, config: TrunkConfig, slots: int = 0, *, dtype: torch.dtype, device: str = "cpu") -> None:
        self.lengths = [0] * slots
        self.expected = [0] * slots
        self._capacity = 0
        self._packed = dtype == torch.int8
        attentions = [layer.attention for layer in config.layers]
        self._sizes = [(a.head_size, a.value_size or a.head_size) for a in attentions]
        self.keys = [_empty(slots, a, a.head_size, dtype, device) for a in attentions]
        self.values = [_empty(slots, a, a.value_size or a.head_size, dtype, device) for a in attentions]

    @property
    def nbytes(self) -> int:
        """Bytes of address space: of memory, on a CPU, only what `lengths` say was written."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one sequence, over all layers."""
        return sum(t.shape[1] * t.shape[3] * t.itemsize for t in (*self.keys, *self.values))

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in every slot."""
        if length > self._capacity:
            # Half as much again: amortised constant copying, and at most a third of the memory idle.
            self._capacity = -(-max(length, self._capacity * 3 // 2) // CHUNK) * CHUNK
            self._resize()

    def reserve_slots(self, slots: int) -> None:
        """Make room for `slots` sequences."""
        if slots > len(self.lengths):
            self.lengths += [0] * (slots - len(self.lengths))
            self.expected += [0] * (slots - len(self.expected))
            self._resize()

    def _resize(self) -> None:
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                new = _zeros((len(self.lengths), old.shape[1], self._capacity, old.shape[3]), old.dtype, old.device)
                for slot, used in enumerate(self.lengths[: len(old)]):
                    new[slot, :, :used] = old[slot, :, :used]
                tensors[i] = new

    def write(self, layer: int, slots: slice, starts: Sequence[int], keys_BGnK: Tensor, values_BGnV: Tensor) -> None:
        """Keep a layer's keys and values of n positions of each slot, from its start on. There must be room."""
        for tensors, new_BGnX in ((self.keys, keys_BGnK), (self.values, values_BGnV)):
            kept, rows_BGnX = tensors[layer][slots], pack_rows(new_BGnX) if self._packed else new_BGnX
            for b, start in enumerate(starts):
                kept[b].narrow(1, start, rows_BGnX.shape[2]).copy_(rows_BGnX[b])

    def read(self, layer: int, slots: slice, first: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A layer's keys [slots, G, length, K] and values [slots, G, length, V] from position `first` on, as `dtype`: a
        view where they are kept as that."""
        keys = self.keys[layer][slots].narrow(2, first, length)
        values = self.values[layer][slots].narrow(2, first, length)
        if not self._packed:
            return keys.to(dtype), values.to(dtype)
        key_size, value_size = self._sizes[layer]
        return unpack_rows(keys, key_size, dtype), unpack_rows(values, value_size, dtype)

    def truncate(self, slot: int, length: int) -> None:
        """Forget all of `slot` behind its first `length` positions."""
        self.lengths[slot] = min(self.lengths[slot], length)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Make `target` hold what `source` holds, or its first `length` positions."""
        used = self.lengths[source] if length is None else min(length, self.lengths[source])
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :used] = tensor[source, :, :used]
        self.lengths[target] = used

    def release(self, slot: int) -> None:
        """Give the memory behind what `slot` holds back to the operating system."""
        used = self.lengths[slot]
        for tensor in (*self.keys, *self.values):
            for part in tensor[slot, :, used:] if used else [tensor[slot]]:
                _give_back(part)


def pack_rows(x: Tensor) -> Tensor:
    """Numbers [..., K] as int8 rows [..., K rounded up to a multiple of 4, + 4]: codes from -127 to 127, and behind
    them the fp32 scale that they are multiplied with, the largest magnitude / 127. A NaN or infinity makes the whole
    row NaN."""
    x = x.float()
    largest = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True)
    rows = x.new_zeros((*x.shape[:-1], _row_bytes(x.shape[-1])), dtype=torch.int8)
    rows[..., : x.shape[-1]] = (x * (CODES / largest.clamp(min=LEAST))).round_()
    rows[..., -SCALE_BYTES:].view(torch.float32).copy_(largest / CODES)
    return rows


def unpack_rows(rows: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The numbers [..., size] of such rows, as `dtype`."""
    # In fp32: a scale that was rounded to bfloat16 would shift a whole head at once.
    return rows[..., :size].float().mul_(rows[..., -SCALE_BYTES:].view(torch.float32)).to(dtype)


def _row_bytes(size: int) -> int:
    return -(-size // SCALE_BYTES) * SCALE_BYTES + SCALE_BYTES


def _empty(slots: int, attention: AttentionConfig, size: int, dtype: torch.dtype, device: str) -> Tensor:
    size = _row_bytes(size) if dtype == torch.int8 else size
    return torch.empty(slots, attention.kv_heads, 0, size, dtype=dtype, device=device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Zeros and not whatever memory held: masked positions are multiplied by a weight of 0, and 0 * NaN is NaN. A map
    # of zeros, and not `torch.zeros`, which writes them.
    size = dtype.itemsize
    for n in shape:
        size *= n
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    if sys.platform == "win32":
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would touch what several sequences have not written
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _give_back(part: Tensor) -> None:
    """Turn the whole pages of some contiguous memory back into untouched zeros (elsewhere than on Linux: keep them)."""
    if sys.platform != "linux" or part.device.type != "cpu":
        return
    first = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (part.data_ptr() + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
