"""Results as pictures: one bar for each runtime or form, standing alone as SVG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from updp.report.charts import Mark, Measured, RowChart, row_chart
from updp.report.words import milliseconds

WIDTH = 760.0
LEFT, RIGHT = 210.0, 640.0  # edges of the bars
_STEP, _AIR = 14.0, 10.0  # of one bar, between rows
_COLOURS = {"a": "#0072b2", "b": "#d55e00", "c": "#8a5a9e"}  # the report's
_TEXT = 'font-family="system-ui, sans-serif" fill="#333"'

Result = Mapping[str, Any]


def picture(result: Result) -> str:
    """All charts of a result, one below the other; SVG."""
    charts = [chart for chart in _charts(result) if chart is not None]
    names = {"a": "unpruned", "b": "merged"} if result["kind"] == "networks" else {"a": "torch", "b": "updp"}
    title = result["network"]["name"]
    parts, y = [_legend(title, names)], 64.0
    for chart in charts:
        drawn, y = _draw(chart, y)
        parts += drawn
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {y:g}" role="img">',
        f"<title>{escape(title)}</title>", f'<rect width="{WIDTH:g}" height="{y:g}" fill="#fff"/>',
        *parts, "</svg>", "",
    ])  # fmt: skip


def _charts(result: Result) -> Iterator[RowChart | None]:
    if result["kind"] == "layers":
        yield _layer_chart(result)
        return
    for table in result["tables"]:
        threads = f"{table['threads']} thread{'s' if table['threads'] > 1 else ''}"
        yield row_chart(f"batch {table['batch']}, {threads}", "ms", list(_runtime_rows(table)), bars=True)


def _runtime_rows(table: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Sequence[Measured]]]:
    for runtime in dict.fromkeys(row["runtime"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["runtime"] == runtime and row["timing"] is not None]
        marks = [
            Measured(
                "a" if row["network"] == "unpruned" else "b", row["network"],
                row["timing"]["median_ms"], row["timing"]["low_ms"], row["timing"]["high_ms"],
            )
            for row in rows
        ]  # fmt: skip
        value = " → ".join(milliseconds(mark.value).removesuffix(" ms") for mark in marks)
        yield runtime, "", f"{value} ms", marks


def _layer_chart(result: Result) -> RowChart | None:
    """Speed of the best of torch and of ours, in each layer."""
    rows = []
    for layer in result["layers"]:
        marks = [Measured(style, who, layer[key]["gmacs"]) for style, who, key in
                 (("a", "torch", "torch"), ("b", "updp", "native")) if layer[key] is not None]  # fmt: skip
        value = " → ".join(f"{mark.value:.0f}" for mark in marks)
        rows.append((_short(layer["problem"]), layer["input"], value, marks))
    return row_chart("Layers", "GMAC/s", rows, bars=True)


def _short(problem: str) -> str:
    """A layer without its padding and what follows it: what fits beside a bar."""
    found = re.match(r"[\dx]+( stride [\dx]+)?", problem)
    groups = re.search(r" groups \d+", problem)
    return (found[0] if found else problem) + (groups[0] if groups else "")


def _legend(title: str, names: Mapping[str, str]) -> str:
    parts = [f'<text x="16" y="28" font-size="16" font-weight="600" {_TEXT}>{escape(title)}</text>']
    for place, (style, name) in enumerate(names.items()):
        x = 16 + 110 * place
        parts.append(f'<rect x="{x}" y="40" width="10" height="10" rx="2" fill="{_COLOURS[style]}"/>'
                     f'<text x="{x + 16}" y="49" font-size="12" {_TEXT}>{name}</text>')  # fmt: skip
    return "\n".join(parts)


def _draw(chart: RowChart, y: float) -> tuple[list[str], float]:
    """A chart from this height on, and where it ends."""
    parts = [f'<text x="16" y="{y + 16:g}" font-size="13" font-weight="600" {_TEXT}>{escape(chart.title)}</text>']
    y += 30
    top = y
    for row in chart.rows:
        height = _STEP * len(row.marks)
        middle = y + height / 2 + 4
        parts.append(f'<text x="{LEFT - 10:g}" y="{middle:g}" font-size="12" text-anchor="end" {_TEXT}>'
                     f"{escape(row.label)}</text>")  # fmt: skip
        for place, mark in enumerate(row.marks):
            parts.append(_bar(mark, y + _STEP * place))
        parts.append(f'<text x="{RIGHT + 10:g}" y="{middle:g}" font-size="12" {_TEXT}>{escape(row.value)}</text>')
        y += height + _AIR
    grid = []
    for tick in chart.ticks:
        x = _x(tick.at)
        grid.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4:g}" y2="{y:g}" stroke="#e8ebef"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{y + 14:g}" font-size="11" text-anchor="middle" {_TEXT}>{tick.label}</text>'
        )
    parts.append(f'<text x="16" y="{y + 14:g}" font-size="11" {_TEXT}>{escape(chart.axis)}</text>')
    return [*grid, *parts], y + 34


def _bar(mark: Mark, y: float) -> str:
    size = f'width="{_x(mark.at) - LEFT:.1f}" height="{_STEP - 4:g}"'
    bar = f'<rect x="{LEFT:g}" y="{y + 2:g}" {size} rx="2" fill="{_COLOURS[mark.style]}"/>'
    if mark.low is not None and mark.high is not None:
        low, high, middle = _x(mark.low), _x(mark.high), y + _STEP / 2
        bar += f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle:g}" y2="{middle:g}" stroke="#16191d"/>'
    return f"<g><title>{escape(mark.title)}</title>{bar}</g>"


def _x(percent: float) -> float:
    return LEFT + (RIGHT - LEFT) * percent / 100
