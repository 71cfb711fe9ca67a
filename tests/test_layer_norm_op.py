"""layer_norm: every kernel row against the definition in float64, and the doors."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from updp import ops
from updp.ops import rows as table

KERNELS_DEF = Path(__file__).parents[1] / "csrc" / "kernels.def"
ROWS = [
    "_".join(row)
    for row in re.findall(r"^UPDP_KERNEL\((layer_norm), (\w+), (\w+), (\w+)\)$", KERNELS_DEF.read_text(), re.M)
]
# Of the largest value that is normalized, times the largest weight, plus the largest bias. Five times what was found.
BOUND = 1e-6
PORTABLE = "layer_norm_rows_f32_portable"


def runnable(name):
    """The row; a test of a row that this CPU cannot run is skipped, loudly."""
    assert ops.kernel_rows(), "updp._C is not built, so no kernel is tested: run the tests through `make test`"
    row = next(row for row in ops.kernel_rows() if row.name == name)
    if not row.available:
        pytest.skip(f"NOT TESTED: {name}, because this CPU has no {row.isa}")
    return row


class Case:
    """A layer norm of random sizes, values, means and threads."""

    def __init__(self, seed, elements=100_000):
        generator = torch.Generator().manual_seed(seed)

        def between(low, high):
            return int(torch.randint(low, high + 1, (), generator=generator))

        def pick(*choices):
            return choices[between(0, len(choices) - 1)]

        self.threads = between(1, 4)
        channels = pick(1, 2, 16, 96, 192, 384, 1537, between(1, 70), between(1, 1537))
        rows = min(pick(1, 197, between(1, 300)), max(1, elements // channels))
        self.eps = pick(1e-6, 1e-5, 1e-3, 1.0)
        spread, mean = pick(1.0, 1.0, 1e-3, 1e4), pick(0.0, 0.0, 1.0, -100.0, 1e4)
        self.x = spread * (torch.randn(rows, channels, generator=generator) + mean)
        self.weight = pick(None, torch.randn(channels, generator=generator))
        self.bias = pick(None, torch.randn(channels, generator=generator))

    def run(self, name, threads=None):
        before = torch.get_num_threads()
        torch.set_num_threads(threads or self.threads)
        try:
            return ops.layer_norm(self.x, self.weight, self.bias, self.eps, name)
        finally:
            torch.set_num_threads(before)

    def error(self, got):
        """The largest error, as a part of the largest terms."""
        x = self.x.double()
        weight, bias = (None if each is None else each.double() for each in (self.weight, self.bias))
        expected = ops.layer_norm_reference(x, weight, bias, self.eps)
        largest = ops.layer_norm_reference(x, None, None, self.eps).abs().amax().clamp(min=1e-3)
        largest = largest * (1 if weight is None else weight.abs().amax()) + (0 if bias is None else bias.abs().amax())
        assert got.shape == expected.shape
        return ((got - expected).abs().amax() / largest).item()


def test_the_rows_are_all_there():
    assert len(ROWS) == len(set(ROWS)) == 3
    assert [row.name for row in ops.kernel_rows() if row.op == "layer_norm"] == ROWS
    best = next(row.name for row in ops.kernel_rows() if row.op == "layer_norm" and row.available)
    assert ops.layer_norm_variants() == [best]


@pytest.mark.parametrize("name", ROWS)
def test_row_is_as_exact_as_it_says(name):
    """600 random cases, 1 to 4 threads."""
    runnable(name)
    errors = [(case := Case(seed)).error(case.run(name)) for seed in range(600)]
    assert max(errors) <= BOUND, errors.index(max(errors))
    assert max(errors) > 1e-9  # float32 was at work


@pytest.mark.parametrize("name", ROWS)
def test_every_number_of_channels(name):
    runnable(name)
    for channels in range(1, 200):
        x, weight, bias = torch.randn(3, channels), torch.randn(channels), torch.randn(channels)
        got = ops.layer_norm(x, weight, bias, 1e-5, name)
        expected = ops.layer_norm_reference(x.double(), weight.double(), bias.double(), 1e-5).float()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("shape", [(800, 192), (131, 1000), (3, 70_001), (2, 5, 7, 2048), (70_000, 3)])
@pytest.mark.parametrize("name", ROWS)
def test_large_ones_do_not_depend_on_threads(name, shape):
    runnable(name)
    case = Case(1)
    case.x, case.weight, case.bias = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    once = case.run(name, 1)
    assert case.error(once) <= BOUND
    assert all(torch.equal(once, case.run(name, threads)) for threads in (2, 3, 4))
    first = ops.layer_norm(case.x[:1], case.weight, case.bias, case.eps, name)
    assert torch.equal(first, once[:1]), "nor do rows on each other"


@pytest.mark.parametrize("name", ROWS)
def test_channels_of_a_map_need_no_copy(name):
    runnable(name)
    x = torch.randn(2, 24, 5, 6).to(memory_format=torch.channels_last)
    rows = x.permute(0, 2, 3, 1)
    out = ops.layer_norm(rows, None, None, 1e-6, name)
    assert rows.is_contiguous()
    assert out.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.layer_norm(rows, (24,), eps=1e-6), rtol=1e-5, atol=1e-6)
    apart = rows.transpose(0, 1)  # copied
    assert torch.equal(ops.layer_norm(apart, None, None, 1e-6, name), out.transpose(0, 1))
    weight = torch.randn(48)[::2]
    assert torch.equal(
        ops.layer_norm(rows, weight, None, 1e-6, name), ops.layer_norm(rows, weight.contiguous(), None, 1e-6, name)
    )


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_do_not_vary(name):
    runnable(name)
    for value in (0.0, 3.7, -1e30, 1e-40):
        got = ops.layer_norm(torch.full((4, 37), value), None, torch.full((37,), 2.0), 1e-6, name)
        assert (got - 2).abs().amax() <= 1e-3 * (abs(value) < 1e3) or got.isfinite().all()
    assert torch.equal(ops.layer_norm(torch.randn(5, 1), None, None, 1e-6, name), torch.zeros(5, 1))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("channels", [1, 16, 37, 200])
def test_what_is_not_finite_stays_so(name, channels, value):
    runnable(name)
    for place in {0, channels // 2, channels - 1}:
        x, weight, bias = torch.randn(3, channels), torch.randn(channels), torch.randn(channels)
        x[1, place] = value
        got, expected = ops.layer_norm(x, weight, bias, 1e-6, name), F.layer_norm(x, (channels,), weight, bias, 1e-6)
        assert got[1].isnan().all()
        assert torch.equal(got.isnan(), expected.isnan())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        x[1, place], bias[place] = 0.0, value
        got, expected = ops.layer_norm(x, weight, bias, 1e-6, name), F.layer_norm(x, (channels,), weight, bias, 1e-6)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_written_beside_the_output(name):
    runnable(name)
    for channels in (1, 5, 16, 37):
        x, room = torch.randn(6, channels), torch.full((6 * channels + 64,), 7.0)
        plan = table.NATIVE.LayerNormPlan(name, 6, channels, 1e-5)
        plan.run(x.data_ptr(), 0, 0, room.data_ptr() + 128, 1)
        assert (room[:32] == 7).all()
        assert (room[-32:] == 7).all()
        assert torch.equal(room[32:-32].view(6, channels), ops.layer_norm(x, None, None, 1e-5, name))
    assert ops.layer_norm(x[:0], None, None, 1e-5, name).shape == (0, 37)


def test_without_a_build_the_reference_does_the_work(monkeypatch):
    x = torch.randn(4, 9)
    with monkeypatch.context() as patch:
        patch.setattr(table, "NATIVE", None)
        table.forget()
        assert ops.layer_norm_variants() == []
        got = ops.layer_norm(x)
        with pytest.raises(ValueError, match=r"got variant .*, available here .*: reference"):
            ops.layer_norm(x, variant=PORTABLE.replace("rows", "other"))
    table.forget()
    assert torch.equal(got, ops.layer_norm_reference(x, None, None, 1e-5))
    assert ops.layer_norm(x.double()).dtype == torch.float64


@pytest.mark.parametrize("variant", ["reference", PORTABLE])
def test_compile_export_and_opcheck(variant):
    class Network(torch.nn.Module):
        def forward(self, x):
            return ops.layer_norm(x.permute(0, 2, 3, 1), None, None, 1e-5, variant).permute(0, 3, 1, 2).flatten(1)

    network, x = Network(), torch.randn(3, 7, 2, 4)
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(torch.compile(network, fullgraph=True, backend="aot_eager")(x), expected)
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module()
        assert torch.equal(exported(x), expected)
        assert exported(torch.randn(5, 7, 2, 4)).shape == (5, 56)
    for arguments in ((torch.randn(2, 3, 5), None, None, 0.5, variant), (torch.randn(4, 6), w(6), w(6), 1e-6, variant)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            outcome = torch.library.opcheck(torch.ops.updp.layer_norm.default, arguments)
        assert set(outcome.values()) == {"SUCCESS"}


def w(*shape):
    return torch.ones(shape)


BAD = {
    "no dimension": ({"x": w()}, ValueError, r"x has shape \(\), need \(\.\.\., C\), C from 1"),
    "no channels": ({"x": w(3, 0), "weight": None, "bias": None}, ValueError, r"x has shape \(3, 0\)"),
    "weight": ({"weight": w(5)}, ValueError, r"weight has shape \(5,\), x \(3, 4\), need \(4,\)"),
    "bias": ({"bias": w(1, 4)}, ValueError, r"bias has shape \(1, 4\)"),
    "dtype": ({"x": w(3, 4).double()}, TypeError, "x is torch.float64, need float32"),
    "dtype of the bias": ({"bias": w(4).double()}, TypeError, "bias is torch.float64, need float32"),
    "eps": ({"eps": -1.0}, ValueError, "eps is -1.0*, allowed: from 0"),
    "no eps": ({"eps": math.nan}, ValueError, "eps is nan, allowed: from 0"),
    "variant": ({"variant": "layer_norm_fast_f32_portable"}, ValueError, "got variant 'layer_norm_fast_f32_portable'"),
    "gradient": ({"weight": w(4).requires_grad_()}, TypeError, "asks for a gradient"),
}


@pytest.mark.parametrize("variant", ["reference", PORTABLE])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, variant):
    change, error, message = BAD[name]
    if variant == "reference" and name in ("dtype", "dtype of the bias", "eps", "no eps", "variant"):
        pytest.skip("torch says so, or there is nothing to say")
    call = {"x": w(3, 4), "weight": w(4), "bias": w(4), "variant": variant, **change}
    with pytest.raises(error, match=message):
        ops.layer_norm(**call)


PLAN = {"variant": PORTABLE, "rows": 5, "channels": 8, "eps": 1e-5}
RUN = {"x": 4096, "weight": 1 << 20, "bias": 2 << 20, "out": 3 << 20, "threads": 1}
DOOR = {
    "another op": (PLAN, {"variant": "conv_direct_f32_portable"}, "there is no kernel .* of layer_norm"),
    "rows": (PLAN, {"rows": -1}, "got -1 rows, allowed: from 0"),
    "channels": (PLAN, {"channels": 0}, "got 0 channels, allowed: 1 to"),
    "overflow": (PLAN, {"rows": 2**61, "channels": 2**10}, "sizes overflow"),
    "null": (RUN, {"x": 0}, "x is a null pointer"),
    "odd address": (RUN, {"weight": 4098}, "weight is at 4098, allowed: multiples of 4"),
    "alias": (RUN, {"out": 4096 + 4 * 39}, "out overlaps x"),
    "alias of the bias": (RUN, {"bias": (3 << 20) - 4}, "out overlaps bias"),
    "end of memory": (RUN, {"x": 2**64 - 64}, "x reaches beyond the end of memory"),
    "threads": (RUN, {"threads": 0}, "threads must be at least 1"),
}


@pytest.mark.parametrize("name", DOOR)
def test_the_native_door_checks_before_it_touches_memory(name):
    call, change, message = DOOR[name]
    plan, run = {**PLAN, **(change if call is PLAN else {})}, {**RUN, **(change if call is RUN else {})}
    with pytest.raises(ValueError, match=message):
        table.NATIVE.LayerNormPlan(**plan).run(**run)
