"""Curves as text: what is drawn lies where the numbers are, in the room that was given."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.markup import render

from craton.cli.plots import curve, number_text


def plot_rows(text: str) -> list[str]:
    """The drawn part of each line, right of the y axis."""
    rows = [line for line in text.splitlines() if "┤" in line or "│" in line]
    return [line[max(line.find("┤"), line.find("│")) + 1 :] for line in rows]


def drawn(text: str, columns: int) -> list[set[int]]:
    """For each column, the rows that have anything in it."""
    rows = plot_rows(text)
    return [{y for y, row in enumerate(rows) if x < len(row) and row[x] not in (" ", "\u2800")} for x in range(columns)]


def test_a_small_plot_is_exactly_this():
    assert curve({"loss": [(0, 4.0), (10, 2.0), (20, 1.0), (30, 3.0)]}, 40, 6).splitlines() == [
        "4 ┤⠑⠢⢄",
        "  │   ⠉⠢⢄",
        "3 ┤      ⠉⠒⢄⡀                        ⡠⠔●",
        "2 ┤         ⠈⠑⠤⣀                  ⡠⠔⠉",
        "  │             ⠉⠑⠒⠤⢄⣀⡀       ⢀⡠⠒⠉",
        "1 ┤                   ⠈⠉⠒⠢⠤▾⠤⠊⠁",
        "  └┬───────────┬───────────┬───────────┬",
        "   0          10          20          30",
        "   ● loss   ▾ 1 at 20   last 3 at 30",
    ]


def test_a_falling_line_falls_from_corner_to_corner():
    text = curve({"loss": [(x, 100.0 - x) for x in range(101)]}, 60, 10)
    rows = plot_rows(text)
    assert len(rows) == 10
    columns = drawn(text, len(rows[-1]))
    assert columns[0] == {0}
    assert columns[-1] == {9}
    assert all(columns)
    tops = [min(column) for column in columns]
    assert tops == sorted(tops)


def test_the_lowest_and_the_last_point_are_marked_and_named():
    text = curve({"loss": [(1, 3.0), (50, 1.25), (100, 2.0)]}, 60, 9)
    rows = plot_rows(text)
    assert rows[-1].count("▾") == 1
    assert abs(rows[-1].index("▾") - 27) <= 2
    assert "".join(rows).count("●") == 1
    assert text.splitlines()[-1].endswith("● loss   ▾ 1.25 at 50   last 2 at 100")


@pytest.mark.parametrize("width", [20, 80, 100, 120])
def test_axes_have_round_numbers_where_they_belong(width):
    text = curve({"loss": [(x, 10.0 * math.exp(-x / 300)) for x in range(1001)]}, width, 12)
    lines = text.splitlines()
    rows, axis, labels = lines[:12], lines[12], lines[13]
    marked = {i: line.split("┤")[0].strip() for i, line in enumerate(rows) if "┤" in line}
    assert list(marked.values()) == ["8", "6", "4", "2"]
    assert marked == {i: label for i, label in marked.items() if abs(float(label) - (9.6 - i * 9.6 / 12)) < 0.8}
    assert max(map(len, lines[:13])) == width
    for label in ("0", "1000") if width >= 80 else ("0",):
        at = labels.index(label)
        assert "┬" in axis[at : at + len(label)]
    assert all(float(word) % 100 == 0 for word in labels.split())


def test_with_a_logarithmic_axis_decades_are_equally_far():
    text = curve({"loss": [(x, -math.log10(x)) for x in range(1, 10_001)]}, 90, 10, log_x=True)
    axis, labels = text.splitlines()[10:12]
    ticks = [i for i, char in enumerate(axis) if char == "┬"]
    assert labels.split() == ["1", "10", "100", "1000", "10000"]
    assert axis.endswith("┬ log")
    gaps = [b - a for a, b in pairwise(ticks)]
    assert max(gaps) - min(gaps) <= 1
    tops = [min(column) for column in drawn(text, len(axis) - axis.index("└") - 5) if column]
    straight = [round(i * 9 / (len(tops) - 1)) for i in range(len(tops))]
    assert max(abs(a - b) for a, b in zip(tops, straight, strict=True)) <= 1


def test_points_in_one_column_are_averaged():
    noisy = [(x, 5.0 + (4.0 if x % 2 else -4.0)) for x in range(10_000)]
    rows = plot_rows(curve({"loss": [*noisy, (10_000, 1.0)]}, 60, 12))
    assert [i for i, row in enumerate(rows) if any("\u2800" < char <= "\u28ff" for char in row[:-2])] == [0]
    assert rows[-1].endswith("●")


def test_several_series_are_told_apart_with_and_without_colours():
    series = {"A": [(x, 2.0) for x in range(100)], "B": [(x, 1.0) for x in range(100)]}
    plain = curve(series, 60, 8)
    rows = plot_rows(plain)
    assert " " not in rows[0].rstrip()
    assert rows[-1].rstrip().count(" ") > 20  # dotted
    assert ("●" in rows[0], "○" in rows[-1]) == (True, True)
    coloured = curve(series, 60, 8, styles=["cyan", "magenta"])
    text = render(coloured)
    rows = plot_rows(text.plain)
    assert " " not in rows[-1].rstrip()[1:]
    styles = {span.style for span in text.spans}
    assert styles == {"cyan", "magenta"}


def test_what_cannot_be_drawn_is_left_out():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0), (4, -math.inf)]
    assert curve({"loss": points}, 40, 5) == curve({"loss": [(0, 1.0), (3, 2.0)]}, 40, 5)
    assert curve({"loss": points, "none": []}, 40, 5) == curve({"loss": points}, 40, 5)
    assert curve({"loss": points}, 40, 5, log_x=True) == curve({"loss": [(3, 2.0)]}, 40, 5, log_x=True)
    assert curve({}, 40, 5) == curve({"loss": [(1, math.nan)]}, 40, 5) == "nothing to draw yet"


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-10, 10) | st.integers(-5, 5).map(float)


@given(
    series=st.dictionaries(
        st.sampled_from("ABC"), st.lists(st.tuples(st.integers(0, 10**7) | numbers, numbers), max_size=30), max_size=3
    ),
    width=st.integers(30, 140),
    height=st.integers(2, 30),
    log_x=st.booleans(),
)
def test_any_numbers_fit_into_the_room(series, width, height, log_x):
    text = curve(series, width, height, log_x=log_x)
    lines = text.splitlines()
    if text == "nothing to draw yet":
        return
    assert len(plot_rows(text)) == height
    assert max(map(len, lines[: height + 2])) <= width
    assert "●" in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.213912, "0.2139"), (12.5, "12.5"), (3000, "3000"), (1_200_000, "1.2M"), (3e9, "3G"), (-2.0, "-2"), (0, "0")],
)
def test_numbers_in_few_characters(number, text):
    assert number_text(number) == text
