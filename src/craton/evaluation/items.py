"""What a task is made of, and what an answer is: the words that prompting, retrieval and comparison share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Item:
    """One case of a task.

    answers: every form that is right. group: the source document that it was made from; a split never cuts a group.
    gold: names of the documents that hold the answer, where known. fields: the rest of its record, for prompts and
    slices.
    """

    id: str
    input: str
    answers: tuple[str, ...]
    group: str
    gold: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What was said to one item, and what it cost.

    confidence: the probability that the model gives its answer, where the way of answering has one. seconds: from the
    question to the whole answer, searching included. passages: names of the passages that the model was shown.
    """

    text: str
    confidence: float | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    passages: tuple[str, ...] = ()


class Answerer(Protocol):
    """Anything that answers items: a prompted model, one that searches first, the majority of the training answers."""

    def __call__(self, item: Item) -> Answer: ...
