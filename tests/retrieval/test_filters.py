"""Filters: what they mean, as SQL over real rows."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import UnknownName, UsageError
from craton.retrieval import schema_sql
from craton.retrieval.documents import MetadataValue
from craton.retrieval.filters import Condition, metadata_row, parse_filters

DOCUMENTS: dict[str, dict[str, MetadataValue]] = {
    "a": {"kind": "pdf", "year": 2019, "folder": "guide", "lang": "en", "draft": True},
    "b": {"kind": "html", "year": 2020, "folder": "guide/linux", "lang": "fa", "draft": False},
    "c": {"kind": "pdf", "year": "2021", "folder": "guidelines", "date": "2024-05-01"},
    "d": {"kind": "text", "year": "unknown", "folder": "x[1]", "date": "2023-12-31", "price": 1.5},
}


@pytest.fixture(scope="module")
def rows() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    for statement in schema_sql.SCHEMA:
        connection.execute(statement)
    connection.execute("INSERT INTO sources VALUES (1, 's', 'text', '')")
    for number, (name, metadata) in enumerate(DOCUMENTS.items(), 1):
        connection.execute("INSERT INTO documents VALUES (?, 1, ?, '', '', '', '', '', '', '')", (number, name))
        for key, value in metadata.items():
            connection.execute("INSERT INTO metadata VALUES (?, ?, ?, ?)", (number, key, *metadata_row(value)))
    return connection


def matching(rows: sqlite3.Connection, *texts: str) -> str:
    condition, parameters = parse_filters(texts).sql()
    found = rows.execute(f"SELECT name FROM documents WHERE {condition} ORDER BY name", parameters)
    return "".join(name for (name,) in found)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], "abcd"),
        (["kind=pdf"], "ac"),
        (["kind==pdf"], "ac"),
        (["kind = pdf"], "ac"),
        (["kind=PDF"], ""),
        (["kind!=pdf"], "bd"),
        (["kind=pdf", "kind=html"], "abc"),
        (["kind!=pdf", "kind!=html"], "d"),
        (["kind=p*"], "ac"),
        (["kind=?df"], "ac"),
        (["kind!=p*"], "bd"),
        (["year>=2020"], "bc"),
        (["year>2020"], "c"),
        (["year<2020"], "a"),
        (["year<=2020.0"], "ab"),
        (["year=2020"], "b"),
        (["year=2021.0"], "c"),
        (["year=unknown"], "d"),
        (["year>a"], "d"),
        (["date>=2024-01-01"], "c"),
        (["date<2024-01-01"], "d"),
        (["price>1"], "d"),
        (["folder=guide/*"], "ab"),
        (["folder=guide*"], "abc"),
        (["folder=x[1]"], "d"),
        (["folder=x[*"], "d"),
        (["lang!=fa"], "acd"),
        (["draft=true"], "a"),
        (["draft=false"], "b"),
        (["kind=pdf", "year>=2020"], "c"),
        (["kind="], ""),
        (["kind=' OR 1=1 --"], ""),
        (['kind=" OR ""="'], ""),
        (["' OR 1=1 --=x"], ""),
    ],
)
def test_what_they_match(rows: sqlite3.Connection, texts: list[str], expected: str) -> None:
    assert matching(rows, *texts) == expected


@pytest.mark.parametrize("text", ["", "kind", "=pdf", ">=3", "year>=", "year< ", "!=x"])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_filters([text])
    assert refused.value.remedy


def test_values_may_hold_signs() -> None:
    assert parse_filters(["title=a >= b != c"]).conditions == (Condition("title", "=", "a >= b != c"),)


def test_unknown_keys_suggest_known_ones() -> None:
    with pytest.raises(UnknownName, match="yaer") as refused:
        parse_filters(["kind=pdf", "yaer>=2020"]).check({"kind", "year"})
    assert "'year'" in str(refused.value)
    parse_filters(["kind=pdf"]).check({"kind", "year"})


@given(st.sampled_from(["=", "!=", "<", ">=", ">", "<="]), st.text(min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_no_value_is_syntax(operator: str, value: str) -> None:
    connection = sqlite3.connect(":memory:")
    for statement in schema_sql.SCHEMA[1:5]:
        connection.execute(statement)
    try:
        condition, parameters = parse_filters([f"key{operator}{value}"]).sql()
    except UsageError:
        return
    try:
        assert connection.execute(f"SELECT * FROM documents WHERE {condition}", parameters).fetchall() == []
    except UnicodeEncodeError:
        pytest.fail("half surrogates reach SQLite")
    finally:
        connection.close()
