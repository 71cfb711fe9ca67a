"""The command ``status``: where runs stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from updp.cli.about import Json
from updp.cli.console import duration, guarded, line, out, percent, print_json, show_error, table
from updp.cli.progress import outcome
from updp.errors import InputError, Problem

if TYPE_CHECKING:
    from updp.pipeline import RunDirectory
    from updp.pipeline.lock import Holder
    from updp.report.progress import Progress

Directories = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of runs.")]
_STYLES = {"running": "green", "finished": "green", "failed": "red", "killed": "red", "stopped": "yellow"}
_ENDED = {"interrupted": "stopped", "error": "failed", "end": "waiting"}
_ACCURACIES = ("baseline", "finetune", "merge")  # stages whose result is the accuracy of a network


@dataclass(frozen=True)
class _Status:
    """A run as it is now: ``running``, ``finished``, ``failed``, ``stopped``, ``killed`` or ``waiting``."""

    run: RunDirectory
    state: str
    holder: Holder | None
    progress: Progress
    results: Mapping[str, Mapping[str, Any]]

    @property
    def stage(self) -> str | None:
        """The stage in work, or the next one."""
        return next((name for name in self.run.record.stages if name not in self.results), None)

    @property
    def is_begun(self) -> bool:
        """Whether the log tells of that stage."""
        return self.stage is not None and self.progress.stage == self.stage

    @property
    def best(self) -> tuple[float, str] | None:
        """The best accuracy so far, and of what it is."""
        tops = [(result["top1"], stage) for stage, result in self.results.items() if stage in _ACCURACIES]
        if self.is_begun:
            tops += [(top1, f"{self.stage}, epoch {epoch:g}") for epoch, top1 in self.progress.top1s.items()]
        return max((top for top in tops if top[0] is not None), default=None)


@guarded()
def status(directories: Directories, json: Json = False) -> None:
    """Show where runs stand: at work or not, the stage, time left, best accuracy so far.

    It changes nothing, and can be asked while a run is at work.
    """
    found: list[_Status] = []
    problems: list[Problem] = []
    for directory in directories:
        try:
            found.append(_status(directory))
        except InputError as error:
            problems += error.problems
    if json:
        print_json([_to_json(each) for each in found])
    else:
        for number, each in enumerate(found):
            _show(each, first=number == 0)
    if problems:
        show_error(InputError(problems))
        raise typer.Exit(InputError.exit_status)


def _status(directory: Path) -> _Status:
    """What a run's files say.

    Raises:
        InputError: it is no run, or its files are damaged.
    """
    from updp.pipeline import RunDirectory
    from updp.pipeline.lock import holder
    from updp.report.progress import read_progress

    held = holder(directory)  # first: a run that ends in between is then seen finished
    run = RunDirectory.open(directory)
    results = {stage: result for stage in run.record.stages if (result := run.result(stage)) is not None}
    progress = read_progress(directory)
    if len(results) == len(run.record.stages):
        state = "finished"
    elif held is not None:
        state = "running"
    elif not progress.by:
        state = "waiting"
    else:
        state = _ENDED.get(progress.ended or "", "killed")
    return _Status(run, state, held, progress, results)


# --- for programs ---


def _to_json(status: _Status) -> dict[str, Any]:
    record, progress, best = status.run.record, status.progress, status.best
    running = status.state == "running"
    return {
        "run": str(status.run.path), "spec": record.spec, "data": record.data, "state": status.state,
        "holder": None if status.holder is None else asdict(status.holder),
        "begun": progress.begun, "updated": progress.updated,
        "stage": status.stage,
        "work": None if not status.is_begun else {
            "title": progress.title, "done": progress.done, "total": progress.total, "epoch": progress.epoch,
            "seconds_left": progress.left if running else None,
        },
        "best": None if best is None else {"top1": best[0], "of": best[1]},
        "stages": [
            {"stage": stage, "finished": stage in status.results, "outcome": _outcome(status, stage),
             **{key: status.results.get(stage, {}).get(key) for key in ("top1", "seconds")}} for stage in record.stages
        ],
        "last": dict(progress.last.data) or None,
    }  # fmt: skip


def _outcome(status: _Status, stage: str) -> str | None:
    return outcome(stage, status.results[stage]) if stage in status.results else None


# --- for people ---


def _show(status: _Status, *, first: bool) -> None:
    from updp.cli.summary import how_much

    record = status.run.record
    if not first:
        out.print()
    line(out, str(status.run.path), f"  {record.spec} on {record.data}: prune {how_much(record)}", style="bold")
    state = Text.assemble((status.state, f"bold {_STYLES.get(status.state, '')}".strip()), _since(status))
    out.print(state, soft_wrap=True)
    out.print(_stages(status))
    if (best := status.best) is not None:
        line(out, "best so far  ", f"top-1 {percent(best[0])} ({best[1]})", style="dim")
    if text := status.progress.last.text("text"):
        line(out, f"last {status.progress.last.text('event'):<8}", text, style="dim")
    if status.state not in ("running", "finished") and (command := status.progress.by.text("command")):
        line(out, "to go on     ", command, style="dim")


def _since(status: _Status) -> str:
    """Who is at work, or when it ended."""
    if status.holder is not None and status.state == "running":
        return f": {status.holder}"
    if status.progress.updated is None:
        return ""
    return f"{'' if status.state == 'finished' else ', last seen at work'} {_moment(status.progress.updated)}"


def _moment(text: str) -> str:
    """A time of the log, for people; without its fractions."""
    return text.replace("T", " ").partition(".")[0] + " UTC"


def _stages(status: _Status) -> Table:
    shown = table("", "", "", "~")
    shown.show_header = False
    for stage in status.run.record.stages:
        if stage in status.results:
            took = duration(status.results[stage].get("seconds"))
            shown.add_row(Text("✓", "green"), Text(stage, "bold"), Text(took, "dim"), _outcome(status, stage))
        elif stage == status.stage and status.is_begun:
            mark = Text("▸", "cyan") if status.state == "running" else Text("·", "yellow")
            shown.add_row(mark, Text(stage, "bold"), _bar(status.progress.part), _position(status))
        else:
            shown.add_row("", Text(stage, "dim"), "", "")
    return shown


def _bar(part: float | None) -> ProgressBar | Text:
    """A bar in a terminal; nothing else needs one."""
    if part is None or not out.is_terminal:
        return Text("" if part is None else f"{part:.0%}")
    return ProgressBar(total=1.0, completed=part, width=16)


def _position(status: _Status) -> str:
    """``epoch 3, 120 of 540, 1:02 left``."""
    progress, parts = status.progress, []
    if progress.title not in (None, status.stage):
        parts.append(str(progress.title))
    if progress.epoch is not None:
        parts.append(f"epoch {progress.epoch:g}")
    if progress.done is not None and progress.total is not None:
        unit = "step " if progress.epoch is not None else ""
        parts.append(f"{unit}{progress.done:g} of {progress.total:g}")
    if progress.left is not None and status.state == "running":
        parts.append(f"{duration(progress.left)} left")
    return ", ".join(parts) or "begun"
