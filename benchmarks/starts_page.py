"""The table and the picture of what `starts.py` found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from updp.files import write_text

PARTS = {"0": "0 %", "0.01": "1 %", "0.05": "5 %", "0.2": "20 %", "1": "100 %"}
"""Points of a row -> what they are called: parts of the optimizer steps of finetuning."""
STYLES = {
    "papers": ("#c64600", "o"),
    "papers, direct": ("#e5a50a", "D"),
    "calibrated": ("#7d5fa3", "^"),
    "calibrated, direct": ("#1a5fb4", "s"),
}
"""Start -> colour and mark, in the order in which they are shown."""

Rows = Sequence[Mapping[str, Any]]


def write_pages(result: Mapping[str, Any], out: Path) -> None:
    """Write OUT.md, OUT.svg and OUT.png."""
    write_text(out.with_suffix(".md"), page(result, out.stem))
    mpl.rcParams["svg.hashsalt"] = out.stem  # the same file from the same results
    figure = picture(result["rows"])
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(out.with_suffix(".png"), dpi=110)


def groups(rows: Rows) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows by network and recipe."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["network"], row["recipe"]), []).append(row)
    return found


def of(rows: Rows, start: str) -> list[Mapping[str, Any]]:
    """The rows of one start."""
    return [row for row in rows if row["start"] == start]


# --- the table ---


def page(result: Mapping[str, Any], name: str) -> str:
    """The whole page, in Markdown."""
    env = result["environment"]
    lines = [
        "# Two ways to begin finetuning a pruned network", "",
        "Top-1 on the validation digits after a part of finetuning: mean over the seeds, lowest and highest in "
        "brackets. In a seed, all starts have the same trained baseline, the same half of the blocks, drawn at "
        "random, and the same settings. Scored is a copy of the network, brought to blend 1, its norms estimated "
        "anew: what one would have on stopping there. One validation image is 0.28 points.", "",
        f"![accuracy over the part of finetuning]({name}.svg)", "",
    ]  # fmt: skip
    for (network, recipe), rows in groups(result["rows"]).items():
        baselines = {row["seed"]: row["baseline"] for row in rows}
        count = len(rows[0]["blocks"])
        seeds = ", ".join(map(str, sorted(baselines)))
        lines += [
            f"## {network}, {count} blocks under `{recipe}`", "",
            f"Baseline {spread(list(baselines.values()))}; seeds {seeds}.", "",
            "| start | " + " | ".join(PARTS.values()) + " | seconds to solve |", "|---" * (len(PARTS) + 2) + "|",
        ]  # fmt: skip
        for start in STYLES:
            if here := of(rows, start):
                cells = [spread([row["points"][part] for row in here]) for part in PARTS]
                seconds = f"{statistics.mean(row['solve_seconds'] for row in here):.0f}"
                lines.append(f"| {start} | {' | '.join(cells)} | {seconds if start.startswith('cal') else ''} |")
        lines.append("")
    device = ", ".join(str(env[key]) for key in ("cpu", "device_name", "name") if env.get(key))
    lines.append(
        f"`python benchmarks/starts.py`; one thread; torch {env.get('torch')}{', ' + device if device else ''}."
    )
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean, and from where to where."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


# --- the picture ---


def picture(rows: Rows) -> Figure:
    """A panel for each network: means, with a band from the lowest to the highest seed."""
    found = groups(rows)
    figure = Figure(figsize=(5.2 * len(found), 3.9), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    places = range(len(PARTS))
    for panel, ((network, recipe), here) in zip(panels, found.items(), strict=True):
        baseline = statistics.mean({row["seed"]: row["baseline"] for row in here}.values())
        panel.axhline(baseline, color="#888888", linewidth=1, linestyle=":", label="baseline")
        for start, (colour, mark) in STYLES.items():
            if not (mine := of(here, start)):
                continue
            values = [[row["points"][part] for row in mine] for part in PARTS]
            panel.fill_between(places, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0)
            panel.plot(places, list(map(statistics.mean, values)), color=colour, marker=mark, markersize=5, label=start)
        panel.set_title(f"{network}, {len(here[0]['blocks'])} blocks under {recipe}", fontsize=10)
        panel.set_xticks(list(places), list(PARTS.values()))
        panel.set_xlabel("part of finetuning")
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1, % (band: lowest to highest seed)")
    panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure
