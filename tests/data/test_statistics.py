"""Figures about texts, each against a plain count or a known text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.data.statistics import Lengths, TextStatistics, script_of


def statistics_of(*texts: str) -> TextStatistics:
    figures = TextStatistics()
    for text in texts:
        figures.add([text])
    return figures


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_quantiles_are_lengths_that_occur(lengths: Sequence[int]) -> None:
    counted = Lengths()
    for length in lengths:
        counted.add(length)
    quantiles = counted.quantiles()
    assert counted.total == sum(lengths)
    assert (quantiles["least"], quantiles["most"]) == (min(lengths), max(lengths))
    assert quantiles["median"] == statistics.median_low(lengths)
    assert list(quantiles.values()) == sorted(quantiles.values())
    assert set(quantiles.values()) <= set(lengths)


def test_nothing_has_no_quantiles_and_no_division_by_zero() -> None:
    assert Lengths().quantiles() == {}
    assert Lengths().total == 0
    figures = TextStatistics().as_dict()
    assert (figures.pop("lengths"), figures.pop("scripts")) == ({}, {})
    assert set(figures.values()) == {0}


def test_known_texts() -> None:
    figures = statistics_of("ab cde!", "12 34")
    assert (figures.characters, figures.words, figures.letters) == (12, 4, 5)
    assert figures.mean_word_length == 10 / 4
    assert figures.non_letters == pytest.approx(5 / 10)
    assert figures.lengths.quantiles()["most"] == 7


def test_persian_is_not_taxed_for_its_joiners() -> None:
    # The zero-width non-joiner is no character that one sees.
    figures = statistics_of("می‌شود")
    assert figures.non_letters == 0
    assert figures.mean_word_length == 5


@pytest.mark.parametrize(
    ("character", "script"),
    [("a", "Latin"), ("ß", "Latin"), ("ی", "Arabic"), ("ż", "Latin"), ("я", "Cyrillic"), ("東", "Han"), ("の", "Kana"),
     ("カ", "Kana"), ("한", "Hangul"), ("क", "Devanagari"), ("1", None), (" ", None), ("!", None), ("🦊", None)],
)  # fmt: skip
def test_scripts(character: str, script: str | None) -> None:
    assert script_of(character) == script


def test_shares_of_scripts_are_of_the_letters() -> None:
    assert statistics_of("abc سلا 12!").script_shares() == {"Latin": 0.5, "Arabic": 0.5}


def test_duplicates_are_whole_records() -> None:
    figures = TextStatistics()
    records = [["a", "b"], ["a", "b"], ["ab"], ["a", "b", ""], ["b", "a"], ["a", "b"]]
    assert [figures.add(record) for record in records] == [False, True, False, False, False, True]
    assert figures.duplicates == 2
