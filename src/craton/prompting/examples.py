"""Which training examples a prompt shows: at random, spread widely, or those nearest to the question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from craton.errors import UsageError
from craton.evaluation.items import Item
from craton.prompting.prompt import ExampleSettings

Vectors = npt.NDArray[np.float32]
Embed = Callable[[Sequence[str]], Vectors]
"""Texts to vectors [B, D] of length 1."""


class ExamplePool:
    """The examples that may be shown. embed: for "similar" and "diverse"; each text is embedded once."""

    def __init__(self, items: Sequence[Item], embed: Embed | None = None) -> None:
        self.items = list(items)
        self.embed = embed
        self._vectors: Vectors | None = None

    def choose(self, item: Item, settings: ExampleSettings) -> list[Item]:
        """The examples for `item`, in the order of the prompt; `item` itself is never among them."""
        count = min(settings.count, len(self.items))
        if not count:
            return []
        if settings.choose == "similar":
            return self._similar(item, count)
        # The same examples for all items keep the beginning of the prompt, and so the cache, the same.
        spread = self._diverse(count + 1) if settings.choose == "diverse" else self._random(count + 1, settings.seed)
        return [one for one in spread if one.id != item.id][:count]

    def nearest(self, text: str, count: int) -> list[tuple[Item, float]]:
        """The `count` examples nearest to `text` with their cosines, the nearest first."""
        vectors, query = self._all_vectors(), self._embedding([text])[0]
        cosines = vectors @ query
        order = np.argsort(-cosines, kind="stable")[:count]
        return [(self.items[i], float(cosines[i])) for i in order.tolist()]

    def _similar(self, item: Item, count: int) -> list[Item]:
        # The nearest one stands last, beside the question (Liu et al. 2022, "What makes good in-context examples").
        found = [one for one, _ in self.nearest(item.input, count + 1) if one.id != item.id][:count]
        return found[::-1]

    def _random(self, count: int, seed: int) -> list[Item]:
        # A class after another, so that few examples do not all speak of one.
        rng = np.random.default_rng(seed)
        by_answer: dict[str, list[Item]] = defaultdict(list)
        for index in rng.permutation(len(self.items)).tolist():
            by_answer[self.items[index].answers[0]].append(self.items[index])
        piles: list[list[Item]] = list(by_answer.values())
        chosen: list[Item] = []
        while len(chosen) < min(count, len(self.items)):
            chosen += [pile.pop() for pile in piles if pile]
        return chosen[:count]

    def _diverse(self, count: int) -> list[Item]:
        # Greedy k-centre (Gonzalez 1985): each next example is the one farthest from all before it.
        vectors = self._all_vectors()
        first = int((vectors @ vectors.mean(0)).argmax())  # the most typical one
        chosen, nearest = [first], vectors @ vectors[first]
        while len(chosen) < min(count, len(self.items)):
            farthest = int(nearest.argmin())
            chosen.append(farthest)
            nearest = np.maximum(nearest, vectors @ vectors[farthest])
        return [self.items[i] for i in chosen]

    def _all_vectors(self) -> Vectors:
        if self._vectors is None:
            self._vectors = self._embedding([item.input for item in self.items])
        return self._vectors

    def _embedding(self, texts: Sequence[str]) -> Vectors:
        if self.embed is None:
            raise UsageError(
                "examples by similarity or diversity need an encoder", remedy="name one, or choose examples at random"
            )
        return self.embed(texts)
