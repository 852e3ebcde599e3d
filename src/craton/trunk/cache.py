"""Keys and values of what was already read, one slot per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from craton.trunk.config import AttentionConfig, TrunkConfig

# Slots grow by whole chunks, so that a long answer is copied a few times and not once per token.
CHUNK = 256


class KVCache:
    """A slot of the cache holds one sequence: per layer keys [slot, G, position, K] and values [slot, G, position, V].

    A token's segment id is its slot. The trunk writes each forward pass's keys and values behind what the slot holds
    and then advances `lengths`. Memory grows with the longest sequence, in chunks.

    expected: how long each sequence is known to become; LongRoPE rotates all of a sequence by its length, so what is
    read of it in pieces must know the whole.
    """

    def __init__(self, config: TrunkConfig, slots: int = 0, *, dtype: torch.dtype, device: str = "cpu") -> None:
        self.lengths = [0] * slots
        self.expected = [0] * slots
        self._capacity = 0
        attentions = [layer.attention for layer in config.layers]
        self.keys = [_empty(slots, a, a.head_size, dtype, device) for a in attentions]
        self.values = [_empty(slots, a, a.value_size or a.head_size, dtype, device) for a in attentions]

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

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
        # Zeros and not whatever memory held: masked positions are multiplied by a weight of 0, and 0 * NaN is NaN.
        used = max(self.lengths, default=0)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                new = old.new_zeros(len(self.lengths), old.shape[1], self._capacity, old.shape[3])
                new[: len(old), :, :used] = old[:, :, :used]
                tensors[i] = new

    def truncate(self, slot: int, length: int) -> None:
        """Forget all of `slot` behind its first `length` positions."""
        self.lengths[slot] = min(self.lengths[slot], length)

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold what `source` holds."""
        used = self.lengths[source]
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :used] = tensor[source, :, :used]
        self.lengths[target] = used


def _empty(slots: int, attention: AttentionConfig, size: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty(slots, attention.kv_heads, 0, size, dtype=dtype, device=device)
