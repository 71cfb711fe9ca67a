"""The log of a run: ``log.jsonl``, one JSON object a line for everything that happens.

Each line has ``time`` (UTC), ``elapsed`` (seconds since this start of the run, by a clock that never goes back) and
``event``: ``run``, ``stage``, ``start`` (of a training), ``step``, ``epoch``, ``progress`` (of other work), ``result``,
``note``; last ``end``, ``interrupted`` or ``error``. Where none of these three is there, the run was killed.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from updp import __version__
from updp.files import json_line
from updp.pipeline.program import command_line, is_first
from updp.pipeline.watch import Advance, Pace, Relay, Watch
from updp.report.progress import LOG


@contextmanager
def logged(directory: Path, stages: Sequence[str], watch: Watch) -> Iterator[Watch]:
    """A watch that keeps the log of a run and hands everything on; of several processes only the first has one.

    Args:
        stages: what is to be done.
    """
    if not is_first():
        yield watch
        return
    log = Log(directory / LOG, watch)
    try:
        log.begin(stages)
        yield log
        log.write("end")
    except KeyboardInterrupt as error:
        log.write("interrupted", by=str(error) or "Ctrl-C")
        raise
    except BaseException as error:
        log.write("error", text=str(error) or type(error).__name__, kind=type(error).__name__)
        raise
    finally:
        log.close()


class Log(Relay):
    """Writes what happens to a file, one line for each event.

    A line that a kill cut short stays behind as it is: the next one begins on a line of its own. A log that cannot be
    written is worth a note, not the run.
    """

    def __init__(self, file: Path, watch: Watch) -> None:
        super().__init__(watch)
        self._file, self._start, self._pace = file, time.monotonic(), Pace()
        self._stage: str | None = None
        self._descriptor: int | None = None
        self._whole = self._told = self._training = False

    def begin(self, stages: Sequence[str]) -> None:
        """The first line: who works with what."""
        self.write(
            "run", updp=__version__, torch=str(torch.__version__), python=platform.python_version(),
            host=socket.gethostname(), pid=os.getpid(), processes=int(os.environ.get("WORLD_SIZE", "1")),
            command=command_line(), stages=list(stages),
        )  # fmt: skip

    def write(self, event: str, **values: Any) -> None:
        """Append one line."""
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        elapsed = round(time.monotonic() - self._start, 3)
        stage = {} if self._stage is None else {"stage": self._stage}
        line = json_line({"time": stamp, "elapsed": elapsed, "event": event, **stage, **values}).encode()
        try:
            self._append(line)
        except OSError as error:
            self._whole = False
            if not self._told:
                self.watch.on_note(f"the log is not complete: {error.strerror or error}: {self._file}")
            self._told = True

    def _append(self, line: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if not self._whole:
            size = os.fstat(self._descriptor).st_size
            cut = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
            line = b"\n" + line if cut else line
        self._whole = os.write(self._descriptor, line) == len(line)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    # --- what happens ---

    def on_stage(self, stage: str, number: int, total: int) -> None:
        self._stage = stage
        self._pace.begin()
        self.write("stage", number=number, of=total)
        super().on_stage(stage, number, total)

    def on_result(self, stage: str, result: Mapping[str, Any], *, fresh: bool) -> None:
        if fresh:
            self._stage = stage
            self.write("result", **_figures(result))
            self._stage = None
        super().on_result(stage, result, fresh=fresh)

    def on_note(self, text: str) -> None:
        self.write("note", text=text)
        super().on_note(text)

    def on_start(self, total_steps: int, title: str) -> None:
        self._training = True
        self._pace.begin()
        self.write("start", title=title, steps=total_steps)
        super().on_start(total_steps, title)

    def on_step(self, state: dict[str, Any]) -> None:
        if self._pace.due():
            self.write("step", **state)
        super().on_step(state)

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.write("epoch", **record)
        super().on_epoch(record)

    def on_end(self) -> None:
        self._training = False
        super().on_end()

    @contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Advance]:
        with super().task(title, total) as advance:

            def both(done: int) -> None:
                if not self._training and self._pace.due():  # scoring after an epoch is part of the training
                    self.write("progress", title=title, done=done, total=total)
                advance(done)

            yield both


def _figures(result: Mapping[str, Any], depth: int = 1) -> dict[str, Any]:
    """The figures of a result without its lists, which the result's own file has."""
    plain = {key: value for key, value in result.items() if value is None or isinstance(value, int | float | str)}
    inner = {key: value for key, value in result.items() if depth and isinstance(value, Mapping)}
    return {**plain, **{key: _figures(value, depth - 1) for key, value in inner.items()}}
