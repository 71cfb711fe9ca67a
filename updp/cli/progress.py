"""Progress of long work: bars with the time left in a terminal, plain lines where output is piped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from updp.cli.console import duration, line, percent
from updp.pipeline.watch import Advance, Watch


class _TimeLeft(ProgressColumn):
    """The time left, once there is something to estimate it from."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("" if left is None or task.finished else f"{duration(left)} left", style="cyan")


class ConsoleWatch(Watch):
    """Shows a run, or one long piece of work, on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks = 0
        self._training: Any = None
        self._steps = self._epochs = 0
        self._notes = ""
        self._stage = ""

    # --- stages ---

    def on_stage(self, stage: str, number: int, total: int) -> None:
        self._stage = f"{stage:<9}"
        if not self._console.is_terminal:
            line(self._console, f"{stage}: started ({number} of {total})")

    def on_result(self, stage: str, result: Mapping[str, Any], *, fresh: bool) -> None:
        took = duration(result.get("seconds")) if fresh else "finished before"
        text = Text.assemble(
            ("✓ ", "green"), (f"{stage:<9}", "bold"), f" {outcome(stage, result)}", (f"  {took}", "dim")
        )
        self._console.print(text, soft_wrap=True)

    def on_note(self, text: str) -> None:
        line(self._console, "  ", text, rest="dim")

    # --- training ---

    def on_start(self, total_steps: int, title: str) -> None:
        self._steps, self._notes = total_steps, ""
        self._training = self._add(title, total_steps)

    def on_step(self, state: dict[str, Any]) -> None:
        loss = state.get("loss")
        notes = f"epoch {state['epoch']}" + ("" if loss is None else f"  loss {loss:.3f}") + self._notes
        self._update(self._training, state["step"], notes)

    def on_epoch(self, record: dict[str, Any]) -> None:
        top1 = record.get("top1")
        self._notes = "" if top1 is None else f"  top-1 {percent(top1)}"
        if not self._console.is_terminal:
            losses = "  ".join(f"{k.removeprefix('train_')} {v:.4f}" for k, v in record.items() if "loss" in k)
            blend = f"  blend {record['blend']:.2f}" if "blend" in record else ""
            line(self._console, f"  epoch {record['epoch']:>3}  {losses}{blend}{self._notes}")

    def on_end(self) -> None:
        self._remove(self._training)

    # --- other work ---

    @contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Advance]:
        task = self._add(title, total)
        try:
            yield lambda done: self._update(task, done, "")
        finally:
            self._remove(task)

    # --- bars ---

    def _add(self, title: str, total: int | None) -> Any:
        if not self._console.is_terminal:
            return None
        if self._bars is None:
            self._bars = _bars(self._console)
            self._bars.start()
        self._tasks += 1
        return self._bars.add_task(title, total=total, notes="")

    def _update(self, task: Any, done: int, notes: str) -> None:
        if self._bars is not None and task is not None:
            self._bars.update(task, completed=done, notes=notes)

    def _remove(self, task: Any) -> None:
        if self._bars is None or task is None:
            return
        self._bars.remove_task(task)
        self._tasks -= 1
        if self._tasks == 0:
            self._bars.stop()
            self._bars = None


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(bar_width=26),
        TaskProgressColumn(),
        _TimeLeft(),
        TextColumn("[dim]{task.fields[notes]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def outcome(stage: str, result: Mapping[str, Any]) -> str:
    """What a stage came to, in one line."""
    if stage == "supernet":
        return f"all kept {percent(result['top1_keep'])}, all pruned {percent(result['top1_pruned'])}"
    if stage == "search":
        shared, unshared = (result["block_evaluations"][key] for key in ("shared", "unshared"))
        saved = f", {1 - shared / unshared:.0%} of their work shared" if unshared else ""
        return f"{percent(result['best']['top1'])} on held-out images  ({result['candidates_scored']} subnets{saved})"
    if stage == "damage":
        rows = sorted(result["rows"], key=lambda row: row["damage"])
        return f"{len(rows)} pairs of block and recipe, from {rows[0]['damage']:.3f} to {rows[-1]['damage']:.3g} nats"
    if stage == "calibrate":
        return f"{len(result['choices'])} blocks pruned, damage {result['damage']:.3f} nats"
    if stage == "merge":
        verdict = "holds" if result["certificate"]["ok"] else "FAILS"
        return f"{accuracy(result['top1'])}  (certificate {verdict})"
    epochs = result.get("epochs")
    how = "given weights" if result.get("weights") else f"{epochs} epoch{'s' if epochs != 1 else ''}"
    return f"{accuracy(result['top1'])}  ({how})"


def accuracy(top1: float | None) -> str:
    """An accuracy with its name, or why there is none."""
    return "no labels" if top1 is None else f"top-1 {percent(top1)}"
