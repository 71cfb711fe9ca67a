"""What TensorBoard shows of a run: losses, rates and accuracies, in ``tensorboard/`` in its directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from updp.errors import InputError
from updp.pipeline.program import is_first
from updp.pipeline.watch import Pace, Relay, Watch

FOLDER = "tensorboard"
OPTION = "--tensorboard"


def check_tensorboard() -> None:
    """Find out before long work.

    Raises:
        InputError: TensorBoard is not installed.
    """
    if find_spec("tensorboard") is None:
        raise InputError(f"{OPTION}: tensorboard is not installed (pip install 'updp[tensorboard]')")


@contextmanager
def with_scalars(directory: Path, watch: Watch) -> Iterator[Watch]:
    """A watch that writes for TensorBoard and hands everything on; of several processes only the first writes.

    Raises:
        InputError: TensorBoard is not installed, or the directory cannot be written.
    """
    check_tensorboard()
    if not is_first():
        yield watch
        return
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(str(directory / FOLDER))
    except OSError as error:
        raise InputError(f"{directory / FOLDER}: cannot be written: {error.strerror or error}") from None
    scalars = Scalars(writer, watch)
    try:
        yield scalars
    finally:
        scalars.close()


class Scalars(Relay):
    """Writes the numbers of steps, epochs and results. A full disk is worth a note, not the run.

    Args:
        writer: torch's ``SummaryWriter``, or what has its ``add_scalar`` and ``close``.
    """

    def __init__(self, writer: Any, watch: Watch) -> None:
        super().__init__(watch)
        self._writer, self._pace = writer, Pace()
        self._stage, self._step = "", 0

    def close(self) -> None:
        self._call("close")

    def _add(self, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._call("add_scalar", f"{self._stage}/{name}", value, step)

    def _call(self, method: str, *args: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*args)
        except OSError as error:
            self._writer = None
            self.watch.on_note(f"no more for TensorBoard: {error.strerror or error}")

    def on_stage(self, stage: str, number: int, total: int) -> None:
        self._stage, self._step = stage, 0
        super().on_stage(stage, number, total)

    def on_start(self, total_steps: int, title: str) -> None:
        self._pace.begin()
        super().on_start(total_steps, title)

    def on_step(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        if self._pace.due():
            self._add({key: state.get(key) for key in ("loss", "lr")}, self._step)
        super().on_step(state)

    def on_epoch(self, record: dict[str, Any]) -> None:
        self._add({f"epoch_{key}": value for key, value in record.items() if key not in ("epoch", "lr")}, self._step)
        super().on_epoch(record)

    def on_result(self, stage: str, result: Mapping[str, Any], *, fresh: bool) -> None:
        if fresh:
            self._add({key: value for key, value in result.items() if "top" in key or key == "damage"}, self._step)
        super().on_result(stage, result, fresh=fresh)
