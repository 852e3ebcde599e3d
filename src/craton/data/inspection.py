"""Looking at data before a run: what it is, how long, how clean, and real samples with the tokens that are trained."""

from __future__ import annotations

import codecs
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from craton.data.chat_pictures import ChatPictures, pictures_of
from craton.data.example import UNTRAINED, Example, TokenSequence
from craton.data.forms import texts_of
from craton.data.lengths import LengthReport, fit
from craton.data.records import Record
from craton.data.rendering import ANSWERS, DEFAULT_RENDERING, Renderer, RenderSettings
from craton.data.schema import CheckedRecords, Schema
from craton.data.statistics import Lengths, TextStatistics
from craton.errors import CratonError
from craton.modalities.text import Tokenizer

KEPT_PROBLEMS: Final = 100
"""So many problems are listed; all are counted."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token as a reader sees it: its text ("" where later tokens complete its character), whether it is trained."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Sample:
    """A record as it is trained on: its sequences by name ("chosen"), in tokens; none without a tokeniser."""

    record: Record
    sequences: Mapping[str, Sequence[Token]]


@dataclass
class Inspection:
    """What was found. tokens: lengths of the sequences, at whole length; kept, trained: tokens that are left when the
    long ones have been dealt with, and those of them that are trained. problems: the first KEPT_PROBLEMS.
    """

    schema: Schema
    decisions: list[str]
    texts: TextStatistics = field(default_factory=TextStatistics)
    tokens: Lengths = field(default_factory=Lengths)
    kept: int = 0
    trained: int = 0
    report: LengthReport | None = None
    labels: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    problems: list[CratonError] = field(default_factory=list)
    problem_count: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        report = self.report
        tokens = None
        if report is not None:
            tokens = {
                "total": self.tokens.total,
                "lengths": self.tokens.quantiles(),
                "kept": self.kept,
                "trained": self.trained,
                **{name: getattr(report, name) for name in ("examples", "overlong", "truncated", "split", "dropped")},
            }
        return {
            "schema": self.schema,
            "decisions": self.decisions,
            "records": self.texts.texts,
            "text": self.texts.as_dict(),
            "tokens": tokens,
            "labels": dict(self.labels.most_common()),
            "samples": [_sample_dict(sample) for sample in self.samples],
            "problem_count": self.problem_count,
            "problems": [problem.as_dict() for problem in self.problems],
        }


def inspect_records(
    checked: CheckedRecords,
    *,
    tokenizer: Tokenizer | None = None,
    settings: RenderSettings = DEFAULT_RENDERING,
    samples: int = 3,
    on_record: Callable[[int], None] | None = None,
    pictures: ChatPictures | None = None,
) -> Inspection:
    """Read all records, render them if there is a tokeniser, and keep `samples` of them, the same ones every time.

    Records that cannot be trained on become problems; what cannot be read is raised. on_record: is told how many
    records have been read. pictures: of the tokeniser's model, if it sees.
    """
    found = Inspection(checked.schema, list(checked.decisions))
    renderer = None
    if tokenizer is not None:
        renderer = Renderer(tokenizer, checked.schema, settings=settings, pictures=pictures)
        found.report = LengthReport()
    chosen = _Reservoir(samples)
    for record in checked:
        found.texts.add(texts_of(record.value), map(str, pictures_of(record.value.get("messages"))))
        if checked.schema in ("labelled", "binary"):
            found.labels[str(record.value["label"])] += 1
        if on_record is not None:
            on_record(found.texts.texts)
        if renderer is None or tokenizer is None or found.report is None:
            chosen.offer((record, None))
            continue
        try:
            example = renderer.render(record)
        except CratonError as error:
            found.problem_count += 1
            found.problems += [error] if len(found.problems) < KEPT_PROBLEMS else []
            continue
        for sequence in example.sequences:
            found.tokens.add(len(sequence))
        for part in fit(example, settings, tokenizer.special_ids, found.report):
            found.kept += part.tokens
            found.trained += part.trained
            chosen.offer((record, part))
    found.samples = [
        _sample(record, example, checked.schema, tokenizer, pictures) for record, example in chosen.items()
    ]
    if renderer is not None and tokenizer is not None:
        found.decisions += _decisions(renderer, tokenizer)
        if checked.schema in ANSWERS and not settings.template and tokenizer.chat_template:
            found.decisions.append("texts of prompt and answer joined as they are; --template makes them a chat")
    return found


def tokens_of(sequence: TokenSequence, tokenizer: Tokenizer, pictures: ChatPictures | None = None) -> list[Token]:
    """The tokens of a sequence for a reader. A token is trained if the position before it has it as its target. All
    that a picture, or a tile of one, becomes is shown as one mark."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    trained = np.roll(sequence.targets != UNTRAINED, 1)
    trained[:1] = False
    tokens = []
    of_a_tile = 0
    for token_id, is_trained in zip(sequence.ids.tolist(), trained.tolist(), strict=True):
        if pictures is not None and token_id == pictures.token:
            if of_a_tile % pictures.tokens == 0:
                tokens.append(Token(f"{pictures.marker} x {pictures.tokens}", is_trained, True))
            of_a_tile += 1
            continue
        text = utf8.decode(tokenizer.token_bytes(token_id))
        special = token_id in tokenizer.special_ids
        tokens.append(Token(text.strip() if special else text, is_trained, special))
    return tokens


class _Reservoir:
    """A sample of what passes by, every item as likely as any other (Vitter's algorithm R), from a fixed seed."""

    def __init__(self, size: int) -> None:
        self._size, self._seen, self._random = size, 0, random.Random(0)
        self._kept: list[tuple[int, tuple[Record, Example | None]]] = []

    def offer(self, item: tuple[Record, Example | None]) -> None:
        self._seen += 1
        if len(self._kept) < self._size:
            self._kept.append((self._seen, item))
        elif (place := self._random.randrange(self._seen)) < self._size:
            self._kept[place] = (self._seen, item)

    def items(self) -> list[tuple[Record, Example | None]]:
        """In the order in which they passed by."""
        return [item for _, item in sorted(self._kept, key=lambda kept: kept[0])]


def _sample(
    record: Record,
    example: Example | None,
    schema: Schema,
    tokenizer: Tokenizer | None,
    pictures: ChatPictures | None,
) -> Sample:
    if example is None or tokenizer is None:
        return Sample(record, {})
    names = {"preference": ["chosen", "rejected"], "pairs": ["anchor", "positive"]}.get(schema, [schema])
    names += [f"negative {i + 1}" for i in range(len(example.sequences) - len(names))]
    sequences = zip(names, example.sequences, strict=True)
    return Sample(record, {name: tokens_of(sequence, tokenizer, pictures) for name, sequence in sequences})


def _sample_dict(sample: Sample) -> dict[str, Any]:
    sequences = {
        name: [{"text": t.text, "trained": t.trained, "special": t.special} for t in tokens]
        for name, tokens in sample.sequences.items()
    }
    record = json.loads(json.dumps(sample.record.value, default=str))  # tables hold dates and the like
    return {"origin": sample.record.origin, "record": record, "sequences": sequences}


def _decisions(renderer: Renderer, tokenizer: Tokenizer) -> Iterator[str]:
    def named(ids: set[int]) -> str:
        return ", ".join(tokenizer.decode([i], skip_special_tokens=False) for i in sorted(ids))

    if tokenizer.adds_bos:
        yield "the tokeniser begins a text with BOS; a chat has it where its template writes it"
    if renderer.stops:
        yield f"answers and documents end in {named(renderer.stops)}, which is trained"
    if foreign := renderer.stops.difference(tokenizer.eos_ids):
        yield f"{named(foreign)} does not end a generation of this model: add it to its end-of-sequence tokens"
    if renderer.apart:
        yield f"{renderer.apart} answers tokenised apart from their prompts, whose last tokens they would change"
