"""depthwise_compose: the reference does what two convolutions do; every kernel row gives its bits."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from updp import ops
from updp.ops import rows as table

KERNELS_DEF = Path(__file__).parents[1] / "csrc" / "kernels.def"
TABLE = re.findall(r"^UPDP_KERNEL\((\w+), (\w+), (\w+), (\w+)\)$", KERNELS_DEF.read_text(), re.MULTILINE)
ROWS = ["_".join(row) for row in TABLE if row[0] == "dwcompose"]
DTYPES = {"f32": torch.float32, "f64": torch.float64}

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
cases = st.fixed_dictionaries(
    {
        "channels": st.integers(0, 70),
        "outer": sizes,
        "inner": sizes,
        "inner_stride": pairs,
        "inner_dilation": pairs,
        "outer_dilation": pairs,
    }
)
# No common grid, the coarsest grid, and more lanes than one group of either dtype holds.
KEYS = ("channels", "outer", "inner", "inner_stride", "inner_dilation", "outer_dilation")
SPARSE = dict(zip(KEYS, (33, (3, 2), (2, 3), (2, 1), (3, 2), (2, 3)), strict=True))
COARSE = dict(zip(KEYS, (17, (3, 3), (3, 1), (2, 1), (2, 1), (1, 2)), strict=True))


def weights(case, dtype=torch.float64):
    generator = torch.Generator().manual_seed(case["channels"] + 1)
    shapes = [(case["channels"], *case[name]) for name in ("outer", "inner")]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def geometry(case):
    return {name: case[name] for name in ("inner_stride", "inner_dilation", "outer_dilation")}


def grid(case):
    """Dilation of the composed weight, from the docstring's formula."""
    axes = zip(case["outer"], case["inner"], *geometry(case).values(), strict=True)
    return tuple(math.gcd(d1 * (k1 > 1), s1 * d2 * (k2 > 1)) or 1 for k2, k1, s1, d1, d2 in axes)


def runnable(name):
    """The row; a test of a row that this CPU cannot run is skipped, loudly."""
    assert ops.kernel_rows(), "updp._C is not built, so no kernel is tested: run the tests through `make test`"
    row = next(row for row in ops.kernel_rows() if row.name == name)
    if not row.available:
        pytest.skip(f"NOT TESTED: {name}, because this CPU has no {row.isa}")
    return row


def test_table_is_what_is_built():
    assert len(TABLE) == len(set(TABLE)) == 24
    assert len(ROWS) == 6
    assert [row.name for row in ops.kernel_rows()] == ["_".join(row) for row in TABLE]
    assert all(row.name == f"{row.op}_{row.algorithm}_{row.dtype}_{row.isa}" for row in ops.kernel_rows())
    assert {row.dtype for row in ops.kernel_rows() if row.isa == "portable" and row.available} == set(DTYPES)
    assert re.fullmatch(r"\d+ of 24 kernels run on this CPU", ops.native_status())


def test_rows_are_available_as_cpu_features_say():
    features = ops.cpu_features()
    needs = {"portable": [], "avx2": ["avx2", "fma"], "avx512": ["avx512f", "avx512dq", "avx512bw", "avx512vl"]}
    for row in ops.kernel_rows():
        assert row.available == all(features.get(name, False) for name in needs[row.isa]), row


@given(case=cases)
@example(case=SPARSE)
@example(case=COARSE)
def test_composition_does_what_two_convolutions_do(case):
    case = {**case, "channels": max(case["channels"], 1)}
    outer, inner = weights(case)
    channels, step = case["channels"], case["inner_stride"]
    composed = ops.depthwise_compose(outer, inner, **geometry(case))
    spans = [(k - 1) * d for k, d in zip(composed.shape[1:], grid(case), strict=True)]
    x = torch.randn(1, channels, spans[0] + 2 * step[0] + 1, spans[1] + 3 * step[1] + 1, dtype=torch.float64)
    middle = F.conv2d(x, inner[:, None], None, step, 0, case["inner_dilation"], channels)
    twice = F.conv2d(middle, outer[:, None], None, 1, 0, case["outer_dilation"], channels)
    once = F.conv2d(x, composed[:, None], None, step, 0, grid(case), channels)
    assert once.shape == twice.shape
    assert (once - twice).abs().max() <= 1e-13 * twice.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ROWS)
@given(case=cases)
@example(case=SPARSE)
@example(case=COARSE)
def test_row_equals_reference_bit_for_bit(name, case):
    outer, inner = weights(case, DTYPES[runnable(name).dtype])
    got = ops.depthwise_compose(outer, inner, **geometry(case), variant=name)
    assert torch.equal(got, ops.depthwise_compose_reference(outer, inner, **geometry(case)))


@pytest.mark.parametrize("name", ROWS)
def test_row_does_not_depend_on_threads(name):
    dtype = DTYPES[runnable(name).dtype]
    outer, inner = torch.randn(2003, 7, 7, dtype=dtype), torch.randn(2003, 5, 5, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(ops.depthwise_compose(outer, inner, variant=name))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], ops.depthwise_compose_reference(outer, inner, (1, 1), (1, 1), (1, 1)))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_best_row_is_the_default(monkeypatch):
    best = next(row.name for row in ops.kernel_rows() if row.op == "dwcompose" and row.dtype == "f64" and row.available)
    ran = []

    class Recorder:
        def dwcompose(self, variant, *arguments):
            ran.append(variant)

    monkeypatch.setattr(table, "NATIVE", Recorder())
    ops.depthwise_compose(*weights(COARSE))
    assert ran == [best]


def test_reference_without_a_build_and_for_other_dtypes(monkeypatch):
    table.forget()
    outer, inner = weights(SPARSE)
    half = ops.depthwise_compose(outer.bfloat16(), inner.bfloat16(), **geometry(SPARSE))
    assert half.dtype == torch.bfloat16
    expected = ops.depthwise_compose(outer, inner, **geometry(SPARSE))
    with monkeypatch.context() as patch:
        patch.setattr(table, "NATIVE", None)
        table.forget()
        assert ops.kernel_rows() == ()
        assert ops.cpu_features() == {}
        assert "not built" in ops.native_status()
        assert torch.equal(ops.depthwise_compose(outer, inner, **geometry(SPARSE)), expected)
    table.forget()


def test_strided_and_empty_weights():
    outer, inner = torch.randn(3, 2, 40, dtype=torch.float64), torch.randn(3, 3, 40, dtype=torch.float64)
    outer, inner = outer.permute(2, 0, 1), inner.transpose(0, 2)
    assert not outer.is_contiguous()
    got = ops.depthwise_compose(outer, inner, (2, 1), (1, 2), (1, 1))
    assert torch.equal(got, ops.depthwise_compose_reference(outer, inner, (2, 1), (1, 2), (1, 1)))
    assert ops.depthwise_compose(torch.zeros(0, 3, 3), torch.zeros(0, 2, 2)).shape == (0, 4, 4)


@pytest.mark.parametrize("case", [SPARSE, COARSE], ids=["sparse", "coarse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(case, dtype):
    outer, inner = (w.requires_grad_() for w in weights(case, dtype))
    arguments = (outer, inner, *geometry(case).values())
    with warnings.catch_warnings():
        # opcheck itself reads .grad of a non-leaf.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        outcome = torch.library.opcheck(torch.ops.updp.depthwise_compose.default, arguments)
    assert len(outcome) >= 4
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", [SPARSE, COARSE], ids=["sparse", "coarse"])
def test_gradients(case):
    outer, inner = (w.requires_grad_() for w in weights({**case, "channels": 2}))

    def compose(outer, inner):
        return ops.depthwise_compose(outer, inner, **geometry(case))

    assert torch.autograd.gradcheck(compose, (outer, inner))
    assert torch.autograd.gradgradcheck(compose, (outer, inner))
    assert torch.autograd.grad(compose(outer.detach(), inner).sum(), inner)[0].shape == inner.shape


def w(*shape, dtype=torch.float64):
    return torch.ones(shape, dtype=dtype)


BAD = {
    "two dimensions": (
        (w(2, 3), w(2, 3, 3)),
        {},
        ValueError,
        r"outer has shape \(2, 3\), need \(C, kh > 0, kw > 0\)",
    ),
    "empty kernel": ((w(2, 3, 3), w(2, 0, 3)), {}, ValueError, r"inner has shape \(2, 0, 3\)"),
    "channels": ((w(2, 3, 3), w(3, 3, 3)), {}, ValueError, "outer has 2 channels, inner 3"),
    "integers": ((w(2, 1, 1, dtype=torch.int64), w(2, 1, 1)), {}, TypeError, "outer has dtype torch.int64"),
    "two dtypes": ((w(2, 1, 1), w(2, 1, 1, dtype=torch.float32)), {}, TypeError, "one dtype and one device"),
    "stride 0": ((w(2, 3, 3), w(2, 3, 3)), {"inner_stride": (0, 1)}, ValueError, r"inner_stride is \(0, 1\)"),
    "dilation": ((w(2, 3, 3), w(2, 3, 3)), {"outer_dilation": (1, -1)}, ValueError, "outer_dilation is"),
    "three strides": ((w(2, 3, 3), w(2, 3, 3)), {"inner_stride": (1, 1, 1)}, ValueError, "need two integers"),
    "huge": (
        (w(2, 3, 3), w(2, 3, 3)),
        {"inner_dilation": (2**30 + 1, 1)},
        ValueError,
        "taps a channel, more than",
    ),
    "variant": (
        (w(2, 3, 3), w(2, 3, 3)),
        {"variant": "fast"},
        ValueError,
        r"variant 'fast', available here .*reference",
    ),
    "variant of another dtype": (
        (w(2, 3, 3), w(2, 3, 3)),
        {"variant": "dwcompose_lanes_f32_portable"},
        ValueError,
        "available here",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        ops.depthwise_compose(*arguments, **options)


DOOR = {
    "unknown kernel": ({"variant": "dwcompose_f16"}, "there is no kernel 'dwcompose_f16' of dwcompose"),
    "dimensions": ({"outer": (8, (2, 3), (3, 1))}, "outer needs three dimensions"),
    "kernel size": ({"inner": (8, (2, 0, 3), (0, 3, 1))}, "inner has a size of 0"),
    "strides": ({"inner": (8, (2, 3, 3), (9, 1, 3))}, "inner is not contiguous"),
    "null": ({"outer": (0, (2, 3, 3), (9, 3, 1))}, "outer is a null pointer"),
    "size": ({"outer": (8, (2**62, 3, 3), (9, 3, 1))}, "size of outer overflows"),
    "out": ({"out": (8, (2, 5, 4), (20, 4, 1))}, "out should be 2 x 5 x 5"),
    "stride": ({"inner_stride": (0, 1)}, "the inner stride is 0, need at least 1"),
    "dilation": ({"outer_dilation": (1, -3)}, "the outer dilation is -3"),
    "overflow": ({"inner_stride": (2**62, 1), "outer_dilation": (4, 1)}, "sizes overflow"),
    "threads": ({"threads": 0}, "threads must be at least 1"),
}


@pytest.mark.parametrize("name", DOOR)
def test_the_native_door_checks_before_it_touches_memory(name):
    change, message = DOOR[name]
    call = {
        "variant": "dwcompose_lanes_f64_portable",
        "outer": (8, (2, 3, 3), (9, 3, 1)),
        "inner": (8, (2, 3, 3), (9, 3, 1)),
        "out": (8, (2, 5, 5), (25, 5, 1)),
        "inner_stride": (1, 1),
        "inner_dilation": (1, 1),
        "outer_dilation": (1, 1),
        "threads": 1,
    }
    with pytest.raises(ValueError, match=message):
        table.NATIVE.dwcompose(**{**call, **change})
