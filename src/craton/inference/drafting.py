"""Guesses of what an answer says next, cheap enough to be wrong: from the text itself, or from a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from craton.models import CausalLM
from craton.trunk import KVCache

# A guess from the text needs so many tokens in a row that stood there before. Two meet by chance in any prose; a longer
# match is looked for first, because it says more about what follows.
MATCHES = (6, 3)

# A draft model reads what is new in pieces of at most so many tokens.
DRAFT_CHUNK = 256


@dataclass(frozen=True)
class Asked:
    """A sequence to be continued: its slot in the engine, its tokens, and how many more are wanted at most."""

    slot: int
    ids: list[int]
    most: int


class Drafter(Protocol):
    """price: what a drafted token costs, in steps of the model that is to check it."""

    price: float

    def propose(self, asked: Sequence[Asked]) -> list[list[int]]:
        """For each sequence, up to `most` tokens that may follow (none where there is no guess)."""


class NGramDrafter:
    """What followed the last few tokens where they stood before, in the prompt or in the answer (prompt lookup
    decoding, Saxena 2023; the idea of LLMA, arXiv 2304.04487). Costs a dictionary look-up."""

    price = 0.0

    def __init__(self) -> None:
        self._indexes: dict[int, _NGrams] = {}

    def propose(self, asked: Sequence[Asked]) -> list[list[int]]:
        """The guesses, each from its own sequence alone."""
        drafts = []
        for one in asked:
            index = self._indexes.get(one.slot)
            if index is None or one.ids[: len(index.ids)] != index.ids:  # another sequence has taken the slot
                index = self._indexes[one.slot] = _NGrams()
            index.extend(one.ids)
            drafts.append(index.following(one.most))
        return drafts


class _NGrams:
    """Where each run of a few tokens ended last. `ids` is what was indexed."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, ids: list[int]) -> None:
        # The run at the very end is not indexed before something follows it: it would only find itself.
        for end in range(max(1, len(self.ids)), len(ids)):
            for n in MATCHES:
                if end >= n:
                    self._ends[tuple(ids[end - n : end])] = end
        self.ids += ids[len(self.ids) :]

    def following(self, most: int) -> list[int]:
        for n in MATCHES:
            if len(self.ids) > n:
                end = self._ends.get(tuple(self.ids[-n:]))
                if end is not None:
                    return self.ids[end : end + most]
        return []


class ModelDrafter:
    """A smaller model of the same tokeniser goes ahead, taking its likeliest token each time (Leviathan 2022, arXiv
    2211.17192, with the check that `speculation` describes)."""

    def __init__(self, model: CausalLM, vocab: int, *, price: float, dtype: torch.dtype) -> None:
        """vocab: of the model that checks. dtype: of the draft model's activations. price: see `Drafter`."""
        self.model, self.price, self._vocab = model, price, vocab
        self._cache = KVCache(model.config.trunk, dtype=dtype)
        self._held: dict[int, list[int]] = {}  # slot -> the ids whose keys and values it holds

    def propose(self, asked: Sequence[Asked]) -> list[list[int]]:
        """The guesses of all sequences together, a token of each at a time. None for a text that is too long for it."""
        drafts: list[list[int]] = [[] for _ in asked]
        active = [i for i, one in enumerate(asked) if one.most and len(one.ids) + one.most <= self.model.config.context]
        for i in active:
            self._read(asked[i])
        while active:
            last = [
                (asked[i].slot, [*asked[i].ids, *drafts[i]][-1:], len(asked[i].ids) + len(drafts[i]) - 1)
                for i in active
            ]
            chosen = self.model.logits(self._forward(last))[:, : self._vocab].argmax(-1).tolist()
            for i, token in zip(active, chosen, strict=True):
                drafts[i].append(token)
            active = [i for i in active if len(drafts[i]) < asked[i].most]
        return drafts

    def _read(self, one: Asked) -> None:
        """Make the slot hold all of the sequence but its last token."""
        self._cache.reserve_slots(one.slot + 1)
        held, end = self._held.setdefault(one.slot, []), len(one.ids) - 1
        kept = min(len(held), end)
        if one.ids[:kept] != held[:kept]:
            kept = next(i for i in range(kept) if one.ids[i] != held[i])
        for first in range(kept, end, DRAFT_CHUNK):
            self._forward([(one.slot, one.ids[first : min(first + DRAFT_CHUNK, end)], first)])

    def _forward(self, parts: Sequence[tuple[int, list[int], int]]) -> torch.Tensor:
        """Read (slot, ids, start) parts; gives the hidden state of every row."""
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        for slot, new, start in parts:
            self._cache.truncate(slot, start)
            self._held[slot] = self._held[slot][:start]
            ids += new
            positions += range(start, start + len(new))
            segments += [slot] * len(new)
        hidden_TD = self.model.hidden(torch.tensor(ids), torch.tensor(positions), torch.tensor(segments), self._cache)
        for slot, new, _ in parts:
            self._held[slot] += new
        return hidden_TD
