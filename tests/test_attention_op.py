"""attention: every kernel row against the definition in float64, and the doors."""

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
    for row in re.findall(r"^UPDP_KERNEL\((attention), (\w+), (\w+), (\w+)\)$", KERNELS_DEF.read_text(), re.M)
]
# Of the largest |v|, and for each unit of the scores' sums of absolute values: an error of a score is one of its
# exponential, relative to it. Five times what was found.
BOUND = 2e-7
PORTABLE = "attention_tiled_f32_portable"


def runnable(name):
    """The row; a test of a row that this CPU cannot run is skipped, loudly."""
    assert ops.kernel_rows(), "updp._C is not built, so no kernel is tested: run the tests through `make test`"
    row = next(row for row in ops.kernel_rows() if row.name == name)
    if not row.available:
        pytest.skip(f"NOT TESTED: {name}, because this CPU has no {row.isa}")
    return row


class Case:
    """An attention with random sizes, tensors, strides and scale."""

    def __init__(self, seed, products=300_000):
        generator = torch.Generator().manual_seed(seed)

        def between(low, high):
            return int(torch.randint(low, high + 1, (), generator=generator))

        def pick(*choices):
            return choices[between(0, len(choices) - 1)]

        self.threads = between(1, 4)
        depth = pick(1, 3, 8, 16, 32, 64, between(1, 130), between(1, 256))
        queries, keys = pick(1, 14, 49, between(1, 300)), pick(1, 16, 49, 197, between(1, 300))
        width = pick(depth, depth, depth, between(1, 130))
        queries = max(1, min(queries, products // (keys * (depth + width))))
        self.own_scale = pick(None, None, depth**-0.5, -0.3, 0.0, 2.0)
        self.scale = depth**-0.5 if self.own_scale is None else self.own_scale
        room = max(1, products // (queries * keys * (depth + width)))
        batch, heads = min(between(1, 4), room), min(between(1, 3), room)
        strided = pick(self._dense, self._tokens_first, self._packed, self._expanded)
        shapes = [(batch, heads, tokens, size) for tokens, size in ((queries, depth), (keys, depth), (keys, width))]
        self.tensors = [strided(torch.randn(shape, generator=generator)) for shape in shapes]

    @staticmethod
    def _dense(x):
        return x

    @staticmethod
    def _tokens_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    def _packed(x):
        """As a part of a wider tensor that begins anywhere."""
        n, heads, tokens, channels = x.shape
        return torch.empty(n, tokens, heads, channels + 5)[..., 3:-2].transpose(1, 2).copy_(x)

    @staticmethod
    def _expanded(x):
        return x[:1].expand(x.shape)

    def run(self, name, threads=None):
        before = torch.get_num_threads()
        torch.set_num_threads(threads or self.threads)
        try:
            return ops.attention(*self.tensors, self.own_scale, name)
        finally:
            torch.set_num_threads(before)

    def error(self, got):
        """The largest error, as a part of what it can come from."""
        q, k, v = (each.double() for each in self.tensors)
        expected = ops.attention_reference(q, k, v, self.scale)
        assert got.shape == expected.shape
        assert got.transpose(1, 2).is_contiguous()
        sums = (q.abs() @ k.abs().transpose(-1, -2)).amax() * abs(self.scale)
        return ((got - expected).abs().amax() / v.abs().amax() / (1 + sums)).item()


def test_the_rows_are_all_there():
    assert len(ROWS) == len(set(ROWS)) == 3
    assert [row.name for row in ops.kernel_rows() if row.op == "attention"] == ROWS
    best = next(row.name for row in ops.kernel_rows() if row.op == "attention" and row.available)
    assert ops.attention_variants() == [best]


@pytest.mark.parametrize("name", ROWS)
def test_row_is_as_exact_as_it_says(name):
    """400 random cases, 1 to 4 threads."""
    runnable(name)
    errors = [(case := Case(seed)).error(case.run(name)) for seed in range(400)]
    assert max(errors) <= BOUND, errors.index(max(errors))
    assert max(errors) > 1e-9  # float32 was at work


LARGE = {
    "a small transformer": (2, 3, 197, 197, 64, 64),
    "many keys": (1, 2, 30, 1500, 40, 72),
    "many queries": (1, 1, 1100, 33, 256, 20),
    "channels in parts": (1, 1, 20, 50, 700, 300),
}


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("name", ROWS)
def test_large_ones_do_not_depend_on_threads(name, shape):
    runnable(name)
    batch, heads, queries, keys, depth, width = LARGE[shape]
    case = Case(1)
    case.own_scale, case.scale = None, depth**-0.5
    shapes = ((queries, depth), (keys, depth), (keys, width))
    case.tensors = [torch.randn(batch, heads, *each) for each in shapes]
    once = case.run(name, 1)
    assert case.error(once) <= BOUND
    assert all(torch.equal(once, case.run(name, threads)) for threads in (2, 3, 4))


@pytest.mark.parametrize("name", ROWS)
def test_parts_of_a_packed_tensor_need_no_copy(name):
    """q, k and v as a linear layer gives them: the same bits as of dense ones."""
    runnable(name)
    packed = torch.randn(2, 197, 3 * 3 * 64)
    views = packed.reshape(2, 197, 3, 3, 64).permute(2, 0, 3, 1, 4).unbind(0)
    got = ops.attention(*views, None, name)
    assert torch.equal(got, ops.attention(*(each.contiguous() for each in views), None, name))
    assert got.transpose(1, 2).reshape(2, 197, 192).data_ptr() == got.data_ptr()
    torch.testing.assert_close(got, F.scaled_dot_product_attention(*views), rtol=1e-5, atol=1e-6)
    backwards = [each.transpose(-1, -2).contiguous().transpose(-1, -2) for each in views]  # channels apart: copied
    assert torch.equal(got, ops.attention(*backwards, None, name))


@pytest.mark.parametrize("name", [*ROWS, "reference"])
def test_all_in_one_is_the_same(name):
    if name != "reference":
        runnable(name)
    for batch, tokens, heads, depth in ((2, 197, 3, 64), (1, 5, 1, 7), (3, 50, 2, 1), (0, 4, 2, 8)):
        packed = torch.randn(batch, tokens, 3 * heads * depth)
        views = packed.reshape(batch, tokens, 3, heads, depth).permute(2, 0, 3, 1, 4)
        expected = ops.attention(*views, None, name).transpose(1, 2).reshape(batch, tokens, heads * depth)
        got = ops.attention_packed(packed, heads, None, name)
        assert torch.equal(got, expected)
        assert got.is_contiguous()
        apart = packed.transpose(0, 1).contiguous().transpose(0, 1)  # copied
        assert torch.equal(ops.attention_packed(apart, heads, None, name), expected)


@pytest.mark.parametrize("name", ROWS)
def test_large_scores_do_not_overflow(name):
    runnable(name)
    q, k, v = (torch.randn(1, 2, 37, 16) for _ in range(3))
    got = ops.attention(300 * q, k, v, 1.0, name)
    expected = ops.attention_reference(300 * q.double(), k.double(), v.double(), 1.0)
    assert ((got - expected).abs().amax() / v.abs().amax()) <= 1e-3  # scores of thousands, rounded
    top = ops.attention(1e4 * q, q, v, 1.0, name)  # nearly all weight on one key
    assert top.isfinite().all()
    assert top.abs().amax() <= v.abs().amax() * (1 + 1e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_what_is_not_finite_stays_so(name, value, which):
    runnable(name)
    for keys in (1, 16, 37):
        tensors = [torch.randn(1, 2, tokens, 20) for tokens in (41, keys, keys)]
        tensors[which][0, 1, -1, 4] = value
        got = ops.attention(*tensors, None, name)
        expected = ops.attention_reference(*tensors, 20**-0.5)
        assert not got[~expected.isfinite()].isfinite().any()
        assert (~expected.isfinite()).any()
        assert got[:, 0].isfinite().all()  # it stays in its head
        finite = expected.isfinite() & got.isfinite()
        torch.testing.assert_close(got[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_a_nan_of_any_bits_is_one(name):
    runnable(name)
    q, k, v = (torch.randn(1, 1, 20, 8) for _ in range(3))
    q[0, 0, 3, 2] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    got = ops.attention(q, k, v, None, name)
    assert got[0, 0, 3].isnan().all()
    assert got[0, 0, 4:].isfinite().all()


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_written_beside_the_output(name):
    runnable(name)
    q, k, v = torch.randn(2, 3, 15, 5), torch.randn(2, 3, 9, 5), torch.randn(2, 3, 9, 7)
    room = torch.full((2 * 15 * 3 * 7 + 64,), 7.0)
    tensors = (q, k, v)
    plan = table.NATIVE.AttentionPlan(name, *(each.shape for each in tensors), *(each.stride() for each in tensors))
    plan.run(*(each.data_ptr() for each in tensors), room.data_ptr() + 128, 5**-0.5, 1)
    assert (room[:32] == 7).all()
    assert (room[-32:] == 7).all()
    assert torch.equal(room[32:-32].view(2, 15, 3, 7).transpose(1, 2), ops.attention(*tensors, None, name))
    assert ops.attention(q[:0], k[:0], v[:0], None, name).shape == (0, 3, 15, 7)
    assert ops.attention(q[:, :, :0], k, v, None, name).shape == (2, 3, 0, 7)


def test_without_a_build_the_reference_does_the_work(monkeypatch):
    q, k, v = (torch.randn(2, 3, 9, 5) for _ in range(3))
    with monkeypatch.context() as patch:
        patch.setattr(table, "NATIVE", None)
        table.forget()
        assert ops.attention_variants() == []
        got = ops.attention(q, k, v)
        with pytest.raises(ValueError, match=r"got variant .*, available here .*: reference"):
            ops.attention(q, k, v, variant=PORTABLE.replace("tiled", "other"))
    table.forget()
    assert torch.equal(got, ops.attention_reference(q, k, v, 5**-0.5))
    assert ops.attention(q.double(), k.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize("variant", ["reference", PORTABLE])
def test_compile_export_and_opcheck(variant):
    class Network(torch.nn.Module):
        def forward(self, x):
            q, k, v = x.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            return ops.attention(q, k, v, None, variant).transpose(1, 2).flatten(2)

    network, x = Network(), torch.randn(3, 7, 24)
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(torch.compile(network, fullgraph=True, backend="aot_eager")(x), expected)
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module()
        assert torch.equal(exported(x), expected)
        assert exported(torch.randn(5, 7, 24)).shape == (5, 7, 8)
    arguments = (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 7), 0.5, variant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for operator, given in (("attention", arguments), ("attention_packed", (x, 2, 0.5, variant))):
            outcome = torch.library.opcheck(getattr(torch.ops.updp, operator).default, given)
            assert set(outcome.values()) == {"SUCCESS"}


def w(*shape):
    return torch.ones(shape)


BAD = {
    "dimensions": ({"q": w(3, 8, 8)}, ValueError, r"q has shape \(3, 8, 8\), k .*, need \(N, heads, queries, depth\)"),
    "heads": ({"k": w(2, 2, 6, 4)}, ValueError, "q has shape"),
    "depth": ({"k": w(2, 3, 6, 5)}, ValueError, "q has shape"),
    "keys": ({"v": w(2, 3, 7, 4)}, ValueError, r"v \(2, 3, 7, 4\)"),
    "no keys": ({"k": w(2, 3, 0, 4), "v": w(2, 3, 0, 4)}, ValueError, r"k \(2, 3, 0, 4\)"),
    "dtype": ({"v": w(2, 3, 6, 4).double()}, TypeError, "q is torch.float32, k torch.float32, v torch.float64"),
    "variant": ({"variant": "attention_fast_f32_portable"}, ValueError, "got variant 'attention_fast_f32_portable'"),
    "gradient": ({"k": w(2, 3, 6, 4).requires_grad_()}, TypeError, "asks for a gradient"),
}


@pytest.mark.parametrize("variant", ["reference", PORTABLE])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, variant):
    change, error, message = BAD[name]
    if variant == "reference" and name in ("dtype", "variant"):
        pytest.skip("torch says so, or there is nothing to say")
    call = {"q": w(2, 3, 5, 4), "k": w(2, 3, 6, 4), "v": w(2, 3, 6, 4), "variant": variant, **change}
    with pytest.raises(error, match=message):
        ops.attention(**call)


PACKED_BAD = {
    "dimensions": ({"qkv": w(5, 24)}, ValueError, r"together have shape \(5, 24\), need \(N, tokens, 3 \* heads"),
    "heads": ({"heads": 5}, ValueError, r"need \(N, tokens, 3 \* heads \* depth\) of 5 heads"),
    "no heads": ({"heads": 0}, ValueError, "of 0 heads"),
    "no tokens": ({"qkv": w(2, 0, 24)}, ValueError, r"have shape \(2, 0, 24\)"),
    "dtype": ({"qkv": w(2, 5, 24).double()}, TypeError, "together are torch.float64, need float32"),
    "variant": ({"variant": "attention_fast_f32_portable"}, ValueError, "got variant 'attention_fast_f32_portable'"),
    "gradient": ({"qkv": w(2, 5, 24).requires_grad_()}, TypeError, "asks for a gradient"),
}


@pytest.mark.parametrize("variant", ["reference", PORTABLE])
@pytest.mark.parametrize("name", PACKED_BAD)
def test_bad_input_all_in_one_is_named(name, variant):
    change, error, message = PACKED_BAD[name]
    if variant == "reference" and name in ("dtype", "variant"):
        pytest.skip("there is nothing to say")
    with pytest.raises(error, match=message):
        ops.attention_packed(**{"qkv": w(2, 5, 24), "heads": 2, "variant": variant, **change})


SHAPES = {"q": (1, 2, 5, 4), "k": (1, 2, 6, 4), "v": (1, 2, 6, 3)}
PLAN = {"variant": PORTABLE, **SHAPES}
PLAN |= {"q_strides": (40, 20, 4, 1), "k_strides": (48, 24, 4, 1), "v_strides": (36, 18, 3, 1)}
RUN = {"q": 4096, "k": 1 << 20, "v": 2 << 20, "out": 3 << 20, "scale": 1.0, "threads": 1}
DOOR = {
    "another op": (PLAN, {"variant": "conv_direct_f32_portable"}, "there is no kernel .* of attention"),
    "shapes": (PLAN, {"v": (1, 2, 5, 3)}, "q, k and v do not fit each other"),
    "no keys": (PLAN, {"k": (1, 2, 0, 4), "v": (1, 2, 0, 3)}, "the number of keys is 0, allowed: 1 to"),
    "backwards": (PLAN, {"k_strides": (48, -24, 4, 1)}, "k has a stride of -24"),
    "channels apart": (PLAN, {"v_strides": (36, 18, 1, 6)}, "v has a stride of 6, need 1"),
    "far": (PLAN, {"q_strides": (1, 2**62, 4, 1)}, "q reaches too far"),
    "overflow": (
        PLAN, {"q": (1, 2, 2**31 - 1, 2**31 - 1), "k": (1, 2, 6, 2**31 - 1)}, "sizes overflow",
    ),
    "null": (RUN, {"k": 0}, "k is a null pointer"),
    "odd address": (RUN, {"v": 4098}, "v is at 4098, allowed: multiples of 4"),
    "alias": (RUN, {"out": 4096 + 4 * 39}, "out overlaps q"),
    "end of memory": (RUN, {"v": 2**64 - 64}, "v reaches beyond the end of memory"),
    "threads": (RUN, {"threads": 0}, "threads must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOOR)
def test_the_native_door_checks_before_it_touches_memory(name):
    call, change, message = DOOR[name]
    plan, run = {**PLAN, **(change if call is PLAN else {})}, {**RUN, **(change if call is RUN else {})}
    with pytest.raises(ValueError, match=message):
        table.NATIVE.AttentionPlan(**plan).run(**run)
