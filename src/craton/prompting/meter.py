"""What a model reads and writes for a search, counted in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from craton.inference.model import Completion, Model


class Meter:
    """Asks a model, and counts the tokens that it reads and writes.

    A prompt counts each time that it is sent, also where the model's cache still holds it: what a cache holds depends
    on the machine's memory, and a budget shall end a search at the same place everywhere. Of choices that are scored
    behind a prompt, each counts, and the prompt once, because one call reads it once for all of them.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.tokens = model, 0

    def generate(self, ids: Sequence[int], **sampling: Any) -> Completion:
        """As `Model.generate`."""
        completion = self.model.generate(ids, **sampling)
        self.tokens += completion.prompt_tokens + completion.completion_tokens
        return completion

    def logprobs(self, ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """[continuations] the log-probability of each one after the tokens `ids`, as by `Model.score`."""
        scores = self.model.score([(ids, continuation) for continuation in continuations])
        self.tokens += len(ids) + sum(len(continuation) for continuation in continuations)
        return [score.logprob for score in scores]
