"""Curves drawn as text: braille dots (2 x 4 in a character) between two axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

Point = tuple[float, float]
Series = Mapping[str, Sequence[Point]]

# One bit for each dot of a braille character, by column and row (Unicode chapter 21.1).
_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_LAST_MARKS: Final = "●○◆◇"
_LEAST_MARK: Final = "▾"
_LEAST_COLUMNS: Final = 10
_LOG_NOTE: Final = " log"
_ENDLESS: Final = 1e100  # no NaN is below it either


def curve(series: Series, width: int, height: int, *, log_x: bool = False, styles: Sequence[str] = ()) -> str:
    """The series (name -> points (x, y)) in one plot of `width` columns and `height` lines, plus two for the x axis and
    one for each series, which names its lowest (▾) and last (●) point.

    Where several points share a column of dots, their mean is drawn. Points that are not finite are left out, with
    log_x those at x <= 0 too; without any others the text says so. styles: a colour for each series, as rich's markup;
    without them the second and later series are dotted.
    """
    kept = {name: _usable(points, log_x) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return "nothing to draw yet"
    frame = _frame(kept, width, height, log_x)
    cells: dict[tuple[int, int], int] = {}
    owners: dict[tuple[int, int], int] = {}
    marks: dict[tuple[int, int], str] = {}
    for number, points in enumerate(kept.values()):
        dotted = number > 0 and not styles
        for x, y in _line([frame.dot(point) for point in _means(points, frame)]):
            if not (dotted and x % 4 > 1):
                cell = (y // 4, x // 2)
                cells[cell] = cells.get(cell, 0) | _DOTS[x % 2][y % 4]
                owners[cell] = number
        for point, mark in ((_least(points), _LEAST_MARK), (points[-1], _last_mark(number))):
            column, row = frame.dot(point)
            cell = (row // 4, column // 2)
            marks[cell], owners[cell] = mark, number

    def cell_text(row: int, column: int) -> str:
        cell = (row, column)
        text = marks.get(cell) or (chr(0x2800 + cells[cell]) if cell in cells else " ")
        return _styled(text, styles, owners.get(cell))

    ticks = frame.y_ticks()
    margin = max(len(label) for label in ticks.values())
    lines = []
    for row in range(frame.rows):
        axis = f"{ticks.get(row, ''):>{margin}} {'┤' if row in ticks else '│'}"
        lines.append((axis + "".join(cell_text(row, column) for column in range(frame.columns))).rstrip())
    lines += [" " * (margin + 1) + line for line in frame.x_axis()]
    names = max(len(name) for name in kept)
    for number, (name, points) in enumerate(kept.items()):
        (low_x, low), (last_x, last) = _least(points), points[-1]
        facts = f"{_LEAST_MARK} {number_text(low)} at {number_text(low_x)}   last {number_text(last)} at "
        mark = _styled(_last_mark(number), styles, number)
        lines.append(f"{' ' * (margin + 1)} {mark} {name:<{names}}   {facts}{number_text(last_x)}")
    return "\n".join(lines)


def number_text(value: float) -> str:
    """A number in few characters: 0.2139, 12.5, 3000, 1.2M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    return str(int(value)) if value == int(value) else f"{value:.4g}"


@dataclass(frozen=True)
class _Frame:
    """Which numbers the edges of the plot stand for, and its size in characters."""

    x: tuple[float, float]
    y: tuple[float, float]
    columns: int
    rows: int
    log_x: bool

    def dot(self, point: Point) -> tuple[int, int]:
        """The dot of a point: from the left, from the top. What lies beyond an edge is put on it."""
        x = self._share(point[0], self.x, self.log_x) * (2 * self.columns - 1)
        y = (1 - self._share(point[1], self.y, False)) * (4 * self.rows - 1)
        return round(x), round(y)

    def y_ticks(self) -> dict[int, str]:
        """Round numbers by the row that they label."""
        step = _round_step((self.y[1] - self.y[0]) / max(1, self.rows // 2))
        digits = max(0, -math.floor(math.log10(step)))
        first, last = math.ceil(self.y[0] / step - 1e-9), math.floor(self.y[1] / step + 1e-9)
        values = {self.dot((self.x[0], i * step))[1] // 4: i * step for i in range(first, last + 1)}
        plain = digits < 5 and max(map(abs, self.y)) < 1e6
        labels = {row: f"{value:.{digits}f}" if plain else number_text(value) for row, value in values.items()}
        return labels or {0: number_text(self.y[1])}

    def x_axis(self) -> list[str]:
        """The line below the plot and its labels, which never touch each other."""
        line, labels = list("└" + "─" * self.columns), [" "] * (self.columns + 1)
        free = 0
        for value in self._x_ticks():
            text = number_text(value)
            at = 1 + self.dot((value, self.y[0]))[0] // 2
            begin = min(max(0, at - len(text) // 2), len(labels) - len(text))
            if begin >= free:
                line[at] = "┬"
                labels[begin : begin + len(text)] = text
                free = begin + len(text) + 2
        return ["".join(line) + (_LOG_NOTE if self.log_x else ""), "".join(labels).rstrip()]

    def _x_ticks(self) -> Iterator[float]:
        low, high = self.x
        if self.log_x:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            leads = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
            yield from (lead * 10.0**k for k in decades for lead in leads if low <= lead * 10.0**k <= high)
        else:
            step = max(1.0, _round_step((high - low) / max(1, self.columns // 10)))
            yield from (i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1))

    @staticmethod
    def _share(value: float, edges: tuple[float, float], log: bool) -> float:
        low, high = (math.log(edge) for edge in edges) if log else edges
        value = math.log(value) if log else value
        return min(1.0, max(0.0, (value - low) / (high - low)))


def _frame(series: Series, width: int, height: int, log_x: bool) -> _Frame:
    xs = [x for points in series.values() for x, _ in points]
    whole = _Frame(_spread(min(xs), max(xs)), (0.0, 1.0), width, height, log_x)
    drawn = [[*_means(points, whole), _least(points), points[-1]] for points in series.values()]
    ys = [y for points in drawn for _, y in points]
    whole = replace(whole, y=_spread(min(ys), max(ys)))
    margin = max(len(label) for label in whole.y_ticks().values()) + 2
    if log_x:
        margin += len(_LOG_NOTE)
    return replace(whole, columns=max(_LEAST_COLUMNS, width - margin))


def _spread(low: float, high: float) -> tuple[float, float]:
    # Edges that differ, around numbers that may not.
    room = abs(low) / 10 or 0.5
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high), 1e-9) else (low - room, low + room)


def _usable(points: Sequence[Point], log_x: bool) -> list[Point]:
    return [(x, y) for x, y in points if abs(x) < _ENDLESS and abs(y) < _ENDLESS and (x > 0 or not log_x)]


def _means(points: Sequence[Point], frame: _Frame) -> list[Point]:
    """One point for each column of dots that has any: their mean."""
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(frame.dot(point)[0], []).append(point)
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for _, group in sorted(columns.items())
    ]


def _line(dots: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Every dot of the straight lines that join `dots`."""
    yield from dots[:1]
    for (x, y), (next_x, next_y) in pairwise(dots):
        length = max(abs(next_x - x), abs(next_y - y))
        for i in range(1, length + 1):
            yield round(x + (next_x - x) * i / length), round(y + (next_y - y) * i / length)


def _least(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: (point[1], point[0]))


def _last_mark(number: int) -> str:
    return _LAST_MARKS[number % len(_LAST_MARKS)]


def _styled(text: str, styles: Sequence[str], number: int | None) -> str:
    return f"[{styles[number % len(styles)]}]{text}[/]" if styles and number is not None and text != " " else text


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(lead * power for lead in (1, 2, 5, 10) if lead * power >= step * (1 - 1e-9))
