"""What becomes of examples that are longer than the model or the user allows: a policy, and the count of every case."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import Field

from craton.config import Settings
from craton.data.example import UNTRAINED, Example, TokenSequence, untrained


class LengthSettings(Settings):
    """How long a sequence may be, and what becomes of longer ones."""

    max_tokens: int | None = Field(None, ge=2, description="the most tokens of one sequence; without it, no limit")
    overlong: Literal["drop", "truncate", "split"] = Field(
        "drop",
        description="what becomes of longer ones, counted in each case: drop them, truncate them at the end, or split "
        "them into several examples (documents only)",
    )


@dataclass
class LengthReport:
    """What was rendered and what the policy did. records = what came in, examples = what came out.

    overlong: records with a sequence beyond the limit, of which `truncated` were cut, `split` were split and `dropped`
    are gone: by the policy, or since truncation left a sequence without a trained token, or cut a picture's tokens
    (`emptied`, part of `dropped`).
    """

    records: int = 0
    examples: int = 0
    overlong: int = 0
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    emptied: int = 0


def fit(
    example: Example, settings: LengthSettings, special_ids: Collection[int], report: LengthReport
) -> Iterator[Example]:
    """The example, or what the policy makes of it; each position keeps its target, so that masks cannot shift.

    The target at a cut is the token behind it: it was seen in training, if not read. special_ids: a sequence that is
    only read and ends in one of these ([SEP]) keeps it.
    """
    limit = settings.max_tokens
    report.records += 1
    if limit is None or all(len(sequence) <= limit for sequence in example.sequences):
        report.examples += 1
        yield example
        return
    report.overlong += 1
    match settings.overlong:
        case "drop":
            report.dropped += 1
        case "truncate":
            cut = replace(example, sequences=tuple(_truncated(s, limit, special_ids) for s in example.sequences))
            if any(picture.end > limit for picture in example.pictures) or any(
                is_trained(whole) and not is_trained(part)
                for whole, part in zip(example.sequences, cut.sequences, strict=True)
            ):
                report.dropped += 1
                report.emptied += 1
            else:
                report.truncated += 1
                report.examples += 1
                yield cut
        case "split":
            report.split += 1
            for piece in _pieces(example.sequences[0], limit):
                report.examples += 1
                yield replace(example, sequences=(piece,))


def is_trained(sequence: TokenSequence) -> bool:
    """Whether any position has a target."""
    return bool((sequence.targets != UNTRAINED).any())


def _truncated(sequence: TokenSequence, limit: int, special_ids: Collection[int]) -> TokenSequence:
    if len(sequence) <= limit:
        return sequence
    if not is_trained(sequence) and int(sequence.ids[-1]) in special_ids:
        return untrained(np.append(sequence.ids[: limit - 1], sequence.ids[-1]))
    return TokenSequence(sequence.ids[:limit], sequence.targets[:limit])


def _pieces(sequence: TokenSequence, limit: int) -> Iterator[TokenSequence]:
    # Every target is in one piece. The last piece may hold nothing but the end of the document, which has none.
    for start in range(0, len(sequence), limit):
        piece = TokenSequence(sequence.ids[start : start + limit], sequence.targets[start : start + limit])
        if is_trained(piece):
            yield piece
