"""The table of compiled kernels, ``csrc/kernels.def``, and which of its rows this build and this CPU can run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

# The compiled module, or None. One that is there but cannot be loaded is an error, not a reason to be slow in silence.
NATIVE: Any = None if importlib.util.find_spec("updp._C") is None else importlib.import_module("updp._C")

REFERENCE = "reference"  # the variant that is plain torch
LIBRARY = torch.library.Library("updp", "DEF")
_DTYPES = {torch.float32: "f32", torch.float64: "f64"}


@dataclass(frozen=True)
class KernelRow:
    """One row of ``csrc/kernels.def``; ``available`` says whether this build and this CPU can run it."""

    name: str
    op: str
    algorithm: str
    dtype: str
    isa: str
    available: bool


@functools.cache
def kernel_rows() -> tuple[KernelRow, ...]:
    """All compiled variants, best first within an operator; empty if ``updp._C`` is not built."""
    return () if NATIVE is None else tuple(KernelRow(*row) for row in NATIVE.rows())


def cpu_features() -> dict[str, bool]:
    """The instruction sets that dispatch looks at; empty if ``updp._C`` is not built."""
    features: dict[str, bool] = {} if NATIVE is None else NATIVE.cpu_features()
    return features


def native_status() -> str:
    """One line for people: how many kernels run here, or that the compiled module is missing."""
    if NATIVE is None:
        return "updp._C is not built, torch references do its work (`pip install .` or `make native` builds it)"
    rows = kernel_rows()
    return f"{sum(row.available for row in rows)} of {len(rows)} kernels run on this CPU"


@functools.cache
def available_rows(op: str, dtype: torch.dtype) -> tuple[KernelRow, ...]:
    """The rows of an operator and a dtype that run here, best first."""
    return tuple(r for r in kernel_rows() if r.op == op and r.dtype == _DTYPES.get(dtype) and r.available)


@functools.cache
def pick(op: str, dtype: torch.dtype, variant: str | None) -> str:
    """The variant asked for, else the first row that fits this dtype and CPU, else the reference."""
    names = [row.name for row in available_rows(op, dtype)]
    if variant is None:
        return names[0] if names else REFERENCE
    allowed = [*names, REFERENCE]
    if variant not in allowed:
        raise ValueError(f"{op}: got variant {variant!r}, available here for {dtype}: {', '.join(allowed)}")
    return variant


def forget() -> None:
    """Ask again what is built: for tests, which take the compiled module away."""
    for cached in (kernel_rows, available_rows, pick):
        cached.cache_clear()
