"""Benchmarks of layer norms: every kernel row against torch's own, in one run, correctness first.

`make bench` times; `make test` runs the same code once, untimed.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from updp import ops
from updp.measure import measure

EPS, BOUND = 1e-6, 1e-6  # of the largest value
# Rows and channels, and how many times as fast as torch's the best row has to be on one thread. The margins are below
# what an AMD EPYC (Zen 5) with AVX-512 gave, 3.2 to 4.4.
GUARDS = {(197, 192): 1.6, (1576, 192): 2.5, (3136, 96): 2.5, (784, 192): 2.5, (196, 384): 2.0}
ROWS = [row for row in ops.kernel_rows() if row.op == "layer_norm" and row.available]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def rows_of(sizes: tuple[int, int]) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sizes[0]))


def check(got: Tensor, x: Tensor) -> None:
    expected = ops.layer_norm_reference(x.double(), None, None, EPS)
    assert got.shape == expected.shape
    assert (got - expected).abs().amax() <= BOUND * expected.abs().amax()


@pytest.mark.parametrize("sizes", GUARDS, ids=str)
@pytest.mark.parametrize("way", ["torch", *(row.name for row in ROWS)])
def test_way(benchmark, way, sizes):
    x = rows_of(sizes)
    run = partial(ops.layer_norm, x, None, None, EPS, way)
    if way == "torch":
        run = partial(F.layer_norm, x, sizes[1:], None, None, EPS)
    check(run(), x)
    benchmark.group = f"layer norm {sizes}"
    benchmark(run)


@pytest.mark.parametrize("sizes", GUARDS, ids=str)
def test_guard(request, sizes):
    """The best row is so many times as fast as torch (`make bench`)."""
    assert ROWS, "updp._C is not built: there is nothing to time"
    if ROWS[0].isa != "avx512":
        pytest.skip("NOT TESTED: the margins are for AVX-512")
    x = rows_of(sizes)
    ways = {
        "native": partial(torch.ops.updp.layer_norm.default, x, None, None, EPS, ROWS[0].name),
        "torch": partial(F.layer_norm, x, sizes[1:], None, None, EPS),
    }
    for run in ways.values():
        check(run(), x)
    if not request.config.getoption("benchmark_enable"):
        return
    timings = {name: timing.median_ms for name, timing in measure(ways, rounds=100, threads=1).items()}
    ratio = timings["torch"] / timings["native"]
    print(f"layer norm {sizes}: {timings['native']:.3f} ms, {ratio:.2f}x of torch")
    assert ratio >= GUARDS[sizes], timings
