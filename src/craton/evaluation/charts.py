"""Charts as SVG, drawn by hand: no script, no font and no network, so a report opens offline and prints well.

Colours come from the page's style sheet (`page.py`) by class: "c0" ... "c7" for series, "ink", "faint" and "grid".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 720
LABEL: Final = 190
ROW: Final = 30


@dataclass(frozen=True)
class Bar:
    """A figure with its interval. series: its colour. faint: a diagnostic, not a way to choose."""

    label: str
    value: float
    low: float
    high: float
    series: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot, its interval on the y axis, and whether it is on the frontier."""

    label: str
    x: float
    y: float
    low: float
    high: float
    series: int = 0
    frontier: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Line:
    """A named series of points (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]
    series: int = 0


def interval_chart(bars: Sequence[Bar], *, title: str, form: Callable[[float], str], top: float | None = None) -> str:
    """Figures under each other, each a dot on its interval."""
    height = ROW * len(bars) + 40
    most = top if top is not None else _nice(max((bar.high for bar in bars), default=1.0))
    scale = (WIDTH - LABEL - 80) / (most or 1.0)
    parts = []
    for tick in _ticks(most):
        x = LABEL + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - 28}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{height - 10}" text-anchor="middle">{form(tick)}</text>')
    for number, bar in enumerate(bars):
        y = 8 + ROW * number + ROW / 2
        low, value, high = (LABEL + max(0.0, min(v, most)) * scale for v in (bar.low, bar.value, bar.high))
        style = f"c{bar.series % 8}" + (" diagnostic" if bar.faint else "")
        parts.append(
            f'<text class="label" x="{LABEL - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(bar.label)}</text>'
        )
        parts.append(f'<line class="{style} interval" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<circle class="{style}" cx="{value:.1f}" cy="{y:.1f}" r="5"/>')
        parts.append(f'<text class="value" x="{max(high, value) + 10:.1f}" y="{y + 4:.1f}">{form(bar.value)}</text>')
    return _svg(height, title, parts)


def scatter_chart(
    points: Sequence[Point], *, title: str, x_title: str, y_title: str, form: Callable[[float], str] | None = None
) -> str:
    """Points over a logarithmic x axis and a y axis from 0 to 1, the frontier joined. form: the words of a tick of the
    x axis (none: seconds)."""
    form = form or _seconds
    height, left, bottom = 380, 56, 46
    xs = [point.x for point in points if point.x > 0] or [1.0]
    low, high = math.log10(min(xs)) - 0.15, math.log10(max(xs)) + 0.35

    def at_x(x: float) -> float:
        return left + (math.log10(max(x, 10**low)) - low) / (high - low) * (WIDTH - left - 20)

    def at_y(y: float) -> float:
        return 12 + (1 - y) * (height - bottom - 12)

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 20}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>')
        parts.append(f'<text class="axis" x="{left - 8}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
    for x in _log_ticks(low, high):
        parts.append(f'<line class="grid" x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="12" y2="{height - bottom}"/>')
        parts.append(
            f'<text class="axis" x="{at_x(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{form(x)}</text>'
        )
    frontier = sorted((p for p in points if p.frontier), key=lambda p: p.x)
    if len(frontier) > 1:
        path = " ".join(f"{at_x(p.x):.1f},{at_y(p.y):.1f}" for p in frontier)
        parts.append(f'<polyline class="frontier" points="{path}"/>')
    for point, label_y in zip(points, _apart([at_y(p.y) for p in points]), strict=True):
        style = f"c{point.series % 8}" + (" diagnostic" if point.faint else "")
        x, y = at_x(point.x), at_y(point.y)
        parts.append(
            f'<line class="{style} interval" x1="{x:.1f}" x2="{x:.1f}" y1="{at_y(point.low):.1f}" '
            f'y2="{at_y(point.high):.1f}"/>'
        )
        parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        end = x > WIDTH - 170
        parts.append(
            f'<text class="label" x="{x - 11 if end else x + 11:.1f}" y="{label_y + 4:.1f}" '
            f'text-anchor="{"end" if end else "start"}">{escape(point.label)}</text>'
        )
    parts.append(f'<text class="axis" x="{WIDTH - 20}" y="{height - 6}" text-anchor="end">{escape(x_title)}</text>')
    parts.append(f'<text class="axis" x="{left}" y="{height - 6}">{escape(y_title)} ↑</text>')
    return _svg(height, title, parts)


def log_lines(lines: Sequence[Line], *, title: str, x_title: str, y_title: str) -> str:
    """Lines over two logarithmic axes: what so many questions cost in all."""
    height, left, bottom = 320, 70, 46
    every = [(x, y) for line in lines for x, y in line.points if x > 0 and y > 0]
    if not every:
        return ""
    x0, x1 = (f(math.log10(x) for x, _ in every) for f in (min, max))
    y0, y1 = (f(math.log10(y) for _, y in every) for f in (min, max))
    y1 = max(y1, y0 + 0.5)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (math.log10(x) - x0) / (x1 - x0) * (WIDTH - left - 150),
            12 + (1 - (math.log10(y) - y0) / (y1 - y0)) * (height - bottom - 12),
        )

    parts = []
    for tick in _log_ticks(y0, y1):
        y = at(10**x0, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 150}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_seconds(tick)}</text>')
    for tick in _log_ticks(x0, x1):
        x = at(tick, 10**y0)[0]
        parts.append(
            f'<text class="axis" x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{_count(tick)}</text>'
        )
    ends = _apart([at(*line.points[-1])[1] for line in lines])
    for line, label_y in zip(lines, ends, strict=True):
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line.points if x > 0 and y > 0)
        parts.append(f'<polyline class="c{line.series % 8} line" points="{path}"/>')
        parts.append(f'<text class="label" x="{WIDTH - 142}" y="{label_y + 4:.1f}">{escape(line.label)}</text>')
    parts.append(f'<text class="axis" x="{WIDTH - 150}" y="{height - 6}" text-anchor="end">{escape(x_title)}</text>')
    parts.append(f'<text class="axis" x="{left}" y="{height - 6}">{escape(y_title)} ↑</text>')
    return _svg(height, title, parts)


def reliability_chart(bins: Sequence[tuple[float, float, int]], *, title: str) -> str:
    """Confidence against accuracy, (mean confidence, accuracy, n) a bin; the diagonal is perfect calibration."""
    size, left = 300, 48
    span = size - left - 12

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * span, 12 + (1 - y) * (size - 54)

    parts = ['<line class="grid" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(*at(0, 0), *at(1, 1))]
    for tick in (0.0, 0.5, 1.0):
        x, y = at(tick, tick)
        parts.append(f'<text class="axis" x="{x:.1f}" y="{size - 24}" text-anchor="middle">{tick:.0%}</text>')
        parts.append(f'<text class="axis" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
    most = max((n for _, _, n in bins), default=1)
    for confidence, accuracy, n in bins:
        x, y = at(confidence, accuracy)
        parts.append(f'<circle class="c0" cx="{x:.1f}" cy="{y:.1f}" r="{3 + 6 * math.sqrt(n / most):.1f}"/>')
    parts.append(f'<text class="axis" x="{size - 12}" y="{size - 6}" text-anchor="end">confidence →  accuracy ↑</text>')
    return _svg(size, title, parts, width=size)


def _svg(height: float, title: str, parts: Sequence[str], width: int = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'style="max-width:{width}px">{"".join(parts)}</svg>'
    )


def _nice(value: float) -> float:
    """The next round number above a positive one: 1, 2, 2.5 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * 0.999)


def _ticks(most: float) -> list[float]:
    return [most * part / 4 for part in range(5)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = [10.0**e for e in range(math.ceil(low), math.floor(high) + 1)]
    if len(decades) >= 3:
        return decades[:: max(1, len(decades) // 6)]
    steps = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    return [step for step in steps if low <= math.log10(step) <= high]


def _apart(places: Sequence[float], least: float = 16) -> list[float]:
    """The same places, moved so that no two labels overlap."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for previous, this in itertools.pairwise(order):
        moved[this] = max(moved[this], moved[previous] + least)
    return moved


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def _count(value: float) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
