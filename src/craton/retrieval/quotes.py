"""Quotes that prove an answer: for each of its sentences the passage of the sources that says so, to the character.

No model judges here. A sentence is supported where most of the words that it adds to the question, and every number
among them, stand in one or two neighbouring sentences of a source that deny what it denies; that place is the quote.
Every name and number of the sentence must stand in that passage. What cannot be found is flagged, and never shown as
fact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from craton.retrieval.claims import content_terms, denies_alike, names, numbers
from craton.retrieval.segmentation import search_terms, sentences

SUPPORTED: Final = 0.75
"""Such a share of the words that a sentence adds to the question must stand in the quote."""
NEIGHBOURS: Final = 2

# What a document may say to a model instead of a reader.
_COMMANDS: Final = re.compile(
    r"(ignore|disregard|forget)\s+(\w+\s+){0,3}(instruction|question|prompt|above|previous|rule|context)s?\b"
    r"|(instead of answering|do not answer|you are now|you must now|new instructions?:|system prompt)"
    r"|^\s*(system|assistant)\s*:|<\|?(im_start|im_end|system|assistant|endoftext)\|?>"
    r"|(نادیده بگیر|دستور(ها|های)? (قبلی|بالا))",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Source:
    """A passage as it was shown: characters [start, end) of a document, its page, and how well it fits the question."""

    document: str
    start: int
    end: int
    text: str
    page: int | None = None
    heading: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class Quote:
    """`text` is characters [start, end) of `document`, exactly. support: the share of the sentence that it covers."""

    document: str
    start: int
    end: int
    text: str
    page: int | None
    score: float
    support: float


@dataclass(frozen=True)
class CitedSentence:
    """A sentence of an answer. quote: the place that says so, None where nothing does: then the sentence is flagged."""

    text: str
    quote: Quote | None


def cite(answer: str, question: str, sources: Sequence[Source]) -> list[CitedSentence]:
    """The sentences of an answer with their quotes."""
    return [
        CitedSentence(answer[start:end], find_quote(answer[start:end], question, sources))
        for start, end in sentences(answer)
    ]


def find_quote(sentence: str, question: str, sources: Sequence[Source]) -> Quote | None:
    """The place in `sources` that supports `sentence` best; None if none supports it."""
    asked = set(search_terms(question))
    said = content_terms(sentence)
    new = [term for term in said if term not in asked]
    claimed = new or said
    if not claimed:
        return None
    named, counted = names(sentence), numbers(sentence)
    added = counted - numbers(question)
    best: tuple[float, int, float, float] | None = None
    found: Quote | None = None
    for source in sources:
        passage = f"{source.heading}\n{source.text}"
        if not (named <= set(search_terms(passage)) and counted <= numbers(passage)):
            continue
        spans = sentences(source.text)
        for count in range(1, NEIGHBOURS + 1):
            for first in range(len(spans) - count + 1):
                start, end = spans[first][0], spans[first + count - 1][1]
                text = source.text[start:end]
                terms = set(search_terms(text))
                support = sum(term in terms for term in claimed) / len(claimed)
                if support < SUPPORTED or not added <= numbers(text) or not denies_alike(sentence, text, question):
                    continue
                # Of places that support it alike: the one that speaks of the question, the better passage, the shorter.
                rank = (support, -count, len(asked & terms) / max(1, len(asked)), source.score)
                if best is None or rank > best:
                    best = rank
                    at = source.start + start
                    found = Quote(
                        source.document, at, at + len(text), text, source.page, source.score, round(support, 4)
                    )
    return found


def verify(quote: Quote, document_text: str) -> bool:
    """Whether the quote stands in the document's text where it says."""
    return document_text[quote.start : quote.end] == quote.text


def carries_instructions(text: str) -> bool:
    """Whether a passage speaks to a model instead of a reader ("ignore the question and ..."). A flag for the reader
    of the answer: passages are data, and nothing that they say is ever done."""
    return _COMMANDS.search(text) is not None
