"""Every different layer of a merged network by itself: torch, our kernels, and what this machine could do at most.

What is possible is measured on the spot: float32 products by a matrix product in its fastest form (torch's own library
is not the fastest on every CPU), memory by copying arrays of several sizes, as a layer by itself finds its weights and
its input in the caches where they fit. A layer cannot take less than the longer of its products at the one speed and
its bytes (input, weight, output, once each) at the other, that of the largest array not larger than its bytes.
Winograd's algorithms compute a convolution with fewer products than it has, so they may lie above 100 %.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from updp.bench.networks import FAILED, MERGED, OK, UNPRUNED, VERSION, WRONG, Case, surroundings
from updp.bench.runtimes import rest, settled
from updp.certificate import relative
from updp.deployment import fused_chains
from updp.deployment.forms import Operands, Problem, build, forms_for
from updp.deployment.tune import Fused
from updp.exporting import TOLERANCE
from updp.measure import Timing, compare, speedup
from updp.pipeline.watch import Watch

TORCH = ("torch", "onednn")
"""Forms of torch: plain channels last, and oneDNN with packed weights."""
_LEAST, _CALLS = 5, 4
_MATRIX = 768  # rows
_ARRAYS = tuple(1 << power for power in (16, 19, 21, 23, 25, 28))  # bytes read and written
_SECONDS = 0.25  # for each thing that is measured of the machine
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Roofline:
    """What this machine does at most, with so many threads.

    Attributes:
        macs: multiply-accumulates a second.
        bandwidths: of copies, bytes read and written -> bytes a second.
    """

    macs: float
    bandwidths: Mapping[int, float]

    def seconds(self, problem: Problem, shape: tuple[int, ...]) -> float:
        """The least time of a layer."""
        out = problem.out_shape(shape)
        numbers = math.prod(shape) + math.prod(problem.weight) + math.prod(out)
        moved = _FLOAT * (numbers + (0 if problem.residual == "none" else math.prod(out)))
        size = max((size for size in self.bandwidths if size <= moved), default=min(self.bandwidths))
        return max(problem.products(shape) / self.macs, moved / self.bandwidths[size])

    def to_json(self) -> dict[str, Any]:
        bandwidths = [{"bytes": size, "gbytes": speed / 1e9} for size, speed in self.bandwidths.items()]
        return {"gmacs": self.macs / 1e9, "gbytes": bandwidths[-1]["gbytes"], "copies": bandwidths}


def bench_layers(case: Case, batch: int, threads: int, seconds: float, watch: Watch | None = None) -> dict[str, Any]:
    """Time every different chain of the merged network, or of the network where nothing is pruned; plain JSON.

    Args:
        seconds: roughly, for each layer.
    """
    watch = watch or Watch()
    subject = case.subjects.get(MERGED) or case.subjects[UNPRUNED]
    x = torch.randn(batch, *case.input, generator=torch.Generator().manual_seed(1))
    different: dict[tuple[str, tuple[int, ...]], list[Fused]] = {}
    for chain in fused_chains(subject.module, x):
        different.setdefault((str(chain.problem), chain.input), []).append(chain)
    with settled(threads):
        roofline = measured_roofline()
        watch.on_note(f"{case.name}: timing {len(different)} different layers")
        layers = [_layer(chains, seconds, roofline) for chains in different.values()]
    return {
        "version": VERSION, "kind": "layers", "environment": surroundings(), "network": case.to_json(),
        "seconds": seconds, "batch": batch, "threads": threads, "missing": [],
        "roofline": roofline.to_json(), "layers": layers,
    }  # fmt: skip


def measured_roofline() -> Roofline:
    """With torch's present number of threads: the best of many tries."""
    x, weight = torch.randn(2, _MATRIX, _MATRIX)
    problem = Problem((_MATRIX, _MATRIX), (1, 1), (0, 0, 0, 0), (1, 1), 1, "none", False, "none")
    operands = Operands(weight, None, None, None)
    forms = [build(form, problem, operands) for form in forms_for(problem, (_MATRIX, _MATRIX), x.dtype, x.device)]
    with torch.inference_mode():
        products = min(_best(lambda form=form: form(x)) for form in forms)  # type: ignore[misc]
    bandwidths = {}
    for size in _ARRAYS:
        source = torch.ones(size // 2 // _FLOAT)
        target = torch.empty_like(source)
        bandwidths[size] = size / _best(lambda source=source, target=target: target.copy_(source))  # type: ignore[misc]
    return Roofline(_MATRIX**3 / products, bandwidths)


def _best(function: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    function()
    best, end = math.inf, time.perf_counter() + _SECONDS
    while math.isinf(best) or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def _layer(chains: list[Fused], seconds: float, roofline: Roofline) -> dict[str, Any]:
    """All forms of one layer, in turns."""
    problem, operands, shape = chains[0].problem, chains[0].operands, chains[0].input
    assert isinstance(problem, Problem) and isinstance(operands, Operands)  # those of chains
    rows, timings = _forms(problem, operands, shape, seconds)
    least = roofline.seconds(problem, shape)
    for row in rows:
        if row["timing"] is not None:
            took = row["timing"]["median_ms"] / 1e3
            row["gmacs"], row["of_roofline"] = problem.products(shape) / took / 1e9, least / took
    torch_form, native = (
        min((row for row in rows if row["timing"] is not None and (row["form"] in TORCH) is ours),
            key=lambda row: row["timing"]["median_ms"], default=None)
        for ours in (True, False)
    )  # fmt: skip
    ratio = None
    if torch_form is not None and native is not None:
        found = speedup(timings[torch_form["form"]], timings[native["form"]])
        ratio = {"ratio": found.ratio, "low": found.low, "high": found.high}
    return {
        "problem": str(problem), "input": "x".join(map(str, shape)), "count": len(chains),
        "names": [chain.name for chain in chains], "macs": problem.products(shape), "least_ms": 1e3 * least,
        "torch": torch_form, "native": native, "against_torch": ratio, "forms": rows,
    }  # fmt: skip


def _forms(
    problem: Problem, operands: Operands, shape: tuple[int, ...], seconds: float
) -> tuple[list[dict[str, Any]], Mapping[str, Timing]]:
    """Every form that can run here: first held against plain torch in float64, then timed if it is right."""
    x, residual = _like(shape, 1), None
    if problem.residual != "none":
        residual = _like(problem.out_shape(shape), 2)
    expected = _expected(problem, operands, x, residual)
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Tensor]] = {}
    for name in forms_for(problem, shape, torch.float32, torch.device("cpu")):
        row: dict[str, Any] = {
            "form": name, "status": OK, "error": None, "reason": "", "timing": None, "gmacs": None, "of_roofline": None,
        }  # fmt: skip
        try:
            form = build(name, problem, operands)
            with torch.inference_mode():
                row["error"] = relative(form(x, residual).double(), expected)
        except (RuntimeError, ValueError) as problem_found:
            row["status"], row["reason"] = FAILED, str(problem_found).splitlines()[0][:300]
        else:
            if row["error"] <= TOLERANCE:
                runs[name] = lambda form=form: form(x, residual)  # type: ignore[misc]
            else:
                row["status"], row["reason"] = WRONG, f"differs from float64 by {row['error']:.1e}"
        rows.append(row)

    def wake(name: str) -> None:
        rest()
        runs[name]()

    timings = compare(runs, seconds, least=_LEAST, warmup=1, before=wake, calls=_CALLS)
    for row in rows:
        if row["form"] in timings:
            row["timing"] = timings[row["form"]].to_dict()
    return rows, timings


def _expected(problem: Problem, operands: Operands, x: Tensor, residual: Tensor | None) -> Tensor:
    numbers = [None if each is None else each.double() for each in
               (operands.weight, operands.bias, operands.scale, operands.shift)]  # fmt: skip
    weight, bias, scale, shift = numbers
    assert weight is not None
    form = build("torch", problem, Operands(weight, bias, scale, shift))
    with torch.inference_mode():
        out: Tensor = form(x.double(), None if residual is None else residual.double())
    return out


def _like(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random numbers, maps of channels last."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
