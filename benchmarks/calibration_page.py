"""The table and the picture of a comparison that `calibration.py` made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from updp.files import write_text
from updp.report.charts import nice_ticks, tick_labels

METHODS = {
    "full": ("full method", "#1a5fb4", "circle"),
    "linear": ("least squares alone", "#2a9d5c", "square"),
    "drop": ("block dropped", "#c64600", "diamond"),
    "removal": ("activations removed, nothing solved", "#7d5fa3", "triangle"),
}
"""Method -> its name, colour and mark; the order of work: the first chooses the blocks."""

Result = Mapping[str, Any]
Point = tuple[float, float]


def write_pages(result: Result, file: Path) -> None:
    """Write the table and, once latencies are known, the picture beside a result."""
    write_text(file.with_suffix(".md"), page(result, file.stem))
    if "latency" in result:
        write_text(file.with_suffix(".svg"), picture(result))


def curve(result: Result, method: str) -> list[Point]:
    """(latency ratio, top-1) of a method, the baseline's first, then with more and more blocks."""
    rows = [result["points"][k]["rows"].get(method, {}) for k in sorted(result["points"], key=int)]
    return [(1.0, result["baseline"]["top1"]), *((r["latency"]["ratio"], r["top1"]) for r in rows if "latency" in r)]


def top1_at(points: Sequence[Point], ratio: float) -> float | None:
    """The top-1 of a curve at a latency, on straight lines between its points; None where it does not reach."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= ratio <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (ratio - x0) / (x1 - x0)
    return None


# --- the table ---


def page(result: Result, name: str) -> str:
    """The whole page, in Markdown."""
    told, baseline = result["identity"], result["baseline"]
    half = "" if told["half"] == "all" else f", the {told['half']}-numbered half"
    lines = [
        f"# {told['spec']}: pruning without training, four ways", "",
        f"Calibrated on {told['images']} images of `{told['data']}`, without labels; top-1 on {baseline['images']:,} "
        f"images of `{told['judge']}`{half}, to which nothing was fitted. Baseline: {baseline['top1']:.2f} %, "
        f"{baseline['macs'] / 1e6:.1f} M multiply-accumulates, depth {baseline['depth']}. The rows of one K prune the "
        "same K blocks, those that `updp calibrate` chose.", "",
        *_table(["K", "method", "top-1", "against the baseline", "latency ratio", "MACs", "depth", "seconds"],
                list(_rows(result))), "",
    ]  # fmt: skip
    if "latency" in result:
        lines += [f"![{told['spec']}: top-1 over latency]({name}.svg)", "", *_at_equal_latency(result), ""]
    return "\n".join([*lines, *_notes(result), ""])


def _rows(result: Result) -> list[list[str]]:
    lines = []
    for k in sorted(result["points"], key=int):
        for method, (title, *_) in METHODS.items():
            row = result["points"][k]["rows"].get(method)
            if row is not None and "top1" not in row:
                lines.append([k, title, row["note"], *[""] * 5])
            elif row is not None:
                time = row.get("latency")
                ratio = f"{time['ratio']:.3f} ({time['low']:.3f} to {time['high']:.3f})" if time else ""
                lines.append([
                    k, title + (" ¹" if row.get("note") else ""), f"{row['top1']:.2f} %",
                    f"{row['difference']:+.2f} ± {row['standard_error']:.2f}", ratio, f"{row['macs'] / 1e6:.1f} M",
                    str(row["depth"]), f"{row['seconds']:.1f}",
                ])  # fmt: skip
    return lines


def _at_equal_latency(result: Result) -> list[str]:
    """Every method at the latency of the full method's networks."""
    lines = []
    for k in sorted(result["points"], key=int):
        time = result["points"][k]["rows"].get("full", {}).get("latency")
        if time:
            found = [top1_at(curve(result, method), time["ratio"]) for method in METHODS]
            lines.append([k, f"{time['ratio']:.3f}", *("–" if v is None else f"{v:.2f} %" for v in found)])
    titles = [title for title, *_ in METHODS.values()]
    return [
        "At equal latency: top-1 of each method at the latency that the full method has with K blocks, on straight "
        "lines between the points of its curve, which begins at the baseline (–: the curve does not reach it). Where a "
        "curve bends downwards, the line lies below it.", "",
        *_table(["K", "latency ratio", *titles], lines),
    ]  # fmt: skip


def _notes(result: Result) -> list[str]:
    notes = [
        "- *against the baseline*: points of top-1 ± one standard error of the difference, paired over the images.",
        "- *latency ratio*: of the medians, batch 1, to the baseline in the same run, all networks in turns; quartiles "
        "of the ratio within a round. Networks of one architecture are measured once.",
        "- *seconds*: to make the network, beyond the table of damages that blocks are chosen by"
        + (f" ({result['damage_seconds']:.0f} s, once)." if "damage_seconds" in result else "."),
        "- *full method*: what `updp calibrate` does. *least squares alone*: the same blocks, solved one behind the "
        "other on the pruned network's inputs, nothing else. *activations removed, nothing solved*: the recipe, merged "
        "as it is. *block dropped*: without its residual branch.",
    ]
    seen = {row["note"] for point in result["points"].values() for row in point["rows"].values() if row.get("note")}
    notes += [f"- ¹ {note}" for note in sorted(seen) if not note.startswith("not possible")]
    env = result["latency"]["environment"] if "latency" in result else result.get("environment")
    if env:
        rounds = f", {result['latency']['rounds']} rounds" if "latency" in result else ""
        threads = f"{env['threads']} thread{'s' if env['threads'] != 1 else ''}"
        versions = f"updp {env['updp']}, torch {env['torch']}, timm {env['timm']}, Python {env['python']}"
        notes.append(f"- {env['cpu']}, {threads}{rounds}; {versions}.")
    return notes


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rules = ["---" if name in ("method",) else "---:" for name in header]
    return [f"| {' | '.join(line)} |" for line in (header, rules, *lines)]


# --- the picture ---

WIDTH, HEIGHT = 760.0, 440.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 736.0, 64.0, 388.0
_TEXT = 'font-family="system-ui, sans-serif" fill="#333"'


def picture(result: Result) -> str:
    """Latency ratio across, top-1 upwards, a line for each method, the baseline marked; SVG."""
    curves = {method: points for method in METHODS if len(points := curve(result, method)) > 1}
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs), 6), nice_ticks(min(ys), max(ys), 6)
    frame = (x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    title = f"{result['identity']['spec']}: pruned without training"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH:g}" height="{HEIGHT:g}" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="16" font-weight="600" {_TEXT}>{escape(title)}</text>',
        *_axes(frame, x_ticks, y_ticks, result["baseline"]["top1"]),
        *(_line(result, method, points, frame) for method, points in reversed(curves.items())),
        *_legend(list(curves)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _place(frame: tuple[float, ...], x: float, y: float) -> Point:
    across, up = (x - frame[0]) / (frame[1] - frame[0]), (y - frame[2]) / (frame[3] - frame[2])
    return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)


def _axes(frame: tuple[float, ...], xs: Sequence[float], ys: Sequence[float], baseline: float) -> list[str]:
    parts = []
    for value, label in zip(xs, tick_labels(xs), strict=True):
        x, _ = _place(frame, value, ys[0])
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" font-size="12" text-anchor="middle" {_TEXT}>{label}</text>')
    for value, label in zip(ys, tick_labels(ys), strict=True):
        _, y = _place(frame, xs[0], value)
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" font-size="12" text-anchor="end" {_TEXT}>{label}</text>')
    middle, (x, y) = (LEFT + RIGHT) / 2, _place(frame, 1.0, baseline)
    parts += [
        f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#888" stroke-dasharray="4 4"/>',
        f'<text x="{LEFT + 6}" y="{y - 6:.1f}" font-size="12" {_TEXT}>baseline {baseline:.2f} %</text>',
        f'<text x="{middle}" y="{BOTTOM + 40}" font-size="13" text-anchor="middle" {_TEXT}>'
        "latency, batch 1 (baseline = 1; further left is faster)</text>",
        f'<text x="18" y="{(TOP + BOTTOM) / 2}" font-size="13" text-anchor="middle" {_TEXT} '
        f'transform="rotate(-90 18 {(TOP + BOTTOM) / 2})">top-1, %</text>',
    ]
    return parts


def _line(result: Result, method: str, points: Sequence[Point], frame: tuple[float, ...]) -> str:
    title, colour, mark = METHODS[method]
    placed = [_place(frame, x, y) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    ks = [k for k in sorted(result["points"], key=int) if "latency" in result["points"][k]["rows"].get(method, {})]
    parts = [f'<g><path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-opacity="0.85"/>']
    for k, (x, y), (ratio, top1) in zip(ks, placed[1:], points[1:], strict=True):
        tip = f"{title}, K={k}: {top1:.2f} % at {ratio:.3f}"
        parts.append(f"<g>{_mark(mark, x, y, colour)}<title>{escape(tip)}</title></g>")
        if below := {"full": -10, "drop": 20}.get(method):  # the two whose latencies differ
            text = f'font-size="12" text-anchor="middle" {_TEXT}>K={k}'
            parts.append(f'<text x="{x:.1f}" y="{y + below:.1f}" {text}</text>')
    x, y = placed[0]
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="#fff" stroke="#333" stroke-width="2"/></g>')
    return "".join(parts)


def _mark(mark: str, x: float, y: float, colour: str) -> str:
    style = f'fill="{colour}" stroke="#fff" stroke-width="1"'
    corners = {
        "square": [(-5, -5), (5, -5), (5, 5), (-5, 5)],
        "diamond": [(0, -7), (7, 0), (0, 7), (-7, 0)],
        "triangle": [(0, -7), (6, 5), (-6, 5)],
    }.get(mark)
    if corners is None:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" {style}/>'
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}" {style}/>'


def _legend(methods: Sequence[str]) -> list[str]:
    parts, x = [], LEFT
    for method in methods:
        title, colour, mark = METHODS[method]
        parts.append(_mark(mark, x + 6, 43, colour))
        parts.append(f'<text x="{x + 18}" y="47" font-size="13" {_TEXT}>{escape(title)}</text>')
        x += 40 + 6.6 * len(title)
    return parts
