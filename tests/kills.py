"""A run in a process of its own that is killed, as `kill -9` does it, at a moment that is told."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

STEPS = 3
"""A training's state is kept behind so many steps."""


@dataclass(frozen=True)
class Moment:
    """Where in a run: at the ``count``-th of the events of a kind.

    Attributes:
        stage: in this stage.
        event: ``step`` of a training, ``advance`` of other long work, or ``rename``, just before a file that was
            written takes its place.
    """

    stage: str
    event: str
    count: int = 1


def run_in_process(request: Mapping[str, Any], moment: Moment | None) -> int:
    """Begin or continue a run; killed at the moment. The exit status of its process, -9 where it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["updp.cli", "updp.pipeline.run", "updp.pipeline.prepare"])
    process = context.Process(target=_work, args=(dict(request), moment))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
    return process.exitcode if process.exitcode is not None else 1


def _work(request: dict[str, Any], moment: Moment | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from updp import files
    from updp.pipeline import finish
    from updp.pipeline.prepare import Request, prepare
    from updp.pipeline.run import run
    from updp.train import Every

    finish.find_spec = lambda name: None  # type: ignore[assignment, attr-defined]  # no ONNX file
    finish._NETWORK_SECONDS, finish._BLOCK_SECONDS, finish._TRAINING_SECONDS = 0.01, 0.001, 0.01
    watch = _killing_watch(moment)
    files.os = _Renames(watch.happened)  # type: ignore[assignment, attr-defined]
    run(prepare(Request(**request)), watch=watch, every=Every(None, STEPS))


class _Renames:
    """The module ``os`` to ``updp.files``, with an ear on renames."""

    def __init__(self, happened: Callable[[str], None]) -> None:
        self._happened = happened

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def replace(self, source: Any, target: Any) -> None:
        self._happened("rename")
        os.replace(source, target)


def _killing_watch(moment: Moment | None) -> Any:
    from updp.pipeline.watch import Advance, Watch

    class Killing(Watch):
        stage, events = "", 0

        def on_stage(self, stage: str, number: int, total: int) -> None:
            self.stage = stage

        def happened(self, event: str) -> None:
            if moment is not None and (self.stage, event) == (moment.stage, moment.event):
                self.events += 1
                if self.events == moment.count:
                    os.kill(os.getpid(), signal.SIGKILL)

        def on_step(self, state: dict[str, Any]) -> None:
            self.happened("step")

        @contextmanager
        def task(self, title: str, total: int | None) -> Iterator[Advance]:
            yield lambda done: self.happened("advance")

    return Killing()


# --- what a run came to ---

_TIMES = ("seconds", "latency", "block_latency", "training")


def outcome(directory: Path) -> dict[str, Any]:
    """All bits of a run that do not depend on time: tensors, subnet, scores, results."""
    found: dict[str, Any] = {}
    for file in sorted(directory.rglob("*.safetensors")):
        tensors = load_file(file)
        found[str(file.relative_to(directory))] = {name: t.numpy().tobytes() for name, t in tensors.items()}
    for file in sorted(directory.rglob("result.json")):
        found[str(file.relative_to(directory))] = _timeless(json.loads(file.read_text(encoding="utf-8")))
    for name in ("subnet.json", "scores.jsonl"):
        found[name] = (directory / "search" / name).read_bytes()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def leftovers(directory: Path) -> list[str]:
    """Files that a finished run should not have."""
    return [str(f) for f in directory.rglob("*") if f.name.endswith(".tmp") or "checkpoints" in f.parts]
