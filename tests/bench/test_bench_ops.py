"""Benchmarks of the operators: every kernel row against the ways torch offers, in one run, correctness first.

`make bench` times; `make test` runs the same code once, untimed.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from updp import ops
from updp.measure import measure

# (channels, outer kernel size, inner kernel size)
SHAPES = [(96, 3, 3), (512, 3, 3), (384, 3, 7), (768, 7, 7)]
DTYPES = {"f32": torch.float32, "f64": torch.float64}
UNIT = ((1, 1), (1, 1), (1, 1))


def slices(outer: Tensor, inner: Tensor) -> Tensor:
    """The reference: one multiply and one add of a window for each outer tap."""
    return ops.depthwise_compose_reference(outer, inner, *UNIT)


def einsum(outer: Tensor, inner: Tensor) -> Tensor:
    """All products at once, then scattered to their taps."""
    height, width = (o + i - 1 for o, i in zip(outer.shape[1:], inner.shape[1:], strict=True))
    y = torch.arange(outer.shape[1])[:, None, None, None] + torch.arange(inner.shape[1])[:, None]
    x = torch.arange(outer.shape[2])[:, None, None] + torch.arange(inner.shape[2])
    products = torch.einsum("cyx,cvu->cyxvu", outer, inner)
    out = inner.new_zeros(inner.shape[0], height * width)
    return out.index_add_(1, (y * width + x).flatten(), products.flatten(1)).reshape(-1, height, width)


def convolution(outer: Tensor, inner: Tensor) -> Tensor:
    """A full correlation with the flipped outer weight, one group a channel."""
    padding = (outer.shape[1] - 1, outer.shape[2] - 1)
    return F.conv2d(inner[None], outer.flip(1, 2)[:, None], padding=padding, groups=outer.shape[0])[0]


TORCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "slices": slices,
    "einsum": einsum,
    "convolution": convolution,
}


def weights(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    channels, outer, inner = shape
    return torch.randn(channels, outer, outer, dtype=dtype), torch.randn(channels, inner, inner, dtype=dtype)


def check(got: Tensor, outer: Tensor, inner: Tensor) -> None:
    expected = slices(outer.double(), inner.double())
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 100 * torch.finfo(got.dtype).eps * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", TORCH)
def test_torch(benchmark, way, dtype, shape):
    outer, inner = weights(shape, DTYPES[dtype])
    check(TORCH[way](outer, inner), outer, inner)
    benchmark.group = f"dwcompose {dtype} {shape}"
    benchmark(TORCH[way], outer, inner)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", [row.name for row in ops.kernel_rows() if row.op == "dwcompose" and row.available])
def test_row(benchmark, row, shape):
    dtype = row.split("_")[2]
    outer, inner = weights(shape, DTYPES[dtype])
    check(ops.depthwise_compose(outer, inner, variant=row), outer, inner)
    benchmark.group = f"dwcompose {dtype} {shape}"
    benchmark(ops.depthwise_compose, outer, inner, variant=row)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_guard(request, shape):
    """In float64, in which merging works, the picked row is faster than every way of torch (`make bench`)."""
    outer, inner = weights(shape, torch.float64)
    ways = {"native": ops.depthwise_compose, **TORCH}
    for way in ways.values():
        check(way(outer, inner), outer, inner)
    assert ops.kernel_rows(), "updp._C is not built: there is nothing to time"
    if not request.config.getoption("benchmark_enable"):
        return
    timings = measure({name: partial(way, outer, inner) for name, way in ways.items()}, rounds=50)
    ratios = {name: round(timings[name].median_ms / timings["native"].median_ms, 2) for name in TORCH}
    print(f"depthwise_compose f64 {shape}: torch takes so many times as long: {ratios}")
    assert min(ratios.values()) > 1, ratios
