"""The one way to time things and the one table of timings.

Functions that are compared are timed in turns, so that whatever slows the machine slows all of them; what is reported
is the median and the quartiles. Everything that a figure depends on stands beside it in the environment.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from updp.errors import InputError

_ROUNDS = (15, 200)  # of a comparison, at least and at most
_ROW = {"name": str, "median_ms": float, "low_ms": float, "high_ms": float, "runs": int}


@dataclass(frozen=True)
class Timing:
    """How long one call took, in milliseconds: the median, the quartiles and on how many runs they stand.

    ``samples_ms`` has each run, in order; it is not written to files and not compared.
    """

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    samples_ms: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_samples(cls, name: str, samples_ms: Sequence[float]) -> Timing:
        """Summarise the runs of one function."""
        low, median, high = _quartiles(samples_ms)
        return cls(name, median, low, high, len(samples_ms), tuple(samples_ms))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the samples."""
        return {key: getattr(self, key) for key in _ROW}

    @classmethod
    def from_dict(cls, data: Any) -> Timing:
        """Read what :meth:`to_dict` wrote.

        Raises:
            InputError: a key is missing or has a value of another type.
        """
        if not isinstance(data, Mapping):
            raise InputError(f"a timing is {data!r}, allowed: an object with {', '.join(_ROW)}")
        wrong = [key for key, kind in _ROW.items() if not _is(data.get(key), kind)]
        if wrong:
            raise InputError(f"a timing has no {', '.join(wrong)} of the right type; it must have {', '.join(_ROW)}")
        return cls(**{key: kind(data[key]) for key, kind in _ROW.items()})


@dataclass(frozen=True)
class Speedup:
    """How many times faster one function is than another: the ratio of the medians, and the quartiles of the ratio.

    ``low`` and ``high`` are of the ratios within each round, where both ran under the same conditions.
    """

    ratio: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.low:.2f}-{self.high:.2f}, {self.rounds} rounds)"


@dataclass(frozen=True)
class LatencyTable:
    """Timings that belong together, and the environment they were taken in."""

    environment: Mapping[str, Any]
    rows: tuple[Timing, ...]

    def row(self, name: str) -> Timing:
        """The timing of that name; KeyError if there is none."""
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: ``{"environment": {...}, "rows": [...]}``."""
        return {"environment": dict(self.environment), "rows": [row.to_dict() for row in self.rows]}

    def to_json(self) -> str:
        """The table as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> LatencyTable:
        """Read what :meth:`to_dict` wrote.

        Raises:
            InputError: it is not a latency table.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("environment"), Mapping):
            raise InputError("a latency table must be an object with environment and rows")
        if not isinstance(data.get("rows"), list):
            raise InputError("the rows of a latency table must be a list")
        return cls(dict(data["environment"]), tuple(Timing.from_dict(row) for row in data["rows"]))

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: it is not a latency table.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"a latency table is not JSON: {error}") from None
        return cls.from_dict(data)


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 5,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    before: Callable[[str], object] | None = None,
    calls: int = 1,
) -> dict[str, Timing]:
    """Time functions in turns, in inference mode and without garbage collection.

    Every round calls each function once; each round starts with another one, so that none always runs behind the same.

    Args:
        functions: name -> what to call.
        rounds: how often each is timed.
        warmup: how many rounds run first without being timed.
        threads: of torch, while measuring; None leaves them as they are.
        device: where the functions compute; on anything but the CPU a run lasts until the device is done.
        before: called with the name of a function before its turn, untimed.
        calls: how often a function is called and timed in its turn.

    Raises:
        ValueError: no functions, no rounds or no calls.
    """
    if not functions or rounds < 1 or warmup < 0 or calls < 1:
        raise ValueError(f"got {len(functions)} functions, {rounds} rounds, {warmup} of warm-up and {calls} calls")
    wait = _waiting(torch.device(device))
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _quiet(threads), torch.inference_mode():
        for turn in range(-warmup, rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if before is not None:
                    before(name)
                for _ in range(calls):
                    wait()
                    start = time.perf_counter_ns()
                    functions[name]()
                    wait()
                    if turn >= 0:
                        samples[name].append((time.perf_counter_ns() - start) / 1e6)
    return {name: Timing.from_samples(name, samples[name]) for name in names}


def compare(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    device: str | torch.device = "cpu",
    *,
    least: int = _ROUNDS[0],
    warmup: int = 5,
    before: Callable[[str], object] | None = None,
    calls: int = 1,
) -> dict[str, Timing]:
    """Time functions in turns, as often as fits into about so many seconds, but in ``least`` rounds.

    The other arguments are those of :func:`measure`.
    """
    with torch.inference_mode():
        for function in functions.values():
            function()
        start = time.perf_counter()
        for name, function in functions.items():
            if before is not None:
                before(name)
            for _ in range(calls):
                function()
        once = time.perf_counter() - start
    rounds = min(max(round(seconds / once), least), _ROUNDS[1])
    return measure(functions, rounds=rounds, warmup=warmup, device=device, before=before, calls=calls)


def speedup(before: Timing, after: Timing) -> Speedup:
    """How many times faster ``after`` is, both from the same call of :func:`measure`.

    Raises:
        ValueError: they do not have the samples of the same rounds.
    """
    if not before.samples_ms or len(before.samples_ms) != len(after.samples_ms):
        raise ValueError(f"{before.name} and {after.name} were not measured together")
    low, _, high = _quartiles([a / b for a, b in zip(before.samples_ms, after.samples_ms, strict=True)])
    return Speedup(before.median_ms / after.median_ms, low, high, len(before.samples_ms))


def environment(
    device: str | torch.device = "cpu", *, threads: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What a timing depends on; plain JSON.

    Args:
        device: where the timed functions compute.
        threads: as given to :func:`measure`; None means torch's present number.
        dtype: of their inputs.
    """
    from updp import __version__

    chosen = torch.device(device)
    return {
        "device": _device_name(chosen),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "dtype": str(dtype).removeprefix("torch."),
        "updp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": package_version("timm"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system tells it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "cpu model")))
    return next((name for name in found if name), "") or platform.processor() or platform.machine() or "unknown"


def package_version(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _is(value: Any, kind: type) -> bool:
    allowed = (int, float) if kind is float else kind
    return isinstance(value, allowed) and not isinstance(value, bool)


def _waiting(device: torch.device) -> Callable[[], None]:
    """A function that returns when the device has done all it was given."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


@contextmanager
def _quiet(threads: int | None) -> Iterator[None]:
    """A fixed number of threads and no garbage collection; both are put back."""
    before, collects = torch.get_num_threads(), gc.isenabled()
    if threads is not None:
        torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collects:
            gc.enable()


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
