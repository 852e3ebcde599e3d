"""What kind of record the data holds: recognised by its keys, checked, and brought into one form for each kind.

| schema     | keys (each form that is taken)                                                                 |
|------------|------------------------------------------------------------------------------------------------|
| text       | text                                                                                           |
| prompt     | prompt, completion: both text or both lists of messages                                        |
| messages   | messages, and tools                                                                            |
| preference | prompt, chosen, rejected: text or lists of messages; lists may hold the prompt                 |
| binary     | prompt, completion, label (whether the answer is wanted)                                       |
| labelled   | text, label (the name or number of a class)                                                    |
| pairs      | anchor, positive, and negative or negatives (a text or several)                                |

Keys beyond these are left alone. A few other names that mean only one thing are understood; see `aliases.py`.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import Field

from craton.config import Settings
from craton.data.aliases import find_alias
from craton.data.forms import FORMS
from craton.data.records import Record
from craton.errors import DataError, FileFormatError, UnknownName

Schema = Literal["text", "prompt", "messages", "preference", "binary", "labelled", "pairs"]

KEYS: Final[Mapping[Schema, tuple[str, ...]]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "binary": ("prompt", "completion", "label"),
    "prompt": ("prompt", "completion"),
    "pairs": ("anchor", "positive"),
    "labelled": ("text", "label"),
    "text": ("text",),
}
"""The keys that make a schema, the most telling first: a record with `prompt` and `messages` is of the second."""

TASKS: Final[Mapping[str, tuple[Schema, ...]]] = {
    "pretrain": ("text",),
    "sft": ("messages", "prompt", "text"),
    "classify": ("labelled",),
    "embed": ("pairs",),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("binary",),
}
"""The schemas that each training task takes, the preferred first."""


class KeySettings(Settings):
    """Under which keys a record holds its text and its label, where these have names of their own."""

    text_key: str | None = Field(None, description="the key that holds the text, if it is not `text`")
    label_key: str | None = Field(None, description="the key that holds the label, if it is not `label`")


DEFAULT_KEYS: Final = KeySettings()


@dataclass(frozen=True)
class CheckedRecords:
    """Records of one schema, in the form that `FORMS` gives them. decisions: for people, what was understood how."""

    schema: Schema
    decisions: tuple[str, ...]
    records: Iterator[Record]

    def __iter__(self) -> Iterator[Record]:
        return self.records


def schema_of(value: Mapping[str, Any], keys: KeySettings = DEFAULT_KEYS) -> Schema:
    """The schema that a record's keys make, aliases included. Raises DataError if they make none."""
    return _Reader(keys, ()).understand(dict(value), "the record")[0]


def check_schema(
    records: Iterable[Record], *, keys: KeySettings = DEFAULT_KEYS, expected: Collection[Schema] = ()
) -> CheckedRecords:
    """Tell the schema from the first record, and give all of them in its form, checked as they are read.

    expected: the schemas that the task takes; a record with the keys of several is read as the first of these.
    Raises DataError, naming the line, for a record that fits no schema or none that is expected, for a value of the
    wrong type, and where schemas are mixed; FileFormatError if there is no record.
    """
    iterator = iter(records)
    first = next(iterator, None)
    if first is None:
        raise FileFormatError("there are no records")
    reader = _Reader(keys, expected)
    schema, _, note = reader.understand(first.value, first.origin)
    decisions = tuple(d for d in (*_key_decisions(keys), note) if d)

    def checked() -> Iterator[Record]:
        for record in itertools.chain([first], iterator):
            found, value, _ = reader.understand(record.value, record.origin)
            if found != schema:
                raise DataError(
                    f"the schemas {schema!r} ({first.origin}) and {found!r} ({record.origin}) are mixed",
                    where=record.origin,
                    remedy="keep each in its own file; of a folder, choose files by a pattern such as data/*.jsonl",
                )
            yield Record(FORMS[schema](value, record.origin), record.origin)

    return CheckedRecords(schema, decisions, checked())


class _Reader:
    """Finds the schema of one record after another."""

    def __init__(self, keys: KeySettings, expected: Collection[Schema]) -> None:
        self._keys, self._expected = keys, tuple(expected)

    def understand(self, value: dict[str, Any], origin: str) -> tuple[Schema, dict[str, Any], str | None]:
        """The schema, the record with its keys, and what was decided about their names."""
        note = None
        given = value
        value = self._renamed(value, origin)
        found = self._schemas(value)
        if not found and (alias := find_alias(value)):
            value, note = alias.convert(value, origin), alias.note
            found = self._schemas(value)
        if not found:
            raise _unknown(given, origin)
        fitting = next((schema for schema in self._expected if schema in found), None)
        if self._expected and fitting is None:
            raise self._unexpected(found[0], given, origin)
        return fitting or found[0], value, note

    def _schemas(self, value: Mapping[str, Any]) -> list[Schema]:
        # A named text key says that the record is a text, whatever else it holds; a named label key, that it has one.
        found = [schema for schema, keys in KEYS.items() if all(value.get(key) is not None for key in keys)]
        if self._keys.text_key:
            found = [schema for schema in found if "text" in KEYS[schema]]
        if self._keys.label_key:
            found = [schema for schema in found if "label" in KEYS[schema]]
        return found

    def _renamed(self, value: dict[str, Any], origin: str) -> dict[str, Any]:
        for key, name in ((self._keys.text_key, "text"), (self._keys.label_key, "label")):
            if key:
                if key not in value:
                    raise UnknownName("key", key, value, where=origin)
                value = {**value, name: value[key]}
        return value

    def _unexpected(self, found: Schema, value: Mapping[str, Any], origin: str) -> DataError:
        wanted = " or ".join(f"{schema!r} ({', '.join(KEYS[schema])})" for schema in self._expected)
        labels = "labelled" in self._expected and "text" in value and not self._keys.label_key
        return DataError(
            f"the task takes records of the schema {wanted}; this one is {found!r} (keys: {', '.join(value)})",
            where=origin,
            remedy="name the key of the label: --label-key" if labels else "choose another task or other data",
        )


def _key_decisions(keys: KeySettings) -> Iterator[str]:
    for key, name in ((keys.text_key, "text"), (keys.label_key, "label")):
        if key not in (None, name):
            yield f"{key} read as {name}"


def _unknown(value: Mapping[str, Any], origin: str) -> DataError:
    known = {key for keys in KEYS.values() for key in keys}
    empty = next((key for key in value if key in known and value[key] is None), None)
    if empty is not None:
        return DataError(f"{empty} is null", where=origin, remedy="leave out records without content")
    # Nearer than names must be elsewhere: `context` is no misspelt `text`.
    guesses = {key: difflib.get_close_matches(key, known, n=1, cutoff=0.75) for key in value if key not in known}
    near = [f"did you mean {guess[0]!r} for {key!r}?" for key, guess in guesses.items() if guess]
    remedy = " ".join(near)
    if not near:
        remedy = "use the keys of one schema: " + "; ".join(", ".join(keys) for keys in KEYS.values())
        if os.path.splitext(origin.rpartition(":")[0])[1] in (".csv", ".tsv"):
            remedy = f"the first line must be the header; {remedy}"
    return DataError(
        f"no schema has the keys {', '.join(map(repr, value)) or '(none)'}",
        where=origin,
        remedy=f"{remedy} (or name the key that holds the text: --text-key)",
    )
