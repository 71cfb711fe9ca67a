"""conv_program: the same bits as convolutions one after the other, however strips and threads cut them; the doors."""

import math

import pytest
import torch

from updp import ops
from updp.ops import ConvForm, Line
from updp.ops import rows as table

ROWS = [row for row in ops.kernel_rows() if row.op == "conv" and row.available]
TILED = ("winograd4", "winograd2")
needs_kernels = pytest.mark.skipif(not ROWS, reason="NOT TESTED: no native convolution runs here")


class Run:
    """Convolutions one behind the other, with random tensors: (channels out, kernel, stride, algorithm) of each."""

    def __init__(self, shape, layers, seed=0, rows=ROWS):
        self.generator = torch.Generator().manual_seed(seed)
        self.x, self.forms, self.operands, self.rows = self.randn(*shape), [], [], rows
        for k, kernel, stride, algorithm in layers:
            shape = self.add(shape, k, kernel, stride, algorithm)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def maybe(self, *shape):
        return self.randn(*shape) if self.pick(True, False) else None

    def pick(self, *choices):
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def add(self, shape, k, kernel, stride, algorithm):
        row = self.pick(*[row for row in self.rows if row.algorithm == algorithm])
        n, c, *size = shape
        padding = self.pick((kernel // 2,) * 4, (kernel // 2,) * 4, tuple(self.pick(*range(kernel)) for _ in range(4)))
        out = [(size[i] + padding[i] + padding[i + 2] - kernel) // stride + 1 for i in (0, 1)]
        weight = self.randn(k, c, kernel, kernel) / math.sqrt(c * kernel * kernel)
        form = ConvForm(
            row.name,
            tuple(weight.shape),
            (stride, stride),
            padding,
            self.pick(*ops.ACTIVATIONS),
            self.pick(True, False),
        )
        scale = self.maybe(k)
        self.forms.append(str(form))
        self.operands += [
            ops.pack_conv(weight, row.name), self.maybe(k), scale, None if scale is None else self.randn(k),
            self.maybe(1, k, *out),
        ]  # fmt: skip
        return (n, k, *out)

    def apart(self):
        x = self.x
        for place, form in enumerate(self.forms):
            packed, *others = self.operands[5 * place : 5 * place + 5]
            x = ops.conv2d(x, packed, form, *others)
        return x

    def text(self):
        return str(Line(tuple(self.forms)))

    def joined(self, threads=1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return ops.conv_program(self.x, self.text(), self.operands)
        finally:
            torch.set_num_threads(before)


def small(seed):
    """Up to five small convolutions of all kinds."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    layers = [
        pick((pick(4, 17, 40), 3, 1, "winograd4"), (pick(5, 32), 3, 1, "winograd2"),
             (pick(1, 16, 33), pick(1, 3, 5), pick(1, 2, 3), "direct"))
        for _ in range(pick(1, 2, 3, 4, 5))
    ]  # fmt: skip
    return Run((pick(1, 1, 2, 3), pick(1, 3, 16), pick(60, 71, 97), pick(49, 64)), layers, seed)


@needs_kernels
def test_many_are_the_same_bits_as_apart():
    for seed in range(200):
        run = small(seed)
        assert torch.equal(run.joined(), run.apart()), seed


# As maps get larger, strips get shorter: from the whole map down to four rows.
STEM = [(48, 3, 2, "direct"), (24, 1, 1, "direct"), (32, 3, 2, "direct"), (32, 3, 1, "winograd4")]
LARGE = [(40, 3, 1, "winograd4"), (24, 5, 1, "direct"), (36, 3, 1, "winograd2"), (16, 3, 2, "direct")]


@needs_kernels
@pytest.mark.parametrize("layers", [STEM, LARGE], ids=["stem", "large"])
@pytest.mark.parametrize("shape", [(1, 3, 225, 160), (2, 8, 130, 131), (5, 3, 66, 250)], ids=str)
def test_strips_and_threads_change_no_bit(layers, shape):
    run = Run(shape, layers)
    expected = run.apart()
    for threads in (1, 2, 3, 4, 7):
        got = run.joined(threads)
        assert torch.equal(got, expected), threads
        assert got.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
def test_what_is_not_finite_stays_where_it_belongs():
    run = Run((1, 3, 200, 180), STEM[:3])
    run.x[0, 1, 77, 99] = math.nan
    assert torch.equal(run.joined().isnan(), run.apart().isnan())
    assert run.joined().isnan().any()


@needs_kernels
def test_the_default_dtype_does_not_matter():
    run = Run((1, 3, 70, 64), STEM)
    expected = run.joined()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(run.joined(), expected)
        assert torch.equal(run.apart(), expected)
    finally:
        torch.set_default_dtype(before)


@needs_kernels
def test_inputs_of_any_layout_and_no_images():
    run = Run((2, 3, 70, 64), STEM)
    expected = run.joined()
    run.x = run.x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(run.joined(), expected)
    run.x = run.x[:0]
    assert run.joined().shape == (0, *expected.shape[1:])


def reference_run():
    weights = [torch.randn(8, 3, 3, 3), torch.randn(4, 8, 1, 1)]
    forms = [str(ConvForm("reference", tuple(w.shape), padding=(w.shape[2] // 2,) * 4)) for w in weights]
    operands = [each for w in weights for each in (w.flatten(), None, None, None, None)]
    return weights, forms, operands


def test_the_reference_works_without_a_build():
    weights, forms, operands = reference_run()
    x = torch.randn(2, 3, 9, 9)
    expected = torch.conv2d(torch.conv2d(x, weights[0], padding=1), weights[1])
    torch.testing.assert_close(ops.conv_program(x, str(Line(tuple(forms))), operands), expected)
    lines = [Line(forms[:1]), Line(forms[1:], 1)]
    torch.testing.assert_close(ops.conv_program(x, "\n".join(map(str, lines)), operands), expected)


@needs_kernels
def test_compile_and_export():
    run = Run((2, 3, 66, 64), STEM)

    class Network(torch.nn.Module):
        def forward(self, x):
            return ops.conv_program(x, run.text(), run.operands) + 1

    expected = run.joined() + 1
    with torch.no_grad():
        assert torch.equal(torch.compile(Network(), backend="eager", fullgraph=True)(run.x), expected)
        program = torch.export.export(Network(), (run.x,))
        assert torch.equal(program.module()(run.x), expected)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.updp.conv_program.default, (run.x, run.text(), run.operands), test_utils=checks)


BAD = {
    "too few operands": (lambda run: run.operands.pop(), ValueError, "got 19 operands for 4 convolutions, need 20"),
    "no weight": (lambda run: run.operands.__setitem__(5, None), ValueError, "has no packed weight"),
    "a weight of another": (
        lambda run: run.operands.__setitem__(0, torch.zeros(7)), ValueError, r"packed has shape \(7,\), need \(1296,\)",
    ),
    "a bias in float64": (
        lambda run: run.operands.__setitem__(1, torch.zeros(48).double()), TypeError, "bias is torch.float64",
    ),
    "a residual for each image": (
        lambda run: run.operands.__setitem__(4, torch.zeros(2, 48, 35, 32)), ValueError, r"residual has shape \(2, 48",
    ),
    "an input in float64": (lambda run: setattr(run, "x", run.x.double()), TypeError, "the input is torch.float64"),
    "no form": (lambda run: run.forms.__setitem__(1, "nothing"), ValueError, "got form 'nothing'"),
    "forms that do not fit": (lambda run: run.forms.reverse(), ValueError, "the weight is for"),
    "a gradient": (lambda run: run.x.requires_grad_(), TypeError, "no_grad"),
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    spoil, error, message = BAD[name]
    rows = [row for row in ROWS if row.isa == "portable"]
    layers = [STEM[0], STEM[1], STEM[2], (32, 3, 1, "direct")]
    run = Run((2, 3, 70, 64), layers, rows=rows)
    spoil(run)
    with pytest.raises(error, match=message):
        run.joined()


class Graph:
    """Lines that read and add maps of before: a residual network's, with one line of strips."""

    def __init__(self, shape, seed=0):
        run = Run(shape, [(16, 3, 2, "direct"), (24, 3, 1, "winograd4")], seed)
        self.x, self.operands = run.x, run.operands
        self.lines = [Line(tuple(run.forms))]
        for source, added, first, k, kernel in (
            (1, None, False, 24, 3), (2, 1, True, 24, 3), (3, None, False, 20, 1), (3, None, False, 20, 5),
            (5, 4, False, 20, 3), (6, 4, True, 20, 1),
        ):  # fmt: skip
            c = 24 if source < 4 else 20
            weight = run.randn(k, c, kernel, kernel) / math.sqrt(c * kernel * kernel)
            row = run.pick(
                *[row for row in ROWS if row.algorithm == "direct" or (kernel == 3 and row.algorithm in TILED)]
            )
            form = ConvForm(row.name, tuple(weight.shape), (1, 1), (kernel // 2,) * 4, "relu", first)
            self.lines.append(Line((str(form),), source, added))
            self.operands += [ops.pack_conv(weight, row.name), run.randn(k), None, None, None]

    def text(self):
        return "\n".join(map(str, self.lines))

    def apart(self):
        maps, place = [self.x], 0
        for line in self.lines:
            x = maps[line.source]
            for form in line.forms:
                packed, bias, scale, shift, residual = self.operands[place : place + 5]
                residual = residual if line.added is None else maps[line.added]
                x, place = ops.conv2d(x, packed, form, bias, scale, shift, residual), place + 5
            maps.append(x)
        return x


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 3, 131, 140), (3, 3, 40, 33)], ids=str)
def test_lines_read_and_add_maps_of_before(shape):
    graph = Graph(shape)
    expected = graph.apart()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.conv_program(graph.x, graph.text(), graph.operands), expected)
    finally:
        torch.set_num_threads(before)


def test_lines_are_read_as_they_are_written():
    for line in (Line(("a",)), Line(("a b", "c"), 3), Line(("a",), 1, 0)):
        assert Line.parse(str(line)) == line


@needs_kernels
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got line ''"),
        ("0 -: {form}\n2 -: {form}", "line 2 reads map 2, there are 2 before it"),
        ("0 2: {form}", "line 0 reads what is not there yet"),
        ("0 0: {form}", "line 0 does not fit"),
        ("0 0: {form}; {form}", "added to one convolution, not to strips"),
        ("0 -: {linear}", "need convolutions of maps"),
    ],
)
def test_bad_lines_are_named(text, message):
    form = ConvForm("conv_direct_f32_portable", (3, 3, 2, 2))
    text = text.format(form=form, linear=ConvForm("conv_direct_f32_portable", (3, 3)))
    with pytest.raises(ValueError, match=message):
        ops.conv_program(torch.zeros(1, 3, 8, 8), text, [])


@needs_kernels
def test_the_native_door_checks_before_it_touches_memory():
    plan = table.NATIVE.ConvPlan("conv_direct_f32_portable", (1, 8, 8, 3), (4, 3, 3, 3), (1, 1), (1, 1, 1, 1))
    other = table.NATIVE.ConvPlan("conv_direct_f32_portable", (1, 8, 8, 5), (4, 5, 3, 3), (1, 1), (1, 1, 1, 1))
    deep = table.NATIVE.ConvPlan("conv_direct_f32_portable", (1, 8, 8, 4), (4, 4, 1, 1), (1, 1), (1, 1, 1, 1))
    one, wrong = (plan, 0, False), (other, 0, False)
    for lines, message in (
        ([], "no line"), ([([], 0, -1)], "a line has no convolution"), ([([one, wrong], 0, -1)], "does not fit"),
        ([([one, (deep, 0, False)], 0, -1)], "a padding of 1 for a weight of 1 rows"),
        ([([one], 0, -1), ([wrong], 0, -1)], "line 1 does not fit"), ([([one], -1, -1)], "not there yet"),
        ([([(None, 0, False)], 0, -1)], "a convolution is missing"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            table.NATIVE.ConvProgram(lines, 1)
    run = table.NATIVE.ConvProgram([([one], 0, -1)], 1).run
    strips = table.NATIVE.ConvProgram([([one, (deep_enough(), 0, False)], 0, -1)], 1).run
    x, packed, out = torch.zeros(192), torch.zeros(plan.packed_size), torch.zeros(256)
    own, second = [packed.data_ptr(), 0, 0, 0, 0], [torch.zeros(64).data_ptr(), 0, 0, 0, 0]
    for address, given, message in (
        (0, own, "the input is a null pointer"),
        (x.data_ptr() + 2, own, "multiples of 4"),
        (out.data_ptr(), own, "out overlaps the input"),
        (x.data_ptr(), [0, 0, 0, 0, 0], "the packed weight is a null pointer"),
        (x.data_ptr(), [packed.data_ptr(), 0, out.data_ptr(), 0, 0], "out overlaps scale"),
    ):
        with pytest.raises(ValueError, match=message):
            run(address, out.data_ptr(), [], [given])
        with pytest.raises(ValueError, match=message):
            strips(address, out.data_ptr(), [], [given, second])
    for slots, given in (([], [own] * 2), ([x.data_ptr()], [own])):
        with pytest.raises(ValueError, match="need 0 and 1"):
            run(x.data_ptr(), out.data_ptr(), slots, given)


def deep_enough():
    return table.NATIVE.ConvPlan("conv_direct_f32_portable", (1, 8, 8, 4), (4, 4, 1, 1), (1, 1), (0, 0, 0, 0))
