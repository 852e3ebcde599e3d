"""From a user's files to the examples of a fine-tuning run: read, check, render, set some apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from craton.data.chat_pictures import ChatPictures
from craton.data.example import Example
from craton.data.labels import LabelMap
from craton.data.lengths import LengthReport
from craton.data.records import Record, read_records
from craton.data.rendering import RenderSettings, render_records
from craton.data.schema import TASKS, KeySettings, Schema, check_schema
from craton.errors import DataError, UsageError
from craton.finetuning.settings import FinetuneSettings
from craton.modalities.text import Tokenizer

# What is set apart for evaluation where the user names no data for it, at most.
MOST_HELD_OUT: Final = 2000


@dataclass(frozen=True)
class ExampleSet:
    """What a run learns from and what it is scored on. decisions: how the data was understood, a sentence each.

    digest: of all tokens, targets, labels and pictures, so that a resumed run can tell that its data is the same.
    """

    schema: Schema
    training: list[Example]
    held_out: list[Example]
    labels: LabelMap | None
    decisions: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of what is learnt, in order."""
        state = hashlib.sha256()
        for example in (*self.training, *self.held_out):
            state.update(f"{example.label};{len(example.sequences)};".encode())
            for sequence in example.sequences:
                state.update(sequence.ids.tobytes())
                state.update(sequence.targets.tobytes())
            for picture in example.pictures:
                state.update(picture.digest)
        return state.hexdigest()


def read_examples(
    sources: Sequence[str],
    settings: FinetuneSettings,
    tokenizer: Tokenizer,
    context: int,
    on_progress: Callable[[str], None] = lambda doing: None,
    pictures: ChatPictures | None = None,
) -> ExampleSet:
    """The examples of `sources` and of `settings.evaluation`. pictures: how the model is shown them, if it sees.

    Raises DataError and FileFormatError with the line for data that the task cannot use, UsageError where nothing is
    left to train on.
    """
    keys = KeySettings(text_key=settings.text_key, label_key=settings.label_key)
    expected = TASKS[settings.task]
    on_progress(f"reading {', '.join(sources)}")
    checked = check_schema(read_records(list(sources)), keys=keys, expected=expected)
    records, decisions = list(checked), list(checked.decisions)
    labels = None
    if checked.schema == "labelled":
        labels = LabelMap.of(str(record.value["label"]) for record in records)
        if len(labels.names) < 2:
            raise DataError(f"all records have the label {labels.names[0]!r}", remedy="classes need examples of each")
        decisions.append(f"{len(labels.names)} classes")
        if settings.shots is not None:
            records = few_shots(records, settings.shots, settings.training.seed)
            decisions.append(f"{settings.shots} examples of each class: {len(records)} in all")
    elif settings.shots is not None:
        raise UsageError("shots are examples of each class, and this data has no classes", where="--shots")
    limit = min(settings.max_tokens or context, context)
    rendering = RenderSettings(max_tokens=limit, overlong=settings.overlong, template=settings.template)

    def rendered(some: Sequence[Record], name: str) -> list[Example]:
        on_progress(f"tokenising {len(some):,} records of {name}")
        report = LengthReport()
        found = render_records(
            some, tokenizer, checked.schema, settings=rendering, labels=labels, report=report, pictures=pictures
        )
        examples = list(found)
        if shown := sum(len(example.pictures) for example in examples):
            decisions.append(f"{name}: {shown:,} pictures in {len(examples):,} conversations")
        if report.overlong:
            decisions.append(
                f"{name}: {report.overlong} of {report.records} records are longer than {limit} tokens: "
                f"{report.truncated} truncated, {report.split} split, {report.dropped} dropped"
            )
        return examples

    if settings.evaluation:
        held = check_schema(read_records(list(settings.evaluation)), keys=keys, expected=(checked.schema,))
        held_out = rendered(list(held), "the evaluation data")
        training = rendered(records, "the training data")
    else:
        training, held_out = set_apart(rendered(records, "the data"), settings.holdout, settings.training.seed)
        decisions.append(f"{len(held_out)} of {len(training) + len(held_out)} examples kept apart for evaluation")
    if not training:
        raise UsageError(
            "nothing is left to train on",
            where=", ".join(sources),
            remedy=f"records longer than {limit} tokens were dropped: --overlong truncate, or a larger --max-tokens",
        )
    return ExampleSet(checked.schema, training, held_out, labels, tuple(decisions))


def few_shots(records: Sequence[Record], shots: int, seed: int) -> list[Record]:
    """At most `shots` records of each class, drawn by `seed`, in their order."""
    left: dict[str, int] = {}
    chosen = []
    for index in np.random.default_rng(seed).permutation(len(records)).tolist():
        label = str(records[index].value["label"])
        if left.setdefault(label, shots):
            left[label] -= 1
            chosen.append(index)
    return [records[index] for index in sorted(chosen)]


def set_apart(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(the rest, a random `share` of the examples): none if the share is 0, at least one otherwise."""
    count = min(max(1, round(share * len(examples))), MOST_HELD_OUT, len(examples) - 1) if share else 0
    apart = set(np.random.default_rng((seed, 1)).permutation(len(examples))[: max(0, count)].tolist())
    rest = [example for index, example in enumerate(examples) if index not in apart]
    return rest, [example for index, example in enumerate(examples) if index in apart]
