"""The one path from a record to what training reads: tokens, and which of them the model learns to produce.

Whatever a model is trained on has passed through here, and so has whatever `craton data inspect` shows. A record that
would teach the wrong thing in silence is refused: nothing to learn, two BOS, an end that is not learnt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field

from craton.data.chat_pictures import ChatPictures, opened, pictures_of
from craton.data.example import Example, ShownPicture, TokenSequence, next_token_targets, untrained
from craton.data.labels import LabelMap
from craton.data.lengths import LengthReport, LengthSettings, fit
from craton.data.records import HUB_PREFIX, Record
from craton.data.schema import Schema
from craton.errors import CratonError, DataError, UsageError
from craton.modalities.image import read_image
from craton.modalities.text import ChatTemplate, Tokenizer

ANSWERS: Final[tuple[Schema, ...]] = ("prompt", "preference", "binary")
"""The schemas of a prompt and what follows it."""

PICTURED: Final[Mapping[Schema, tuple[str, ...]]] = {"messages": ("messages",), "prompt": ("prompt", "completion")}
"""The schemas whose records may show pictures, and the keys of the messages that do."""

Messages = Sequence[Mapping[str, Any]]


class RenderSettings(LengthSettings):
    """How records become tokens."""

    template: bool = Field(
        False,
        description="put prompt and completion into the model's chat template, as a user's turn and the assistant's; "
        "else the completion follows the prompt as it is",
    )


DEFAULT_RENDERING: Final = RenderSettings()


def render_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    schema: Schema,
    *,
    settings: RenderSettings = DEFAULT_RENDERING,
    labels: LabelMap | None = None,
    report: LengthReport | None = None,
    pictures: ChatPictures | None = None,
) -> Iterator[Example]:
    """The examples of records that `check_schema` gave, none longer than `settings` allow; `report` is told the counts.

    Raises as `render_record` does, at the first record that cannot be used.
    """
    renderer = Renderer(tokenizer, schema, settings=settings, labels=labels, pictures=pictures)
    report = report if report is not None else LengthReport()
    for record in records:
        yield from fit(renderer.render(record), settings, tokenizer.special_ids, report)


def render_record(
    record: Record,
    tokenizer: Tokenizer,
    schema: Schema,
    *,
    settings: RenderSettings = DEFAULT_RENDERING,
    labels: LabelMap | None = None,
    pictures: ChatPictures | None = None,
) -> Example:
    """The example of one record in its schema's form, at its whole length.

    text: a document and its end, all of it learnt. prompt, binary: the completion and its end are. messages: what the
    assistant says, to the end of each turn. preference: chosen and rejected, each after the prompt. labelled, pairs:
    only read; without `labels`, an example has no class. pictures: how the model is shown them, if it sees; messages
    then name their files, relative to the data's.

    Raises DataError (nothing to learn, two BOS, an end that is not learnt, an empty text, a picture for a model that
    does not see), UsageError for malformed messages, pictures that are not there and unknown labels, FileFormatError
    for files that are no pictures, TemplateError where the chat template refuses; all name the line.
    """
    return Renderer(tokenizer, schema, settings=settings, labels=labels, pictures=pictures).render(record)


class Renderer:
    """`render_record` for many records.

    stops: the tokens that answers and documents have ended in so far. apart: how many completions were tokenised alone,
    since the prompt's tokens did not begin those of the whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        schema: Schema,
        *,
        settings: RenderSettings = DEFAULT_RENDERING,
        labels: LabelMap | None = None,
        pictures: ChatPictures | None = None,
    ) -> None:
        _check_settings(settings, schema)
        self.stops: set[int] = set()
        self.apart = 0
        self._tokenizer, self._schema, self._settings, self._labels = tokenizer, schema, settings, labels
        self._pictures = pictures
        self._ends = tokenizer.special_ids.union(tokenizer.eos_ids)
        self._bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        self._end = self._end_of_sequence()
        self._templates: dict[bool, ChatTemplate] = {}
        if settings.template or schema == "messages":
            self._template(with_tools=False)  # a model without one is refused here, and not at the first record

    def render(self, record: Record) -> Example:
        """The example of one record. Raises as `render_record` does."""
        try:
            value, files = self._opened(record)
            sequences = tuple(self._sequences(value))
            shown = tuple(self._shown(value, files, sequences))
            return Example(sequences, self._label(value), record.origin, shown)
        except CratonError as error:
            error.where = ", ".join(filter(None, (record.origin, error.where)))
            raise

    def _opened(self, record: Record) -> tuple[Mapping[str, Any], list[Path]]:
        """The record with the pixels of its pictures in their places, and the files that they are in."""
        value, files = dict(record.value), list[Path]()

        def read(name: Any) -> npt.NDArray[np.uint8]:
            if self._pictures is None:
                raise DataError(
                    "a picture is shown, and this model sees none", remedy="take one that does, such as SmolVLM"
                )
            if not isinstance(name, str) or record.origin.startswith(HUB_PREFIX):
                raise DataError(
                    "a picture is the name of a file, relative to the data's",
                    remedy='{"type": "image", "image": "pictures/cat.png"}',
                )
            files.append(Path(re.sub(r"[:#]\d+$", "", record.origin)).parent / name)
            return read_image(files[-1])

        for key in PICTURED.get(self._schema, ()):
            value[key] = opened(value[key], read)
        return value, files

    def _shown(
        self, value: Mapping[str, Any], files: Sequence[Path], sequences: Sequence[TokenSequence]
    ) -> Iterator[ShownPicture]:
        if self._pictures is None:
            return
        pixels = [picture for key in PICTURED.get(self._schema, ()) for picture in pictures_of(value[key])]
        if not pixels:
            if any((sequence.ids == self._pictures.token).any() for sequence in sequences):
                raise DataError(
                    f"a text holds {self._pictures.marker!r}, which stands for a picture",
                    remedy="take it out; pictures are parts of messages",
                )
            return
        (sequence,) = sequences
        if (sequence.targets == self._pictures.token).any():
            raise DataError("a picture stands in an answer", remedy="show it in a user's message")
        seen = [self._pictures.prepare(picture) for picture in pixels]
        places = self._pictures.places(sequence.ids.tolist(), sum(map(len, seen)))
        first = 0
        for file, tiles in zip(files, seen, strict=True):
            first += len(tiles)
            digest = hashlib.sha256(tiles.tobytes()).digest()
            read = partial(_read_again, file, self._pictures, digest)
            yield ShownPicture(places[first - 1] + self._pictures.tokens, len(tiles), digest, read)

    def _sequences(self, value: Mapping[str, Any]) -> Iterator[TokenSequence]:
        match self._schema:
            case "text":
                ids = self._ended(self._spelt(self._tokenizer.encode(_filled(value["text"], "text")), "text"))
                yield self._trained(ids, [True] * len(ids))
            case "messages":
                rendered = self._template(bool(value["tools"])).render(
                    value["messages"], self._tokenizer, tools=value["tools"]
                )
                yield self._trained(rendered.ids, rendered.trained)
            case "prompt" | "binary":
                yield self._answer(value["prompt"], value["completion"], "completion")
            case "preference":
                if value["chosen"] == value["rejected"]:
                    raise DataError("chosen and rejected are the same", remedy="leave this record out")
                for key in ("chosen", "rejected"):
                    yield self._answer(value["prompt"], value[key], key)
            case "labelled":
                yield self._read(value["text"], "text")
            case "pairs":
                yield self._read(value["anchor"], "anchor")
                yield self._read(value["positive"], "positive")
                for i, negative in enumerate(value["negatives"]):
                    yield self._read(negative, f"negatives[{i}]")

    def _label(self, value: Mapping[str, Any]) -> int | None:
        if self._schema == "binary":
            return int(value["label"])
        if self._schema == "labelled" and self._labels is not None:
            return self._labels.index(value["label"])
        return None

    def _read(self, text: str, name: str) -> TokenSequence:
        ids = self._spelt(self._tokenizer.encode(_filled(text, name)), name)
        self._check_beginning(ids)
        return untrained(ids)

    def _answer(self, prompt: str | Messages, answer: str | Messages, name: str) -> TokenSequence:
        if isinstance(prompt, str) and isinstance(answer, str):
            _filled(answer, name)
            if not self._settings.template:
                return self._continuation(prompt, answer)
            return self._turns([{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}])
        return self._turns(cast(Messages, prompt), cast(Messages, answer))  # a form has both as text or neither

    def _continuation(self, prompt: str, answer: str) -> TokenSequence:
        # At work the prompt is tokenised alone: its tokens must begin those of the whole. Where they do not, as the
        # tokeniser joins the end of one with the beginning of the other, the answer is tokenised alone, too.
        head, whole = self._encode(prompt), self._encode(prompt + answer)
        tail = whole[len(head) :]
        if whole[: len(head)] != head or not tail:
            tail = self._spelt(self._encode(answer), "the answer")
            if self._decode(head + tail) != self._decode(whole):
                raise DataError(
                    "the end of the prompt and the beginning of the answer share a token and cannot be told apart",
                    remedy="move white space from the end of the prompt to the beginning of the answer",
                )
            self.apart += 1
        head = [*self._bos, *head]
        ids = self._ended(head + tail)
        return self._trained(ids, [False] * len(head) + [True] * (len(ids) - len(head)))

    def _turns(self, prompt: Messages, answer: Messages) -> TokenSequence:
        template = self._template(with_tools=False)
        rendered = template.render([*prompt, *answer], self._tokenizer)
        trained = list(rendered.trained)
        if any(message.get("role") == "assistant" for message in prompt):
            begins = bool(answer) and answer[0].get("role") == "assistant"
            head = self._encode(template.render_text(prompt, add_generation_prompt=begins))
            if rendered.ids[: len(head)] != head:
                raise DataError(
                    "the chat template renders the prompt differently once the answer follows, so the tokens of the "
                    "answer cannot be told",
                    remedy="leave the assistant's turns out of the prompt",
                )
            trained[: len(head)] = [False] * len(head)
        return self._trained(rendered.ids, trained)

    def _trained(self, ids: list[int], trained: Sequence[bool]) -> TokenSequence:
        """The sequence, if it has what every trained sequence must: one beginning, something to learn, and an end."""
        self._check_beginning(ids)
        places = np.flatnonzero(trained)
        if not len(places) or places[-1] == 0:
            raise DataError(
                "no token is trained",
                remedy="a conversation needs a turn of the assistant"
                if self._schema == "messages"
                else "leave this record out",
            )
        last = ids[places[-1]]
        if last not in self._ends:
            raise DataError(
                f"the answer's last trained token is {self._decode([last])!r} and not one that ends it, so the model "
                "would never learn to stop",
                remedy="use a chat template whose turns end in a special token that is trained",
            )
        self.stops.add(last)
        return next_token_targets(ids, trained)

    @staticmethod
    def _spelt(ids: list[int], name: str) -> list[int]:
        if not ids:
            raise DataError(f"the tokeniser has no token for anything in {name}", remedy="leave this record out")
        return ids

    def _check_beginning(self, ids: list[int]) -> None:
        bos = self._tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos]:
            text = self._tokenizer.special_tokens["bos_token"]
            raise DataError("the sequence begins with two BOS tokens", remedy=f"take {text!r} out of the text")

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` with the end of sequence behind them, unless they have one."""
        return ids if ids[-1] in self._tokenizer.eos_ids else ids + self._end

    def _end_of_sequence(self) -> list[int]:
        eos = self._tokenizer.eos_ids[:1]
        written = self._ends.intersection(self._tokenizer.encode("")[-1:])  # [SEP] of encoders
        if not eos and not written and self._schema in ("text", *ANSWERS):
            raise UsageError(
                "this tokeniser has no token that ends a sequence, so a model could not learn to stop",
                remedy="use a tokeniser with an eos_token",
            )
        return list(eos)

    def _template(self, with_tools: bool) -> ChatTemplate:
        if with_tools not in self._templates:
            self._templates[with_tools] = (
                ChatTemplate.of(self._tokenizer, with_tools=with_tools)
                if self._pictures is None
                else self._pictures.template(with_tools=with_tools)
            )
        return self._templates[with_tools]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _check_settings(settings: RenderSettings, schema: Schema) -> None:
    if settings.overlong == "split" and schema != "text":
        raise UsageError(
            f"only documents can be split; these records are of the schema {schema!r}",
            where="overlong",
            remedy="choose drop or truncate",
        )
    if settings.template and schema not in ANSWERS:
        raise UsageError(
            f"records of the schema {schema!r} have no prompt to put into a chat template",
            where="template",
            remedy="leave it out" + ("; messages use it anyway" if schema == "messages" else ""),
        )


def _read_again(file: Path, pictures: ChatPictures, digest: bytes) -> npt.NDArray[np.float32]:
    tiles = pictures.prepare(read_image(file))
    if hashlib.sha256(tiles.tobytes()).digest() != digest:
        raise DataError(
            "this picture is not what it was when the data was read", where=str(file), remedy="put it back as it was"
        )
    return tiles


def _filled(text: str, name: str) -> str:
    if not text or text.isspace():
        raise DataError(f"{name} is empty", remedy="leave this record out")
    return text
