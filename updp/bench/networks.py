"""Networks in every runtime, unpruned and merged, in one run: first whether they compute the same, then how fast."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from updp import ops
from updp.artefact import inspect, load
from updp.bench.runtimes import INSTALL, RUNTIMES, Run, Runtime, Subject, rest, settled
from updp.certificate import relative
from updp.deployment.trial import Memory
from updp.errors import InputError, UpdpError, suggest
from updp.measure import Speedup, Timing, compare, environment, speedup
from updp.merging import assemble, merge_blocks
from updp.oracle import count
from updp.pipeline.single import pruned_network
from updp.pipeline.watch import Watch
from updp.randomize import randomize, settle
from updp.spec import ArchSpec, load_spec
from updp.structure import create_model

VERSION = 1
UNPRUNED, MERGED = "unpruned", "merged"
OK, WRONG, FAILED = "ok", "wrong", "failed"
_LEAST = 6  # rounds
_CALLS = 2  # timed calls in a turn
_WAKING = 0.1  # seconds of calls before those
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Case:
    """A network to be timed, as it was and as it is merged.

    Attributes:
        name: of a file of results.
        subnet: which blocks were pruned; None where none were.
        subjects: "unpruned" and "merged"; without a subnet only the first.
    """

    name: str
    spec: str
    subnet: str | None
    weights: str
    input: tuple[int, int, int]
    subjects: Mapping[str, Subject]

    def to_json(self) -> dict[str, Any]:
        counts = {name: count(subject.module, self.input) for name, subject in self.subjects.items()}
        return {
            "name": self.name, "spec": self.spec, "subnet": self.subnet, "weights": self.weights,
            "input": list(self.input),
            "macs": {name: each.macs for name, each in counts.items()},
            "params": {name: each.params for name, each in counts.items()},
        }  # fmt: skip


@contextmanager
def opened(target: str, subnet: str | None) -> Iterator[Case]:
    """The networks that a target names; their files are deleted in the end.

    Args:
        target: a saved merged network, or a spec, whose values are random.
        subnet: of a spec: see `pruned_network`.

    Raises:
        InputError: there is no such network, or no such subnet of it.
    """
    case = _saved(Path(target), subnet) if Path(target).suffix == _SUFFIX else _random(target, subnet)
    try:
        yield case
    finally:
        for subject in case.subjects.values():
            subject.close()


def _saved(path: Path, subnet: str | None) -> Case:
    if subnet is not None:
        raise InputError(f"--subnet: {path} is merged already; allowed with a spec")
    header = inspect(path)
    unpruned = _unpruned(header.spec, header.num_classes or None)
    subjects = {UNPRUNED: unpruned, MERGED: Subject(load(path), header.spec.input)}
    return Case(path.stem, header.spec.name, "saved", str(path.name), header.spec.input, subjects)


def _random(name: str, subnet: str | None) -> Case:
    spec = load_spec(name)
    if subnet is None:
        return Case(spec.name, spec.name, None, "random", spec.input, {UNPRUNED: _unpruned(spec, None)})
    supernet = pruned_network(spec, subnet)
    merged = Subject(assemble(supernet, merge_blocks(supernet)), spec.input)
    short = Path(subnet).stem.replace(":", "_")
    subjects = {UNPRUNED: _unpruned(spec, None), MERGED: merged}
    return Case(f"{spec.name}-{short}", spec.name, subnet, "random", spec.input, subjects)


def _unpruned(spec: ArchSpec, classes: int | None) -> Subject:
    """The network of a spec with random values; how long it takes does not depend on them."""
    model = create_model(spec, num_classes=classes, seed=0).eval()
    torch.manual_seed(0)
    randomize(model, 0)
    settle(model, lambda: model(torch.randn(2, *spec.input)))
    return Subject(model, spec.input)


# --- timing ---


@dataclass
class Row:
    """One network in one runtime: its largest difference from torch, and how long a batch takes if it is right."""

    runtime: Runtime
    network: str
    status: str
    error: float | None = None
    reason: str = ""
    run: Run | None = None
    timing: Timing | None = None
    memory: Memory | None = None

    @property
    def key(self) -> str:
        return f"{self.runtime.name} {self.network}"

    def to_json(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime.name, "network": self.network, "precision": self.runtime.precision,
            "status": self.status, "error": self.error, "reason": self.reason,
            "timing": None if self.timing is None else self.timing.to_dict(),
            "memory": None if self.memory is None else asdict(self.memory),
        }  # fmt: skip


def bench(
    case: Case, runtimes: Sequence[Runtime], batches: Sequence[int], threads: Sequence[int], seconds: float,
    watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Time the networks of a case in these runtimes; plain JSON.

    Args:
        seconds: roughly, of timing for each batch size and number of threads; every runtime has some rounds at least.
    """
    watch = watch or Watch()
    found = [each for each in runtimes if each.missing() is None]
    tables = [_table(case, found, batch, number, seconds, watch) for number in threads for batch in batches]
    return {
        "version": VERSION, "kind": "networks", "environment": surroundings(found), "network": case.to_json(),
        "seconds": seconds,
        "missing": [
            {"runtime": each.name, "packages": each.missing(), "install": INSTALL}
            for each in runtimes if each.missing() is not None
        ],
        "tables": tables,
    }  # fmt: skip


def surroundings(runtimes: Sequence[Runtime] = ()) -> dict[str, Any]:
    """What timings here depend on, threads aside."""
    found = environment()
    found.pop("threads")
    versions = {name: version for each in runtimes for name, version in each.versions().items()}
    return {
        **found, "cpus": available_cpus(), "isa": [name for name, there in ops.cpu_features().items() if there],
        "native": ops.native_status(), "load": round(os.getloadavg()[0], 2), "packages": versions,
    }  # fmt: skip


def available_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_runtimes(names: Sequence[str]) -> list[Runtime]:
    """The runtimes of these names.

    Raises:
        InputError: one of them is unknown.
    """
    for name in names:
        if name not in RUNTIMES:
            raise InputError(f"--runtimes: {suggest(name, RUNTIMES)}")
    return [RUNTIMES[name] for name in dict.fromkeys(names)]


def _table(
    case: Case, runtimes: Sequence[Runtime], batch: int, threads: int, seconds: float, watch: Watch
) -> dict[str, Any]:
    x = torch.randn(batch, *case.input, generator=torch.Generator().manual_seed(1))
    title = f"{case.name}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
    with settled(threads):
        rows = _prepared(case, runtimes, x, threads, watch, title)
        right = {row.key: row for row in rows if row.status == OK}
        if right:
            watch.on_note(f"{title}: timing")
            timings = _timed({key: row.run for key, row in right.items() if row.run is not None}, seconds, threads)
            for key, timing in timings.items():
                right[key].timing = timing
        for row in rows:
            row.run = None
    return {
        "batch": batch, "threads": threads, "rows": [row.to_json() for row in rows], "merging": _merging(rows),
        "against": [each for network in case.subjects for each in _against(rows, network)],
    }  # fmt: skip


def _prepared(case: Case, runtimes: Sequence[Runtime], x: Tensor, threads: int, watch: Watch, title: str) -> list[Row]:
    """Every network in every runtime, run once and held against torch."""
    with torch.inference_mode():
        expected = {name: subject.module(x) for name, subject in case.subjects.items()}
    rows = []
    with watch.task(f"{title}: preparing", len(runtimes) * len(case.subjects)) as advance:
        for runtime in runtimes:
            for name, subject in case.subjects.items():
                rows.append(_row(runtime, name, subject, x, threads, expected[name]))
                advance(len(rows))
    return rows


def _row(runtime: Runtime, name: str, subject: Subject, x: Tensor, threads: int, expected: Tensor) -> Row:
    try:
        run = runtime.prepare(subject, x, threads)
        with torch.inference_mode():
            error = relative(runtime.logits(run()).float(), expected)
    except Exception as problem:  # whatever a library says of a network that it cannot run
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        reason = lines[0] if isinstance(problem, UpdpError) else f"{type(problem).__name__}: {lines[0]}"
        return Row(runtime, name, FAILED, reason=reason[:300])
    if not error <= runtime.tolerance:
        reason = f"differs from torch by {error:.1e} of the largest logit, allowed: {runtime.tolerance:.0e}"
        return Row(runtime, name, WRONG, error, reason)
    memory = None
    if runtime.in_torch and isinstance(run, partial) and isinstance(run.func, torch.nn.Module):
        memory = Memory.of(run.func, *run.args)
    return Row(runtime, name, OK, error, run=run, memory=memory)


def _timed(runs: Mapping[str, Run], seconds: float, threads: int) -> dict[str, Timing]:
    """In turns; each begins when all threads are at rest, with calls that are not timed.

    One call brings weights back into the caches; several threads that were asleep need longer until each has a CPU of
    its own again.
    """

    def wake(name: str) -> None:
        rest()
        end = time.perf_counter() + (_WAKING if threads > 1 and seconds > 0 else 0.0)
        runs[name]()
        while time.perf_counter() < end:
            runs[name]()

    return compare(runs, seconds, least=_LEAST, warmup=1, before=wake, calls=_CALLS)


def _merging(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How much faster merging makes the network, in each runtime."""
    times = {row.key: row.timing for row in rows}
    found = []
    for runtime in dict.fromkeys(row.runtime.name for row in rows):
        before, after = times.get(f"{runtime} {UNPRUNED}"), times.get(f"{runtime} {MERGED}")
        if before is not None and after is not None:
            found.append({"runtime": runtime, **_ratio(speedup(before, after))})
    return found


def _against(rows: Sequence[Row], network: str) -> Iterator[dict[str, Any]]:
    """Of each runtime, how many times as long the best other one of float32 takes."""
    timed = [(row.runtime, row.timing) for row in rows if row.network == network and row.timing is not None]
    for runtime, own in timed:
        others = [(time.median_ms, each.name, time) for each, time in timed
                  if each is not runtime and each.precision == "float32"]  # fmt: skip
        if others:
            _, name, best = min(others, key=lambda other: other[0])
            yield {"runtime": runtime.name, "network": network, "other": name, **_ratio(speedup(best, own))}


def _ratio(found: Speedup) -> dict[str, float]:
    return {"ratio": found.ratio, "low": found.low, "high": found.high}
