"""Conversations with pictures from a user's files, and captions as conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from craton.data.chat_pictures import ChatPictures
from craton.data.example import Example
from craton.data.lengths import LengthReport
from craton.data.records import Record, read_records
from craton.data.rendering import RenderSettings, render_records
from craton.data.schema import check_schema
from craton.errors import DataError, UsageError
from craton.modalities.text import Tokenizer


@dataclass(frozen=True)
class ChatSet:
    """What a run learns from and what it is measured on. decisions: how the data was understood, a sentence each."""

    training: list[Example]
    held_out: list[Example]
    decisions: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of what is learnt, in order."""
        state = hashlib.sha256()
        for example in (*self.training, *self.held_out):
            for sequence in example.sequences:
                state.update(f"{len(sequence)};".encode() + sequence.ids.tobytes() + sequence.targets.tobytes())
            for picture in example.pictures:
                state.update(picture.digest)
        return state.hexdigest()


def read_chats(
    sources: Sequence[str],
    evaluation: Sequence[str],
    tokenizer: Tokenizer,
    pictures: ChatPictures,
    *,
    question: str,
    limit: int,
    holdout: float,
    seed: int,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> ChatSet:
    """The examples of `sources` and of `evaluation`, or of a share `holdout` of the sources where that is empty.

    A source holds records {"image": PATH, "caption": TEXT}, which become a user's `question` with the picture and the
    caption as the answer, or conversations {"messages": [...]} with pictures among their parts; paths are relative to
    the file. Conversations of more than `limit` tokens are left out.

    Raises what `render_record` raises, and DataError for a picture without a caption, with the line; UsageError where
    nothing is left to train on or nothing of it shows a picture.
    """
    decisions: list[str] = []

    def read(some: Sequence[str]) -> list[Example]:
        on_progress(f"reading {', '.join(some)}")
        checked = check_schema(as_chats(read_records(list(some)), question), expected=("messages", "prompt"))
        report = LengthReport()
        settings = RenderSettings(max_tokens=limit)
        found = render_records(checked, tokenizer, checked.schema, settings=settings, report=report, pictures=pictures)
        examples = list(found)
        if report.dropped:
            decisions.append(f"{report.dropped:,} of {report.records:,} longer than {limit:,} tokens are left out")
        return examples

    training = read(sources)
    if evaluation:
        held_out = read(evaluation)
    else:
        count = min(max(1, round(holdout * len(training))), len(training) - 1) if holdout else 0
        order = np.random.default_rng((seed, 1)).permutation(len(training))
        held_out = [training[i] for i in sorted(order[: max(0, count)])]
        training = [training[i] for i in sorted(order[max(0, count) :])]
    shown = sum(len(example.pictures) for example in training)
    if not shown:
        raise UsageError(
            "nothing that could be trained on shows a picture",
            where=", ".join(sources),
            remedy='write {"image": "a.png", "caption": "..."}, or raise --max-tokens if all were too long',
        )
    decisions.append(
        f"{shown:,} pictures in {len(training):,} conversations, {len(held_out):,} more of them for evaluation"
    )
    return ChatSet(training, held_out, tuple(decisions))


def as_chats(records: Iterable[Record], question: str) -> Iterator[Record]:
    """Pictures with captions as conversations, and all other records as they are."""
    for record in records:
        value = record.value
        if "image" not in value or "messages" in value:
            yield record
            continue
        caption = value.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(
                "this picture has no caption",
                where=record.origin,
                remedy='write {"image": "a.png", "caption": "A red square."}',
            )
        asked = [{"type": "text", "text": question}] if question else []
        shown = {"role": "user", "content": [{"type": "image", "image": value["image"]}, *asked]}
        yield Record({"messages": [shown, {"role": "assistant", "content": caption.strip()}]}, record.origin)
