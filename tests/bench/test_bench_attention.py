"""Benchmarks of attention: every kernel row against torch's own, in one run, correctness first.

`make bench` times; `make test` runs the same code once, untimed.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from updp import ops
from updp.measure import measure

BOUND = 5e-6  # of the largest value
# Images, heads, tokens and channels of a head, and how many times as fast as torch's the best row has to be on one
# thread. The margins are below what an AMD EPYC (Zen 5) with AVX-512 gave.
GUARDS = {
    (1, 3, 197, 64): 1.7,
    (8, 3, 197, 64): 1.6,
    (1, 6, 197, 64): 1.7,
    (1, 12, 197, 64): 1.6,
    (1, 3, 49, 32): 1.3,
}
ROWS = [row for row in ops.kernel_rows() if row.op == "attention" and row.available]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def parts_of(sizes: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a network has them: parts of one linear layer's output."""
    batch, heads, tokens, channels = sizes
    packed = torch.randn(batch, tokens, 3, heads, channels, generator=torch.Generator().manual_seed(tokens))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def check(got: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    expected = ops.attention_reference(q.double(), k.double(), v.double(), 1 / math.sqrt(q.shape[-1]))
    assert got.shape == expected.shape
    assert (got - expected).abs().amax() <= BOUND * v.abs().amax()


@pytest.mark.parametrize("sizes", GUARDS, ids=str)
@pytest.mark.parametrize("way", ["torch", *(row.name for row in ROWS)])
def test_way(benchmark, way, sizes):
    q, k, v = parts_of(sizes)
    run = partial(ops.attention, q, k, v, None, way)
    if way == "torch":
        run = partial(F.scaled_dot_product_attention, q, k, v)
    check(run(), q, k, v)
    benchmark.group = f"attention {sizes}"
    benchmark(run)


@pytest.mark.parametrize("sizes", GUARDS, ids=str)
def test_guard(request, sizes):
    """The best row is so many times as fast as torch (`make bench`)."""
    assert ROWS, "updp._C is not built: there is nothing to time"
    if ROWS[0].isa != "avx512":
        pytest.skip("NOT TESTED: the margins are for AVX-512")
    q, k, v = parts_of(sizes)
    scale = 1 / math.sqrt(q.shape[-1])
    ways = {
        "native": partial(torch.ops.updp.attention.default, q, k, v, scale, ROWS[0].name),
        "torch": partial(F.scaled_dot_product_attention, q, k, v),
    }
    for run in ways.values():
        check(run(), q, k, v)
    if not request.config.getoption("benchmark_enable"):
        return
    timings = {name: timing.median_ms for name, timing in measure(ways, rounds=100, threads=1).items()}
    ratio = timings["torch"] / timings["native"]
    print(f"attention {sizes}: {timings['native']:.3f} ms, {ratio:.2f}x of torch")
    assert ratio >= GUARDS[sizes], timings
