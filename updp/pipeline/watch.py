"""What the pipeline tells whoever watches it. This one is silent; the commands have one for terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int], None]
"""Called with how much is done so far."""


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
