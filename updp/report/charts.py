"""Geometry of the two kinds of chart on the page; the template writes it down as SVG.

A :class:`LineChart` lives in a viewBox of WIDTH x HEIGHT units. A :class:`RowChart` has one strip per row in which
all horizontal positions are percentages, so that text keeps its size on any screen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 400.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 388.0, 24.0, 196.0  # edges of the plotting area
_DOTS = 60  # a longer line has a marker with a tooltip only at every n-th of its points

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its position (units, or percent of a row) and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Series:
    """A line to draw, in data coordinates. ``style`` is a class of the style sheet: a, b or c."""

    label: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Dot:
    """A marker that says its value when pointed at."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """A drawn line: ``path`` is the ``d`` of an SVG path."""

    label: str
    style: str
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class LineChart:
    """Lines over two axes. ``levels`` are dashed horizontal reference lines."""

    title: str
    x_label: str
    y_label: str
    description: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    levels: list[Tick]


@dataclass(frozen=True)
class Mark:
    """One value in a row, with the quartiles around it: positions are percent of the row's width."""

    style: str
    at: float
    low: float | None
    high: float | None
    title: str


@dataclass(frozen=True)
class Row:
    """A labelled strip of a row chart; ``value`` is written beside it, ``title`` is read to those who cannot see."""

    label: str
    note: str
    value: str
    title: str
    marks: list[Mark]


@dataclass(frozen=True)
class RowChart:
    """Strips over one common axis. ``bars``: the axis starts at 0 and marks are bars, else they are dots."""

    title: str
    axis: str
    ticks: list[Tick]
    rows: list[Row]
    bars: bool


@dataclass(frozen=True)
class Measured:
    """A value to mark in a row, in the unit of the axis, with its quartiles where they are known."""

    style: str
    label: str
    value: float
    low: float | None = None
    high: float | None = None


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About ``count`` round numbers that enclose ``low`` to ``high``, a step of 1, 2 or 5 times ten^n apart."""
    low, high = min(low, high), max(low, high)
    floor = 1.0 if whole else max(abs(low), abs(high), 1e-12) * 1e-2  # an axis does not blow up rounding
    span = max(high - low, floor)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next((m * power for m in (1, 2, 5) if m * power * count >= span * 0.999), 10 * power)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The shortest decimals that tell neighbouring ticks apart."""
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    if max(map(abs, values), default=0.0) >= 1e5 or 0 < step < 1e-4:
        return [f"{value:.3g}" for value in values]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return [f"{value:.{digits}f}" for value in values]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Iterable[Series],
    *,
    levels: Iterable[tuple[str, float]] = (),
    y_range: Point | None = None,
) -> LineChart | None:
    """Lay out lines over axes with round ticks; None if there is no point to draw.

    ``levels`` are (label, y) of horizontal reference lines, ``y_range`` fixes the y axis, whose ticks enclose all else.
    """
    lines, marks = [line for line in series if line.points], list(levels)
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [*(y for line in lines for _, y in line.points), *(y for _, y in marks), *(y_range or ())]
    x_values, y_values = nice_ticks(min(xs), max(xs), whole=True), nice_ticks(min(ys), max(ys))
    # x counts epochs or generations: ticks are whole numbers, and there is no air beyond the last of them
    air = 0 if min(xs) < max(xs) else 1
    frame = _Frame(min(xs) - air, max(xs) + air, y_values[0], y_values[-1])
    return LineChart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        description=f"{title}. " + " ".join(_describe(line, x_label) for line in lines),
        x_ticks=[
            Tick(frame.x(x), label)
            for x, label in zip(x_values, tick_labels(x_values), strict=True)
            if min(xs) <= x <= max(xs)
        ],
        y_ticks=[Tick(frame.y(y), label) for y, label in zip(y_values, tick_labels(y_values), strict=True)],
        lines=[_draw(line, x_label, frame) for line in lines],
        levels=[Tick(frame.y(y), label) for label, y in marks],
    )


@dataclass(frozen=True)
class _Frame:
    """Data coordinates of the plotting area's edges."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        return BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (BOTTOM - TOP)


def _draw(line: Series, x_label: str, frame: _Frame) -> Line:
    placed = [(frame.x(x), frame.y(y)) for x, y in line.points]
    every = math.ceil(len(placed) / _DOTS)
    shown = sorted({*range(0, len(placed), every), len(placed) - 1})
    titles = [f"{line.label}, {x_label} {x:g}: {y:.5g}" for x, y in line.points]
    dots = [Dot(placed[i][0], placed[i][1], titles[i]) for i in shown]
    return Line(line.label, line.style, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed), dots)


def _describe(line: Series, x_label: str) -> str:
    (x0, y0), (x1, y1) = line.points[0], line.points[-1]
    return f"{line.label}: from {y0:.4g} at {x_label} {x0:g} to {y1:.4g} at {x_label} {x1:g}."


def row_chart(
    title: str,
    axis: str,
    rows: Iterable[tuple[str, str, str, Sequence[Measured]]],
    *,
    bars: bool,
    log: bool = False,
) -> RowChart | None:
    """Lay out (label, note, value text, values) rows over one axis; None if there is nothing to draw.

    On a logarithmic axis what is not above 0 is drawn at its left end.
    """
    rows = [row for row in rows if row[3]]
    values = [v for *_, marks in rows for m in marks for v in (m.value, m.low, m.high) if v is not None]
    if not values:
        return None
    ticks = _decades(values) if log else nice_ticks(0.0 if bars else min(values), max(values), count=4)
    low, high = _place(ticks[0], log), _place(ticks[-1], log)

    def percent(value: float | None) -> float | None:
        return None if value is None else max(0.0, 100 * (_place(max(value, ticks[0]), log) - low) / (high - low))

    def mark(m: Measured) -> Mark:
        spread = "" if m.low is None or m.high is None else f" (quartiles {m.low:.4g} to {m.high:.4g})"
        return Mark(
            m.style, percent(m.value) or 0.0, percent(m.low), percent(m.high), f"{m.label}: {m.value:.4g}{spread}"
        )

    def row(label: str, note: str, value: str, marks: Sequence[Measured]) -> Row:
        drawn = [mark(m) for m in marks]
        return Row(label, note, value, f"{label}, {axis}: " + ", ".join(m.title for m in drawn), drawn)

    labels = [f"{tick:g}" for tick in ticks] if log else tick_labels(ticks)
    return RowChart(
        title=title,
        axis=axis,
        ticks=[Tick(percent(t) or 0.0, label) for t, label in zip(ticks, labels, strict=True)],
        rows=[row(*item) for item in rows],
        bars=bars,
    )


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten that enclose what is above 0, at most nine of them: what is smaller still lies at the end."""
    positive = [value for value in values if value > 0] or [1.0]
    last = math.ceil(math.log10(max(positive)) - 1e-9)
    first = max(math.floor(math.log10(min(positive)) + 1e-9), last - 8)
    return [10.0**power for power in range(min(first, last - 1), last + 1)]


def _place(value: float, log: bool) -> float:
    return math.log10(value) if log else value
