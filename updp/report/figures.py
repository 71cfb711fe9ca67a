"""Which charts the page has, and from which keys of the results they are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from updp.report import words
from updp.report.charts import LineChart, Measured, Point, RowChart, Series, line_chart, row_chart
from updp.report.read import Record, Run
from updp.subnet import KEEP

BASELINE, MERGED = "baseline", "merged"  # names of latency rows


def curve(history: Iterable[Record], x: str, y: str) -> list[Point]:
    """The points of a history that have both numbers."""
    pairs = ((entry.number(x), entry.number(y)) for entry in history)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def training_charts(run: Run) -> list[LineChart]:
    """The losses of the training stages, the accuracies, and the blend over finetuning."""
    baseline, supernet, finetune = (
        run.stage(stage).records("history") for stage in ("baseline", "supernet", "finetune")
    )
    sandwich = [
        Series("all kept", "a", curve(supernet, "epoch", "loss_keep")),
        Series("random", "c", curve(supernet, "epoch", "loss_random")),
        Series("all pruned", "b", curve(supernet, "epoch", "loss_pruned")),
    ]
    loss, accuracy, blend = "loss", "top-1 (%)", "blend"
    levels = [(f"baseline {words.percent(top1)}", top1) for top1 in [run.stage("baseline").number("top1")] if top1]

    def epochs(title: str, axis: str, series: list[Series], **more: Iterable[tuple[str, float]]) -> LineChart | None:
        return line_chart(title, "epoch", axis, series, y_range=(0.0, 1.0) if axis == blend else None, **more)

    charts = (
        epochs("Baseline: training loss", loss, [Series(loss, "a", curve(baseline, "epoch", "train_loss"))]),
        epochs("Supernet: training loss", loss, sandwich),
        epochs("Finetune: training loss", loss, [Series(loss, "b", curve(finetune, "epoch", "train_loss"))]),
        epochs("Baseline: accuracy", accuracy, [Series("top-1", "a", curve(baseline, "epoch", "top1"))]),
        epochs("Finetune: accuracy", accuracy, [Series("top-1", "b", curve(finetune, "epoch", "top1"))], levels=levels),
        epochs("Finetune: blend", blend, [Series(blend, "c", curve(finetune, "epoch", "blend"))]),
    )
    return [chart for chart in charts if chart is not None]


def search_chart(run: Run) -> LineChart | None:
    """The best and the mean accuracy of the population, generation by generation."""
    history = run.stage("search").records("history")
    series = [
        Series("best", "b", curve(history, "generation", "best")),
        Series("mean of the new", "a", curve(history, "generation", "mean")),
    ]
    return line_chart("Search progress", "generation", "top-1 (%)", series)


def accuracy_chart(run: Run) -> RowChart | None:
    """The accuracies that the stages ended with."""
    supernet, merge = run.stage("supernet"), run.stage("merge")
    accuracies = (
        ("Baseline", "", "a", run.stage("baseline").number("top1")),
        ("Supernet, all kept", "", "a", supernet.number("top1_keep")),
        ("Supernet, all pruned", "", "b", supernet.number("top1_pruned")),
        ("Search, best subnet", "held-out images", "c", run.stage("search").record("best").number("top1")),
        ("Finetuned", "", "b", run.stage("finetune").number("top1")),
        ("Before merging", "", "b", merge.number("top1_unmerged")),
        ("Merged", "", "b", merge.number("top1")),
    )
    rows = (
        (label, note, words.percent(top1), [Measured(style, "top-1 in %", top1)])
        for label, note, style, top1 in accuracies
        if top1 is not None
    )
    return row_chart("Accuracy after each stage", "top-1 (%)", rows, bars=False)


def network_latency(run: Run) -> Mapping[str, Record]:
    """The latency rows of whole networks, by name."""
    rows = run.stage("merge").record("latency").records("rows")
    return {name: row for row in rows if (name := row.text("name")) is not None}


def latency_chart(run: Run) -> RowChart | None:
    """Medians of whole networks with their quartiles."""
    rows = (
        (name, "", words.milliseconds(row.number("median_ms")), _measured(row, "a" if name == BASELINE else "b", name))
        for name, row in network_latency(run).items()
    )
    return row_chart("Whole network", "ms", rows, bars=True)


def block_latency_chart(run: Run) -> RowChart | None:
    """Medians of each block before and after, with their quartiles."""
    rows = []
    for entry in run.stage("merge").records("block_latency"):
        choice = entry.text("choice")
        marks = _measured(entry.record("before"), "a", "before")
        if choice != KEEP:  # a kept block is the same before and after
            marks += _measured(entry.record("after"), "b", "after")
        value = " → ".join(words.milliseconds(mark.value) for mark in marks)
        rows.append((entry.text("block") or "?", "kept" if choice == KEEP else choice or "", value, marks))
    return row_chart("Block by block", "ms", rows, bars=True)


def step_chart(run: Run) -> RowChart | None:
    """What one training step costs, of each kind: medians with their quartiles, and the memory."""
    rows = (
        (
            row.text("name") or "?",
            f"{words.quantity(row.number('memory'))}B",
            words.milliseconds(row.number("median_ms")),
            _measured(row, "a" if row.text("name") == BASELINE else "b", "one step"),
        )
        for row in run.stage("merge").record("training").records("rows")
    )
    return row_chart("One step", "ms", rows, bars=True)


def _measured(row: Record, style: str, label: str) -> list[Measured]:
    median = row.number("median_ms")
    return [] if median is None else [Measured(style, label, median, row.number("low_ms"), row.number("high_ms"))]
