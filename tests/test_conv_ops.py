"""conv2d and linear: every kernel row against the definition in float64, and the doors."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from updp import ops
from updp.ops import ConvForm
from updp.ops import rows as table

KERNELS_DEF = Path(__file__).parents[1] / "csrc" / "kernels.def"
ROWS = [
    "_".join(row) for row in re.findall(r"^UPDP_KERNEL\((conv), (\w+), (\w+), (\w+)\)$", KERNELS_DEF.read_text(), re.M)
]
# Of the convolution of absolute values: what rounding may leave.
BOUNDS = {"direct": 5e-7, "depthwise": 5e-7, "winograd2": 2e-6, "winograd4": 5e-6}
# How much an activation may stretch an error.
SLOPES = {"none": 1, "relu": 1, "relu6": 1, "gelu": 1.13, "silu": 1.1, "hardswish": 1.5}
PORTABLE = "conv_direct_f32_portable"


def runnable(name):
    """The row; a test of a row that this CPU cannot run is skipped, loudly."""
    assert ops.kernel_rows(), "updp._C is not built, so no kernel is tested: run the tests through `make test`"
    row = next(row for row in ops.kernel_rows() if row.name == name)
    if not row.available:
        pytest.skip(f"NOT TESTED: {name}, because this CPU has no {row.isa}")
    return row


def weight_shape(row, k, c, *kernel):
    """Of a weight for c channels, and its groups; depthwise rows have as many outputs as inputs."""
    return ((c, 1, *kernel), c) if "depthwise" in row else ((k, c, *kernel), 1)


class Case:
    """A convolution with random sizes, tensors and epilogue."""

    def __init__(self, seed, row, products=200_000):
        generator = torch.Generator().manual_seed(seed)

        def pick(*choices):
            return choices[int(torch.randint(len(choices), (), generator=generator))]

        def between(low, high):
            return int(torch.randint(low, high + 1, (), generator=generator))

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        kernel, stride = [3, 3], (1, 1)
        if row.algorithm in ("direct", "depthwise"):
            kernel = pick([1, 1], [3, 3], [5, 5], [7, 7], [4, 4], [3, 1], [2, 5])
            stride = pick((1, 1), (1, 1), (2, 2), (4, 4), (1, 2), (3, 2))
        padding = pick((0, 0, 0, 0), tuple(k // 2 for k in kernel) * 2, tuple(between(0, k) for k in kernel * 2))
        self.threads = between(1, 4)
        batch, height, width = pick(1, 1, 2, between(1, 9)), between(1, 20), pick(between(1, 20), between(1, 60))
        height, width = (max(size, k) for size, k in zip((height, width), kernel, strict=True))
        sizes = (1, 2, 3, 7, 16, 17, 24, 32, 33, 48, 64, 96, 100, 130)
        c, k = pick(*sizes, between(1, 513)), pick(*sizes, between(1, 300))
        spans = [height + padding[0] + padding[2], width + padding[1] + padding[3]]
        out = [(span - size) // step + 1 for span, size, step in zip(spans, kernel, stride, strict=True)]
        # Cheap ones: of what makes a case dear, the batch and then the channels are the first to go.
        if row.algorithm == "direct":
            k = max(1, min(k, products // (math.prod(out) * c * math.prod(kernel))))
        shape, groups = weight_shape(row.name, k, c, *kernel)
        k = shape[0]
        batch = max(1, min(batch, products // (math.prod(out) * math.prod(shape))))
        self.x, self.weight = randn(batch, c, height, width), randn(*shape)
        self.vectors = {"bias": pick(None, randn(k))} | dict.fromkeys(("scale", "shift"))
        if pick(True, False):
            self.vectors |= {"scale": randn(k), "shift": randn(k)}
        residual = randn(pick(batch, 1), k, *out)
        residual = residual.contiguous(memory_format=pick(torch.channels_last, torch.contiguous_format))
        self.residual = pick(None, residual)
        activation = pick(*ops.ACTIVATIONS)
        self.form = ConvForm(row.name, shape, stride, padding, activation, pick(True, False), groups)

    def run(self, threads=None):
        before = torch.get_num_threads()
        torch.set_num_threads(threads or self.threads)
        try:
            packed = ops.pack_conv(self.weight, self.form.variant)
            return ops.conv2d(self.x, packed, str(self.form), **self.vectors, residual=self.residual)
        finally:
            torch.set_num_threads(before)

    def error(self, got):
        """The largest error, as a part of the largest sum of absolute values that it can come from."""
        doubles = {name: None if v is None else v.double() for name, v in self.vectors.items()}
        residual = None if self.residual is None else self.residual.double()
        x, weight = self.x.double(), self.weight.double()
        expected = ops.conv_reference(x, weight, self.form, **doubles, residual=residual)
        assert got.shape == expected.shape
        assert got.is_contiguous(memory_format=torch.channels_last)
        plain = ConvForm("reference", self.form.weight, self.form.stride, self.form.padding, groups=self.form.groups)
        sums = ops.conv_reference(x.abs(), weight.abs(), plain).amax()
        # What else is added is rounded once or twice, at its own size.
        others = [v.abs().amax() for v in (doubles["bias"], residual) if v is not None]
        scale = doubles["scale"]
        stretch = SLOPES[self.form.activation] * (1 if scale is None else scale.abs().amax())
        size = (
            stretch * (sums + sum(others)) + (0 if scale is None else doubles["shift"].abs().amax()) + sum(others[1:])
        )
        return ((got - expected).abs().amax() / size).item()


def test_the_rows_are_all_there():
    assert len(ROWS) == len(set(ROWS)) == 12
    assert {name.split("_")[1] for name in ROWS} == set(BOUNDS)
    assert [row.name for row in ops.kernel_rows() if row.op == "conv"] == ROWS


@pytest.mark.parametrize("name", ROWS)
def test_row_is_as_exact_as_it_says(name):
    """500 random cases, all epilogues, 1 to 4 threads."""
    row = runnable(name)
    errors = [(case := Case(seed, row)).error(case.run()) for seed in range(500)]
    assert max(errors) <= BOUNDS[row.algorithm], errors.index(max(errors))
    assert max(errors) > 1e-8  # float32 was at work


LARGE = {
    "a stage": (2, 130, 30, 28, 96),
    "deep": (1, 513, 14, 14, 40),
    "one line": (9, 24, 1, 200, 33),
}


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("name", ROWS)
def test_large_ones_do_not_depend_on_threads(name, shape):
    row = runnable(name)
    batch, c, height, width, k = LARGE[shape]
    case = Case(1, row)
    sizes, groups = weight_shape(name, k, c, 3, 3)
    case.x, case.weight = torch.randn(batch, c, height, width), torch.randn(sizes)
    case.vectors, case.residual = {"bias": torch.randn(sizes[0]), "scale": None, "shift": None}, None
    case.form = ConvForm(name, sizes, (1, 1), (1, 0, 2, 1), "silu", groups=groups)
    once = case.run(1)
    assert case.error(once) <= BOUNDS[row.algorithm]
    assert all(torch.equal(once, case.run(threads)) for threads in (2, 3, 4))


@pytest.mark.parametrize("name", [name for name in ROWS if "direct" in name])
def test_linear_is_the_reference_of_its_rows(name):
    runnable(name)
    for shape, k in [((3, 7, 65), 33), ((1, 1), 1), ((197, 24), 72), ((2, 3, 4, 513), 5), ((0, 8), 4)]:
        x, weight, bias = torch.randn(shape), torch.randn(k, shape[-1]), torch.randn(k)
        form = ConvForm(name, tuple(weight.shape), activation="gelu", residual_first=True)
        residual = torch.randn(*shape[:-1], k)
        got = ops.linear(x, ops.pack_conv(weight, name), str(form), bias, residual=residual)
        assert got.shape == residual.shape
        assert got.is_contiguous()
        expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()) + residual.double())
        sums = F.linear(x.abs(), weight.abs(), bias.abs()) + residual.abs()
        assert ((got - expected).abs() <= 1e-6 * sums.max() if got.numel() else sums).all()


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("name", [name for name in ROWS if "direct" in name or "depthwise" in name])
def test_activations_everywhere(name, activation):
    """From where they are flat to where they are straight, and what is no number."""
    runnable(name)
    ends = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 88.5, -104.0])
    x = torch.cat([torch.linspace(-12, 12, 4001), ends])[:, None, None, None]
    form, weight = ConvForm(name, (1, 1, 1, 1), activation=activation), torch.ones(1, 1, 1, 1)
    got = ops.conv2d(x, ops.pack_conv(weight, name), str(form)).flatten()
    expected = ops.conv_reference(x.double(), weight.double(), form).flatten()
    finite = expected.isfinite()
    assert not got[~finite].isfinite().any()
    assert (got - expected)[finite].abs().le(3e-7 * x.flatten()[finite].abs().clamp(min=1)).all()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(name, value):
    runnable(name)
    sizes, groups = weight_shape(name, 20, 5, 3, 3)
    x, weight = torch.randn(1, 5, 9, 9), torch.randn(sizes)
    x[0, 2, 4, 5] = value
    for activation in ("none", "relu", "gelu"):
        form = ConvForm(name, sizes, padding=(1, 1, 1, 1), activation=activation, groups=groups)
        got = ops.conv2d(x, ops.pack_conv(weight, name), str(form))
        expected = ops.conv_reference(x, weight, form)
        assert not got[~expected.isfinite()].isfinite().any()
        assert got.isfinite().any()  # it does not spread over the image


@pytest.mark.parametrize("name", ROWS)
def test_data_may_begin_anywhere(name):
    row = runnable(name)
    case = Case(11, row)
    expected = case.run()
    packed = ops.pack_conv(case.weight, name)

    def moved(tensor, offset):
        if tensor is None:
            return None
        room = torch.empty(tensor.numel() + offset)[offset:].as_strided(tensor.shape, tensor.stride())
        assert room.data_ptr() % 64
        return room.copy_(tensor)

    x = moved(case.x.contiguous(memory_format=torch.channels_last), 1)
    vectors = {name: moved(vector, 3) for name, vector in case.vectors.items()}
    got = ops.conv2d(x, moved(packed, 5), str(case.form), **vectors, residual=moved(case.residual, 7))
    assert torch.equal(got, expected)


def test_nothing_is_written_beside_the_output():
    """A sentinel around out; zero images are no images."""
    for name in ROWS:
        if not next(row for row in ops.kernel_rows() if row.name == name).available:
            continue
        sizes, groups = weight_shape(name, 5, 3, 3, 3)
        weight, x = torch.randn(sizes), torch.randn(2, 3, 7, 6).contiguous(memory_format=torch.channels_last)
        packed, room = ops.pack_conv(weight, name), torch.full((2 * sizes[0] * 7 * 6 + 64,), 7.0)
        plan = table.NATIVE.ConvPlan(name, (2, 7, 6, 3), sizes, (1, 1), (1, 1, 1, 1))
        assert plan.out_shape == [2, 7, 6, sizes[0]]
        plan.run(x.data_ptr(), packed.data_ptr(), room.data_ptr() + 128, 0, 0, 0, 0, False, 0, False, 1)
        assert (room[:32] == 7).all()
        assert (room[-32:] == 7).all()
        assert not (room[32:-32] == 7).any()
        form = ConvForm(name, sizes, padding=(1, 1, 1, 1), groups=groups)
        assert ops.conv2d(x[:0], packed, str(form)).shape == (0, sizes[0], 7, 6)


def test_variants_are_those_that_fit():
    best = next(row.isa for row in ops.kernel_rows() if row.op == "conv" and row.available)
    names = {algorithm: f"conv_{algorithm}_f32_{best}" for algorithm in BOUNDS}
    assert ops.conv_variants((64, 64, 3, 3), (1, 1), (1, 56, 56))[0] == names["winograd4"]
    assert set(ops.conv_variants((64, 64, 3, 3))) == set(names.values()) - {names["depthwise"]}
    assert ops.conv_variants((512, 512, 3, 3), (1, 1), (1, 7, 7))[0] == names["winograd2"]
    assert ops.conv_variants((64, 64, 3, 3), (1, 1), (1, 2, 2))[0] == names["direct"]
    assert ops.conv_variants((64, 64, 3, 3), (2, 2)) == [names["direct"]]
    assert ops.conv_variants((64, 64, 5, 5)) == ops.conv_variants((64, 64)) == [names["direct"]]
    assert ops.conv_variants((64, 1, 7, 7), (2, 2), groups=64) == [names["depthwise"]]
    assert ops.conv_variants((64, 2, 3, 3), groups=32) == ops.conv_variants((64, 1, 3, 3), groups=32) == []


def test_without_a_build_the_reference_does_the_work(monkeypatch):
    x, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    form = ConvForm("reference", (4, 3, 3, 3), (2, 1), (1, 0, 2, 1), "hardswish")
    with monkeypatch.context() as patch:
        patch.setattr(table, "NATIVE", None)
        table.forget()
        assert ops.conv_variants((4, 3, 3, 3)) == []
        got = ops.conv2d(x, ops.pack_conv(weight, "reference"), str(form), bias)
        with pytest.raises(ValueError, match=r"got variant 'conv_direct_f32_avx2', available here .*: reference"):
            ops.pack_conv(weight, "conv_direct_f32_avx2")
    table.forget()
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, F.hardswish(F.conv2d(F.pad(x, (0, 1, 1, 2)), weight, bias, (2, 1))))
    doubles = ops.conv2d(x.double(), ops.pack_conv(weight.double(), "reference"), str(form), bias.double())
    assert doubles.dtype == torch.float64


class Network(torch.nn.Module):
    """Both operators, as a deployed network has them."""

    def __init__(self, variant):
        super().__init__()
        weight, head = torch.randn(8, 3, 3, 3), torch.randn(5, 8)
        self.register_buffer("packed", ops.pack_conv(weight, variant))
        self.register_buffer("head", ops.pack_conv(head, variant))
        self.register_buffer("bias", torch.randn(8))
        self.form = str(ConvForm(variant, (8, 3, 3, 3), (2, 2), (0, 0, 1, 1), "relu"))
        self.head_form = str(ConvForm(variant, (5, 8)))

    def forward(self, x):
        x = ops.conv2d(x, self.packed, self.form, self.bias)
        return ops.linear(x.mean((2, 3)), self.head, self.head_form)


@pytest.mark.parametrize("variant", ["reference", PORTABLE])
def test_compile_and_export(variant):
    network, x = Network(variant).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(x)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
        assert torch.equal(exported.module()(x), expected)
        assert exported.module()(torch.randn(5, 3, 16, 16)).shape == (5, 5)


@pytest.mark.parametrize("variant", ["reference", PORTABLE])
def test_opcheck(variant):
    bias, residual = torch.randn(8), torch.randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    conv = str(ConvForm(variant, (8, 3, 3, 2), (2, 2), (1, 1, 0, 0), "gelu", residual_first=True))
    line = str(ConvForm(variant, (8, 3)))
    packed, head = ops.pack_conv(torch.randn(8, 3, 3, 2), variant), ops.pack_conv(torch.randn(8, 3), variant)
    calls = {
        torch.ops.updp.conv2d.default: (torch.randn(2, 3, 6, 8), packed, conv, bias, bias, bias, residual),
        torch.ops.updp.linear.default: (torch.randn(2, 5, 3), head, line, bias, None, None, None),
    }
    for operator, arguments in calls.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            outcome = torch.library.opcheck(operator, arguments)
        assert set(outcome.values()) == {"SUCCESS"}


def test_forms_are_read_as_they_are_written():
    form = ConvForm("reference", (8, 3, 5, 7), (2, 1), (1, 2, 3, 4), "relu6", residual_first=True)
    assert str(form) == "reference weight=8x3x5x7 stride=2x1 padding=1,2,3,4 activation=relu6 residual=first"
    assert ConvForm.parse(str(form)) == form
    assert ConvForm.parse(str(ConvForm("reference", (8, 3)))) == ConvForm("reference", (8, 3))
    depthwise = ConvForm("reference", (8, 1, 3, 3), groups=8)
    assert str(depthwise).startswith("reference weight=8x1x3x3 groups=8 stride=1x1 ")
    assert ConvForm.parse(str(depthwise)) == depthwise
    for text in ("", "fast", str(form) + " ", str(form).replace("8x", "0x"), str(form).replace("relu6", "elu")):
        with pytest.raises(ValueError, match="conv: got"):
            ConvForm.parse(text)
    with pytest.raises(ValueError, match="neither stride nor padding"):
        ConvForm("reference", (8, 3), (2, 2))
    for weight, groups in [((8, 1, 3, 3), 3), ((8, 1, 3, 3), 0), ((8, 1), 8)]:
        with pytest.raises(ValueError, match=f"got {groups} groups for the weight .*, allowed: 1, or what divides"):
            ConvForm("reference", weight, groups=groups)


FORM = str(ConvForm(PORTABLE, (4, 3, 3, 3)))
BAD = {
    "dimensions": ({"x": torch.ones(3, 8, 8)}, ValueError, r"the input has shape \(3, 8, 8\), need \(N, C, H, W\)"),
    "channels": ({"x": torch.ones(1, 4, 8, 8)}, ValueError, "the input has 4 channels, the weight is for 3"),
    "too small": ({"x": torch.ones(1, 3, 2, 8)}, ValueError, "the padded input has a size of 2, the weight one of 3"),
    "dtype": ({"x": torch.ones(1, 3, 8, 8).double()}, TypeError, "the input is torch.float64"),
    "form": ({"form": "relu"}, ValueError, "got form 'relu', need the text of a ConvForm"),
    "variant": ({"form": FORM.replace("direct", "fft")}, ValueError, "got variant 'conv_fft_f32_portable', available"),
    "no winograd": (
        {"form": FORM.replace("direct", "winograd4").replace("1x1", "2x2")},
        ValueError,
        "winograd4 is for stride 1",
    ),
    "groups": (
        {"form": FORM.replace("4x3x3x3", "4x3x3x3 groups=2")},
        ValueError,
        "got 2 groups, conv_direct_f32_portable is for 1 here",
    ),
    "depthwise": (
        {"form": FORM.replace("direct", "depthwise").replace("4x3x3x3", "3x1x3x3")},
        ValueError,
        "got 1 groups, conv_depthwise_f32_portable is for 3 here",
    ),
    "depthwise channels": (
        {"form": FORM.replace("direct", "depthwise").replace("4x3x3x3", "4x1x3x3 groups=4")},
        ValueError,
        "the input has 3 channels, the weight is for 4",
    ),
    "packed": ({"packed": torch.ones(5)}, ValueError, r"the packed weight has shape \(5,\), need \(108,\)"),
    "strided": ({"packed": torch.ones(216)[::2]}, ValueError, "the packed weight has shape .* dense"),
    "bias": ({"bias": torch.ones(5)}, ValueError, r"bias has shape \(5,\), need \(4,\)"),
    "bias dtype": ({"bias": torch.ones(4).half()}, TypeError, "bias is torch.float16"),
    "one of two": ({"scale": torch.ones(4)}, ValueError, "scale and shift come together"),
    "residual": (
        {"residual": torch.ones(1, 4, 8, 8)},
        ValueError,
        r"the residual has shape .*the output \(1, 4, 6, 6\)",
    ),
    "residual dtype": ({"residual": torch.ones(1, 4, 6, 6).double()}, TypeError, "the residual torch.float64"),
    "gradient": ({"x": torch.ones(1, 3, 8, 8, requires_grad=True)}, TypeError, "asks for a gradient"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, error, message = BAD[name]
    call = {"x": torch.ones(1, 3, 8, 8), "packed": ops.pack_conv(torch.ones(4, 3, 3, 3), PORTABLE), "form": FORM}
    with pytest.raises(error, match=message):
        ops.conv2d(**{**call, **change})


def test_bad_weights_are_named():
    with pytest.raises(ValueError, match=r"the weight has shape \(3,\), need"):
        ops.pack_conv(torch.ones(3), PORTABLE)
    with pytest.raises(TypeError, match=r"the weight is torch\.float64 on cpu, need float32"):
        ops.pack_conv(torch.ones(3, 3).double(), PORTABLE)
    with pytest.raises(ValueError, match="winograd2 is for 3x3 weights, got 1x1"):
        ops.pack_conv(torch.ones(3, 3), "conv_winograd2_f32_portable")
    with pytest.raises(ValueError, match="depthwise is for weights of one input channel, got 3"):
        ops.pack_conv(torch.ones(3, 3), "conv_depthwise_f32_portable")
    with pytest.raises(ValueError, match=r"the input has shape \(\)"):
        ops.linear(torch.ones(()), torch.ones(9), str(ConvForm(PORTABLE, (3, 3))))


PLAN = {"variant": PORTABLE, "input": (1, 8, 8, 3), "weight": (4, 3, 3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1)}
RUN = dict.fromkeys(("bias", "scale", "shift", "residual", "activation"), 0)
RUN |= {"residual_shared": False, "residual_first": False, "threads": 1}
DOOR = {
    "another op": (PLAN, {"variant": "dwcompose_lanes_f32_portable"}, "there is no kernel .* of conv"),
    "stride": (PLAN, {"stride": (0, 1)}, "a stride is 0, allowed: 1 to 2147483647"),
    "padding": (PLAN, {"padding": (0, -1, 0, 0)}, "a padding is -1"),
    "overflow": (PLAN, {"input": (2**31 - 1, 2**31 - 1, 2**31 - 1, 3)}, "sizes overflow"),
    "null": (RUN, {"x": 0}, "the input is a null pointer"),
    "odd address": (RUN, {"bias": 4098}, "bias is at 4098, allowed: multiples of 4"),
    "alias": (RUN, {"out": 4096}, "out overlaps the input"),
    "alias of a residual": (RUN, {"residual": 8 << 20}, "out overlaps residual"),
    "alias behind": (RUN, {"out": (4 << 20) - 4 * 4 * 64 + 4}, "out overlaps the packed weight"),
    "end of memory": (RUN, {"x": 2**64 - 64}, "the input reaches beyond the end of memory"),
    "one of two": (RUN, {"shift": 12 << 20}, "scale and shift come together"),
    "activation": (RUN, {"activation": 6}, "there is no activation 6"),
    "threads": (RUN, {"threads": 0}, "threads must be at least 1"),
}


@pytest.mark.parametrize("name", DOOR)
def test_the_native_door_checks_before_it_touches_memory(name):
    call, change, message = DOOR[name]
    plan = {**PLAN, **(change if call is PLAN else {})}
    run = {"x": 4096, "packed": 4 << 20, "out": 8 << 20, **RUN, **(change if call is RUN else {})}
    with pytest.raises(ValueError, match=message):
        table.NATIVE.ConvPlan(**plan).run(**run)
