"""Filters over the metadata of documents: "kind=pdf", "year>=2020", "folder=guide/*", "lang!=fa".

A filter is applied before anything is scored, so that a search among one tenant's documents finds all that it would
find if nothing else were there. What a user writes only ever reaches SQL as a parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from craton.errors import UnknownName, UsageError
from craton.retrieval.documents import MetadataValue

Operator = Literal["=", "!=", ">", ">=", "<", "<="]

_OPERATORS: Final[dict[str, Operator]] = {"==": "=", "=": "=", "!=": "!=", ">": ">", ">=": ">=", "<": "<", "<=": "<="}

_CONDITION: Final = re.compile(r"\s*([^<>=!]+?)\s*(!=|>=|<=|==|=|>|<)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """One comparison of a key's value. `value` is as the user wrote it; * and ? are wildcards in it for = and !=."""

    key: str
    operator: Operator
    value: str


@dataclass(frozen=True)
class Filter:
    """What must hold of a document. All conditions count, but several = of one key are alternatives."""

    conditions: tuple[Condition, ...] = ()

    def sql(self) -> tuple[str, list[MetadataValue]]:
        """An SQL condition over `documents.id` and its parameters."""
        clauses: list[str] = []
        parameters: list[MetadataValue] = []
        for group in _groups(self.conditions):
            tests = []
            values: list[MetadataValue] = [group[0].key]
            for condition in group:
                test, value = _comparison(condition)
                tests.append(test)
                values += value
            # A document without a language is not in Persian: != is "no value that equals", not "one that differs".
            absent = "NOT " if group[0].operator == "!=" else ""
            clauses.append(
                f"documents.id {absent}IN (SELECT document FROM metadata WHERE key = ? AND ({' OR '.join(tests)}))"
            )
            parameters += values
        return " AND ".join(clauses) or "1", parameters

    def check(self, known: Collection[str]) -> None:
        """Raises UnknownName for a key that no document has, with the nearest ones that some have."""
        for condition in self.conditions:
            if condition.key not in known:
                raise UnknownName("filter key", condition.key, known)


def parse_filters(texts: Iterable[str]) -> Filter:
    """A filter of conditions "key=value", with one of = != > >= < <= between.

    = and != compare whole values, case included, and know the wildcards * (anything) and ? (one character);
    "folder=guide/*" is the folder "guide" and all below it. The others compare as numbers if both sides are numbers,
    and as text if neither is, so dates written 2024-05-01 work.

    Raises:
        UsageError: a text that is no condition.
    """
    return Filter(tuple(_condition(text) for text in texts))


def metadata_row(value: MetadataValue) -> tuple[str, float | None]:
    """How a value is stored for filters: as text, and as a number if it is or reads as one."""
    if isinstance(value, bool):
        return ("true" if value else "false"), None
    return str(value), _number(str(value))


def described(name: str, title: str, kind: str, metadata: Mapping[str, MetadataValue]) -> dict[str, MetadataValue]:
    """Everything that a filter may ask of a document: its own metadata, and "document", "title" and "kind"."""
    return {"document": name, "title": title, "kind": kind, **metadata}


def _condition(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise UsageError(
            f"the filter {text!r} is no condition",
            remedy="write a key, one of = != > >= < <=, and a value: kind=pdf, year>=2020, folder=guide/*, lang!=fa",
        )
    key, value = match[1], match[3]
    operator = _OPERATORS[match[2]]
    if operator not in ("=", "!=") and not value:
        raise UsageError(f"the filter {text!r} compares with nothing", remedy=f"give a value: {key}{operator}2020")
    return Condition(key, operator, value)


def _groups(conditions: Iterable[Condition]) -> list[list[Condition]]:
    groups: dict[tuple[str, ...], list[Condition]] = {}
    for number, condition in enumerate(conditions):
        alone = (condition.key, str(number))
        groups.setdefault((condition.key,) if condition.operator == "=" else alone, []).append(condition)
    return list(groups.values())


def _comparison(condition: Condition) -> tuple[str, list[MetadataValue]]:
    number = _number(condition.value)
    if condition.operator in ("=", "!="):
        if "*" in condition.value or "?" in condition.value:
            pattern = condition.value.replace("[", "[[]")  # the only other sign that GLOB knows
            if pattern.endswith("/*"):
                return "(text GLOB ? OR text GLOB ?)", [pattern, pattern[:-2]]
            return "text GLOB ?", [pattern]
        if number is None:
            return "text = ?", [condition.value]
        return "(text = ? OR number = ?)", [condition.value, number]
    if number is None:
        return f"(number IS NULL AND text {condition.operator} ?)", [condition.value]
    return f"number {condition.operator} ?", [number]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
