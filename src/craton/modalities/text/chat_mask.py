"""Which tokens of a rendered conversation are trained, from where the assistant's words stand in the text.

A token is trained if it lies in an assistant's turn. A token that begins before the turn and reaches into it would, at
work, never be produced: the prompt is tokenised before the model answers. Such a mask would be wrong, so it is refused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import NamedTuple

from craton.errors import TemplateError


class Span(NamedTuple):
    """Characters start:end of the text, and what they are, for error messages."""

    start: int
    end: int
    where: str


def turn_mask(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], turns: Sequence[Span], stops: Collection[int]
) -> list[bool]:
    """Marks whole turns, up to the stop token that ends each; only white space may follow it within the turn.

    stops: ids of special tokens, any of which may end a turn. Raises TemplateError for a turn without one.
    """
    trained = [False] * len(ids)
    for turn in turns:
        tokens = _tokens_in(turn, offsets)
        last = next((i for i in reversed(tokens) if ids[i] in stops), None)
        if last is None or text[offsets[last][1] : turn.end].strip():
            raise _no_stop(turn.where)
        for i in tokens[: tokens.index(last) + 1]:
            trained[i] = True
    return trained


def block_mask(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], blocks: Sequence[Span], stops: Collection[int]
) -> list[bool]:
    """Marks the template's generation blocks, and a stop token that follows a block at once.

    Raises TemplateError if nothing is trained, or no stop token is: a model trained so would never end its turn.
    """
    trained = [False] * len(ids)
    for block in blocks:
        tokens = _tokens_in(block, offsets)
        following = tokens[-1] + 1 if tokens else len(ids)
        if following < len(ids) and ids[following] in stops and ids[tokens[-1]] not in stops:
            tokens = range(tokens[0], following + 1)
        for i in tokens:
            trained[i] = True
    if not any(is_trained and i in stops for i, is_trained in zip(ids, trained, strict=True)):
        raise _no_stop("generation blocks")
    return trained


def _tokens_in(span: Span, offsets: Sequence[tuple[int, int]]) -> range:
    """Indices of the tokens that begin within the span."""
    first = bisect_left(offsets, span.start, key=_start)
    if first and span.start < offsets[first - 1][1]:
        raise TemplateError(
            "a token begins before the assistant's words and reaches into them, so that it could never be generated",
            where=span.where,
            remedy="strip white space from the beginning of the assistant's content",
        )
    return range(first, bisect_left(offsets, span.end, lo=first, key=_start))


def _start(offset: tuple[int, int]) -> int:
    return offset[0]


def _no_stop(where: str) -> TemplateError:
    return TemplateError(
        "the assistant's turn does not end in a special token, so a model trained on it would never stop",
        where=where,
        remedy="use a template that ends each turn with a special token (such as the end-of-sequence token)",
    )
