"""Text without end in constant memory: the cache keeps a text's first tokens, the attention sinks, and its last ones
(StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from craton.errors import UsageError
from craton.trunk import AttentionConfig, KVCache, TrunkConfig
from craton.trunk.positions import Rotary


@dataclass(frozen=True)
class StreamWindow:
    """The first `sinks` tokens and the last `window` ones. A full window loses its oldest quarter at once, so that the
    rest is moved up rarely; so a token sees at least three quarters of it."""

    window: int
    sinks: int

    @property
    def size(self) -> int:
        """The most positions that a sequence takes."""
        return self.sinks + self.window

    @property
    def block(self) -> int:
        """How many tokens are forgotten at once, and read at once."""
        return self.window // 4

    def check(self, config: TrunkConfig, context: int) -> None:
        """Raises UsageError for a model whose keys cannot be moved to other positions, or a window too large for it."""
        rotaries = [layer.attention.rotary for layer in config.layers]
        longrope = any(r is not None and r.scaling is not None and r.scaling.kind == "longrope" for r in rotaries)
        if config.positions is not None or longrope:
            kind = "LongRoPE" if longrope else "learned positions"
            raise UsageError(
                f"a stream window moves keys to other positions, which {kind} do not allow",
                remedy="leave out the stream window, or choose a model with rotary positions",
            )
        if self.size > context:
            raise UsageError(
                f"{self.sinks} sinks and a window of {self.window} are more than the context of {context}",
                remedy=f"choose a window of at most {context - self.sinks}",
            )


def slide(cache: KVCache, config: TrunkConfig, slot: int, sinks: int, count: int) -> int:
    """Forget `count` positions of a slot behind its first `sinks` and move what follows up to them; gives its length.

    A rotary key at position p is a rotation by p: moved up by `count` it is rotated back by as much, which is exact but
    for rounding, whatever the frequencies. The slot is empty until the caller sets that length, so that an interrupt
    leaves no half of a move behind.
    """
    length, cache.lengths[slot] = cache.lengths[slot], 0
    one, kept = slice(slot, slot + 1), length - count - sinks
    for number, layer in enumerate(config.layers):
        keys_BGnK, values_BGnV = cache.read(number, one, sinks + count, kept, torch.float32)
        # Where numbers are kept as they are read, these are views of what is written to.
        cache.write(number, one, [sinks], _turned_back(layer.attention, keys_BGnK, count), values_BGnV.clone())
    return length - count


def _turned_back(attention: AttentionConfig, keys_BGnK: Tensor, count: int) -> Tensor:
    if attention.rotary is None:
        return keys_BGnK.clone()
    rotary = attention.rotary
    if rotary.scaling is not None:  # the keys carry its factor already
        rotary = rotary.model_copy(update={"scaling": rotary.scaling.model_copy(update={"attention_factor": 1.0})})
    turn = Rotary(rotary, torch.tensor([-count]), torch.tensor([0]), torch.float32)
    # Latent attention rotates the end of a key, the others its beginning.
    fixed = attention.head_size - rotary.dims if attention.latent is not None else 0
    return torch.cat((keys_BGnK[..., :fixed], turn.apply(keys_BGnK[..., fixed:])), -1)
