"""How far the stage in work is, as the run's log tells. A log may be cut short, or hold anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from updp.report.read import Record

LOG = "log.jsonl"
_ENDS = ("end", "interrupted", "error")


@dataclass(frozen=True)
class Progress:
    """The last start of a run, up to now.

    Attributes:
        begun, updated: times of its first and last line.
        by: its first line: host, pid, command and versions.
        ended: how it ended, ``end``, ``interrupted`` or ``error``; None where it was killed, or is at work.
        stage: the one in work; None where none is.
        title, done, total: what is being done, and how much of it.
        epoch: of a training, from 1.
        left: seconds until that is done, at the pace so far.
        top1s: accuracy by epoch of the stage in work, over all starts.
        last: the last note or error.
    """

    begun: str | None = None
    updated: str | None = None
    by: Record = field(default_factory=Record)
    ended: str | None = None
    stage: str | None = None
    title: str | None = None
    done: float | None = None
    total: float | None = None
    epoch: float | None = None
    left: float | None = None
    top1s: Mapping[float, float] = field(default_factory=dict)
    last: Record = field(default_factory=Record)

    @property
    def part(self) -> float | None:
        """How much of it is done, from 0 to 1."""
        return None if self.done is None or not self.total else min(1.0, max(0.0, self.done / self.total))


def read_progress(directory: Path) -> Progress:
    """What the log says; nothing where there is none."""
    progress, first = Progress(), Record()
    top1s: dict[str | None, dict[float, float]] = {}
    for line in _lines(directory / LOG):
        event, stage = line.text("event"), line.text("stage")
        progress = replace(progress, updated=line.text("time") or progress.updated)
        if event == "run":
            progress = Progress(begun=progress.updated, updated=progress.updated, by=line)
        elif event == "stage":
            progress, first = _nothing_done(progress, stage), Record()
        elif event == "start":
            progress, first = replace(_nothing_done(progress, stage), total=line.number("steps")), Record()
            progress = replace(progress, title=line.text("title"), done=0.0)
        elif event in ("step", "progress"):
            first = first if _is_same_work(first, line) else line
            progress = _advanced(progress, first, line)
        elif event == "epoch" and (epoch := line.number("epoch")) is not None:
            progress = replace(progress, epoch=epoch)
            if (top1 := line.number("top1")) is not None:
                top1s.setdefault(stage, {})[epoch] = top1
        elif event == "result":
            top1s.pop(stage, None)
            progress = _nothing_done(progress, None)
        if event in ("note", "error"):
            progress = replace(progress, last=line)
        progress = replace(progress, ended=event if event in _ENDS else None)
    return replace(progress, top1s=top1s.get(progress.stage, {}))


def _nothing_done(progress: Progress, stage: str | None) -> Progress:
    return replace(progress, stage=stage, title=None, done=None, total=None, epoch=None, left=None)


def _is_same_work(first: Record, line: Record) -> bool:
    """Whether a line goes on with what the first one began; a scoring may follow another."""
    begun, done = (each.number("step") or each.number("done") or 0.0 for each in (first, line))
    return bool(first) and first.text("title") == line.text("title") and done > begun


def _advanced(progress: Progress, first: Record, line: Record) -> Progress:
    """After a line that tells how much is done; ``first`` is the first one of the same work."""
    is_step = line.text("event") == "step"
    key = "step" if is_step else "done"
    done, total = line.number(key), progress.total if is_step else line.number("total")
    title = progress.title if is_step else line.text("title")
    before, start, now = first.number(key), first.number("elapsed"), line.number("elapsed")
    left = None
    if None not in (done, total, before, start, now) and done > before and now > start:  # type: ignore[operator]
        left = max(0.0, (total - done) * (now - start) / (done - before))  # type: ignore[operator]
    epoch = line.number("epoch") if is_step else progress.epoch
    return replace(progress, title=title, done=done, total=total, epoch=epoch, left=left)


def _lines(file: Path) -> Iterator[Record]:
    """The objects in the log; other lines are passed over."""
    try:
        content = file.read_bytes()
    except OSError:
        return
    for text in content.split(b"\n"):
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(data, dict):
            yield Record(data)
