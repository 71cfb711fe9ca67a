"""What the pipeline tells whoever watches it. This one is silent; the commands have one for terminals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int], None]
"""Called with how much is done so far."""

_OFTEN, _SELDOM = 1.0, 10.0  # seconds between two lines of progress


class Watch:
    """Hooks of a run, for one stage after the other. They do nothing here.

    The hooks ``on_start`` to ``on_end`` are those of `updp.train.Progress`.
    """

    def on_stage(self, stage: str, number: int, total: int) -> None:
        """A stage begins: the ``number``-th of ``total``, from 1."""

    def on_result(self, stage: str, result: Mapping[str, Any], *, fresh: bool) -> None:
        """A stage is finished: now (``fresh``), or it had been before."""

    def on_note(self, text: str) -> None:
        """Something the user should know."""

    def on_start(self, total_steps: int, title: str) -> None:
        """Training begins."""

    def on_step(self, state: dict[str, Any]) -> None:
        """A training step is done."""

    def on_epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done."""

    def on_end(self) -> None:
        """Training ended, well or not."""

    @contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Advance]:
        """Other long work, of so many units; its end is unknown where ``total`` is None."""
        yield lambda done: None


class Relay(Watch):
    """A watch that hands everything on to another."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_stage(self, stage: str, number: int, total: int) -> None:
        self.watch.on_stage(stage, number, total)

    def on_result(self, stage: str, result: Mapping[str, Any], *, fresh: bool) -> None:
        self.watch.on_result(stage, result, fresh=fresh)

    def on_note(self, text: str) -> None:
        self.watch.on_note(text)

    def on_start(self, total_steps: int, title: str) -> None:
        self.watch.on_start(total_steps, title)

    def on_step(self, state: dict[str, Any]) -> None:
        self.watch.on_step(state)

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.watch.on_epoch(record)

    def on_end(self) -> None:
        self.watch.on_end()

    @contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Advance]:
        with self.watch.task(title, total) as advance:
            yield advance


class Pace:
    """Says when it is time to write again: about once a second, less often the longer the work takes."""

    def __init__(self) -> None:
        self._start = self._last = -math.inf

    def begin(self) -> None:
        """New work: the next is due at once."""
        self._start, self._last = time.monotonic(), -math.inf

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < min(max(_OFTEN, (now - self._start) / 100), _SELDOM):
            return False
        self._last = now
        return True
