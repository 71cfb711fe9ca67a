"""Benchmarks of conv2d and linear: every kernel row against the best that torch offers, in one run, correctness first.

`make bench` times; `make test` runs the same code once, untimed.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from updp import ops
from updp.measure import measure
from updp.ops import ConvForm

BOUNDS = {"direct": 5e-7, "depthwise": 5e-7, "winograd2": 2e-6, "winograd4": 5e-6}
Ways = dict[str, Callable[[], Tensor]]


class Layer:
    """A convolution of a merged network: batch, channels in and out, height and width, kernel size, stride, padding."""

    def __init__(
        self,
        batch: int,
        c: int,
        k: int,
        height: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 1,
        groups: int = 1,
    ):
        kind = "depthwise" if groups > 1 else f"to {k},"
        self.name = f"{batch}x{c}x{height}x{height} {kind} {kernel}x{kernel} stride {stride}"
        self.sizes, self.groups = (batch, c, k, height, kernel, stride, padding), groups

    @classmethod
    def depthwise(cls, batch: int, c: int, height: int, kernel: int = 3, stride: int = 1) -> "Layer":
        return cls(batch, c, c, height, kernel, stride, kernel // 2, groups=c)

    def tensors(self) -> None:
        """Made for each test anew: all of them together would be large."""
        batch, c, k, height, kernel, stride, padding = self.sizes
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(batch, c, height, height, generator=generator)
        weight = torch.randn(k, c // self.groups, kernel, kernel, generator=generator)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        geometry = (None, stride, padding, 1, self.groups)
        self.expected = F.conv2d(x.double(), weight.double(), *geometry)
        self.sums = F.conv2d(x.double().abs(), weight.double().abs(), *geometry).amax()

    def torch_ways(self) -> Ways:
        *_, stride, padding = self.sizes
        ways: Ways = {"channels_last": partial(F.conv2d, self.x, self.weight, None, stride, padding, 1, self.groups)}
        if torch.backends.mkldnn.is_available():
            steps = ([padding] * 2, [stride] * 2, [1, 1], self.groups)
            reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
            packed = reorder(self.weight.to_mkldnn(), *steps, list(self.x.shape))
            run = torch.ops.mkldnn._convolution_pointwise
            ways["prepacked"] = partial(run, self.x, packed, None, *steps, "none", [], "")
        return ways

    def variants(self) -> list[str]:
        stride, (n, _, height, width) = self.sizes[5], self.expected.shape
        return ops.conv_variants(tuple(self.weight.shape), (stride, stride), (n, height, width), self.groups)

    def native(self, variant: str) -> Callable[[], Tensor]:
        *_, stride, padding = self.sizes
        form = str(ConvForm(variant, tuple(self.weight.shape), (stride, stride), (padding,) * 4, groups=self.groups))
        packed = ops.pack_conv(self.weight, variant)
        return partial(torch.ops.updp.conv2d.default, self.x, packed, form, None, None, None, None)

    def check(self, got: Tensor, bound: float) -> None:
        assert got.shape == self.expected.shape
        assert (got - self.expected).abs().amax() <= bound * self.sums


# Layers of one guard, and how many times as fast as the best of torch the best row has to be: their geometric mean, on
# one thread. The margins are below what an AMD EPYC (Zen 5) with AVX-512 gave.
GUARDS = {
    "3x3": (2.3, [Layer(n, c, c, h) for c in (64, 96, 128, 192) for h in (56, 28) for n in (1, 8)]),
    "3x3 deep": (1.3, [Layer(n, c, c, 14) for c in (256, 320, 384) for n in (1, 8)]),
    "3x3 at the end": (0.95, [Layer(1, 512, 512, 7), Layer(8, 512, 512, 7)]),
    "depthwise of MobileNetV2": (
        1.1,
        [
            Layer.depthwise(n, c, h, stride=stride)
            for c, h, stride in ((48, 112, 1), (96, 112, 2), (144, 56, 1), (192, 28, 1), (576, 14, 1), (960, 7, 1))
            for n in (1, 8)
        ],
    ),
    "depthwise of ConvNeXt": (
        1.5,
        [Layer.depthwise(n, c, h, 7) for c, h in ((96, 56), (192, 28), (384, 14), (768, 7)) for n in (1, 8)],
    ),
    "the rest": (
        0.9,
        [
            Layer(1, 64, 256, 56, 1, 1, 0),
            Layer(1, 24, 144, 56, 1, 1, 0),
            Layer(1, 1152, 320, 7, 1, 1, 0),
            Layer(1, 64, 128, 56, 1, 2, 0),
            Layer(1, 64, 128, 56, 3, 2, 1),
            Layer(1, 96, 192, 56, 2, 2, 0),
            Layer(1, 40, 40, 28, 5, 1, 2),
            Layer(1, 3, 32, 224, 3, 2, 1),
            Layer(1, 3, 64, 224, 7, 2, 3),
            Layer(1, 3, 96, 224, 4, 4, 0),
        ],
    ),
}
SAMPLES = {
    layer.name: layer
    for layer in (
        Layer(1, 64, 64, 56),
        Layer(1, 3, 64, 224, 7, 2, 3),
        Layer(1, 96, 384, 28, 1, 1, 0),
        Layer.depthwise(1, 144, 56),
    )
}
ROWS = [row for row in ops.kernel_rows() if row.op == "conv" and row.available]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("way", ["channels_last", "prepacked"])
def test_torch(benchmark, way, name):
    layer = SAMPLES[name]
    layer.tensors()
    run = layer.torch_ways().get(way)
    if run is None:
        pytest.skip("torch has no oneDNN here")
    layer.check(run(), BOUNDS["winograd2"])
    benchmark.group = f"conv {name}"
    benchmark(run)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(benchmark, row, name):
    layer = SAMPLES[name]
    if (row.algorithm == "depthwise") != (layer.groups > 1):
        pytest.skip(f"{row.algorithm} is for other groups")
    if row.algorithm.startswith("winograd") and layer.sizes[4:6] != (3, 1):
        pytest.skip(f"{row.algorithm} is for 3x3 and stride 1")
    layer.tensors()
    run = layer.native(row.name)
    layer.check(run(), BOUNDS[row.algorithm])
    benchmark.group = f"conv {name}"
    benchmark(run)


@pytest.mark.parametrize("guard", GUARDS)
def test_guard(request, guard):
    """The best row of each layer is so many times as fast as the best of torch (`make bench`)."""
    assert ROWS, "updp._C is not built: there is nothing to time"
    if not any(row.isa == "avx512" for row in ROWS):
        pytest.skip("NOT TESTED: the margins are for AVX-512")
    least, layers = GUARDS[guard]
    if not request.config.getoption("benchmark_enable"):
        layers = layers[-1:]
    ratios = []
    for layer in layers:
        layer.tensors()
        native, best = {name: layer.native(name) for name in layer.variants()}, layer.torch_ways()
        for name, run in native.items():
            layer.check(run(), BOUNDS[name.split("_")[1]])
        if not request.config.getoption("benchmark_enable"):
            return
        timings = {name: timing.median_ms for name, timing in measure(native | best, rounds=30, threads=1).items()}
        name = min(native, key=timings.__getitem__)
        ratios.append(min(timings[way] for way in best) / timings[name])
        print(f"{layer.name}: {name} {timings[name]:.3f} ms, {ratios[-1]:.2f}x of torch", timings)
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    print(f"{guard}: geometric mean {mean:.2f}x of the best of torch")
    assert mean >= least, ratios


def test_guard_of_the_overhead(request):
    """A call costs little more than one of torch's own; its work here is next to nothing."""
    x = torch.randn(1, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(16, 16, 1, 1).contiguous(memory_format=torch.channels_last), torch.randn(16)
    assert ROWS, "updp._C is not built: there is nothing to time"
    variant = ops.conv_variants(weight.shape)[0]
    packed, form = ops.pack_conv(weight, variant), str(ConvForm(variant, tuple(weight.shape)))
    calls: Ways = {
        "native": partial(torch.ops.updp.conv2d.default, x, packed, form, bias, None, None, None),
        "torch": partial(F.conv2d, x, weight, bias),
    }
    assert torch.allclose(calls["native"](), calls["torch"](), atol=1e-5)
    if not request.config.getoption("benchmark_enable"):
        return

    def often(call: Callable[[], Tensor]) -> None:
        for _ in range(1000):
            call()

    timings = measure({name: partial(often, call) for name, call in calls.items()}, rounds=30, threads=1)
    print("a call in us:", {name: round(timing.median_ms, 2) for name, timing in timings.items()})
    assert timings["native"].median_ms <= 2.2 * timings["torch"].median_ms, timings
