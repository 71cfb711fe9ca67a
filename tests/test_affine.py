"""The algebra against step-by-step execution: whole map, border ring included, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from updp import affine
from updp.affine import Affine, Same
from updp.errors import MergeError

EXACT = 1e-12
NO_PADS = (0, 0, 0, 0)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value: Tensor, reference: Tensor) -> bool:
    if value.shape != reference.shape:
        return False
    return float((value - reference).abs().max()) <= EXACT * max(float(reference.abs().max()), 1e-30)


def conv(
    out: int,
    inp: int,
    size: int | tuple[int, int] = 1,
    *,
    pads: int | tuple[int, int, int, int] | Same = 0,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
    seed: int = 0,
) -> Affine:
    """A random operator."""
    kernel = (size, size) if isinstance(size, int) else size
    padding = (pads,) * 4 if isinstance(pads, int) else pads
    return Affine(
        rand(out, inp // groups, *kernel, seed=seed),
        rand(out, seed=seed + 1) if bias else None,
        (stride, stride),
        padding,
        (dilation, dilation),
        groups,
    )


def dense(a: Affine) -> Affine:
    """The same operator with one group."""
    return Affine(affine.regroup(a.weight, a.groups, 1), a.bias, a.stride, a.padding, a.dilation, 1, a.taps)


def composition_is_exact(outer: Affine, inner: Affine, x: Tensor) -> bool:
    return close(affine.run(affine.compose(outer, inner), x), affine.run(outer, affine.run(inner, x)))


# --- random operators ---

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
dilations = st.tuples(st.integers(1, 2), st.integers(1, 2))
kernels = st.tuples(st.integers(1, 4), st.integers(1, 4))
four_pads = st.tuples(*[st.integers(0, 3)] * 4)
seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(4, 17), st.integers(4, 17))


def groups_of(out: int, inp: int) -> st.SearchStrategy[int]:
    common = math.gcd(out, inp)
    return st.sampled_from([g for g in range(1, common + 1) if common % g == 0])


@st.composite
def operators(draw, out=None, inp=None, kernel=kernels, stride=pairs, dilation=dilations, pads=four_pads):
    """Any convolution of a few channels: asymmetric padding, even sizes, any groups, with or without bias."""
    channels = st.sampled_from([1, 2, 4, 6, 12])
    out = draw(channels) if out is None else out
    inp = draw(channels) if inp is None else inp
    groups = draw(groups_of(out, inp))
    seed = draw(seeds)
    weight = rand(out, inp // groups, *draw(kernel), seed=seed)
    bias = rand(out, seed=seed + 1) if draw(st.booleans()) else None
    return Affine(weight, bias, draw(stride), draw(pads), draw(dilation), groups)


@st.composite
def maps(draw, channels):
    return rand(2, channels, *draw(sizes), seed=draw(seeds))


def fits(a: Affine, x: Tensor) -> Tensor:
    """Run, or skip the example if the map is too small for the operator."""
    pads = affine.pads_of(a.padding, *x.shape[-2:])
    rows, columns = x.shape[-2] + pads[0] + pads[1], x.shape[-1] + pads[2] + pads[3]
    assume(rows > a.span[0] and columns > a.span[1])
    return affine.run(a, x)


@settings(max_examples=150)
@given(st.data())
def test_compose_with_an_unpadded_outer_operator_is_exact(data):
    inner = data.draw(operators())
    outer = data.draw(operators(inp=inner.out_channels, pads=st.just(NO_PADS)))
    x = data.draw(maps(inner.in_channels))
    expected = fits(outer, fits(inner, x))
    assert close(affine.run(affine.compose(outer, inner), x), expected)


@settings(max_examples=150)
@given(st.data())
def test_compose_of_a_padded_operator_after_a_pointwise_one_is_exact(data):
    """Strided pointwise operators and biased ones included: the bias becomes a bias per tap."""
    inner = data.draw(operators(kernel=st.just((1, 1)), pads=st.just(NO_PADS)))
    outer = data.draw(operators(inp=inner.out_channels))
    x = data.draw(maps(inner.in_channels))
    expected = fits(outer, fits(inner, x))
    composed = affine.compose(outer, inner)
    assert (composed.taps is not None) == (inner.bias is not None and outer.padding != NO_PADS)
    assert close(affine.run(composed, x), expected)


@settings(max_examples=100)
@given(st.data())
def test_compose_is_exact_where_the_inner_operator_sees_only_zeros_outside(data):
    inner = data.draw(operators(pads=st.just(NO_PADS)))
    extra = data.draw(four_pads)
    span = (inner.span[0], inner.span[0], inner.span[1], inner.span[1])
    pads = tuple(s + e for s, e in zip(span, extra, strict=True))
    inner = Affine(inner.weight, None, inner.stride, pads, inner.dilation, inner.groups)
    outer = data.draw(operators(inp=inner.out_channels))
    x = data.draw(maps(inner.in_channels))
    expected = fits(outer, fits(inner, x))
    assert close(affine.run(affine.compose(outer, inner), x), expected)


@settings(max_examples=300)
@given(st.data())
def test_any_chain_of_three_is_exact_or_refused(data):
    """Bias maps travel through what follows and precedes them; either bracketing gives the same operator."""
    stride = st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 2), (1, 2)])
    narrow = st.sampled_from([(1, 1), (1, 1), (3, 3), (2, 3)])
    few = st.sampled_from([NO_PADS, NO_PADS, (1, 1, 1, 1), (2, 2, 2, 2), (0, 1, 2, 1)])
    first = data.draw(operators(kernel=narrow, pads=few, stride=stride))
    second = data.draw(operators(inp=first.out_channels, kernel=narrow, pads=few, stride=stride))
    third = data.draw(operators(inp=second.out_channels, kernel=narrow, pads=few, stride=stride))
    x = data.draw(maps(first.in_channels))
    expected = fits(third, fits(second, fits(first, x)))
    accepted = 0
    for build in (
        lambda: affine.compose(third, affine.compose(second, first)),
        lambda: affine.compose(affine.compose(third, second), first),
    ):
        try:
            composed = build()
        except MergeError:
            continue
        accepted += 1
        assert close(affine.run(composed, x), expected)
    assume(accepted)


@settings(max_examples=150)
@given(st.data())
def test_add_is_exact(data):
    """Branches of other kernel sizes, dilations, groups and paddings, as long as their maps have one size."""
    first = data.draw(operators())
    second = data.draw(operators(first.out_channels, first.in_channels, stride=st.just(first.stride)))
    growth = [sum(first.padding[2 * i : 2 * i + 2]) - first.span[i] for i in (0, 1)]
    pads = []
    for axis in (0, 1):
        total = growth[axis] + second.span[axis]
        assume(total >= 0)
        before = data.draw(st.integers(0, total))
        pads += [before, total - before]
    second = Affine(second.weight, second.bias, second.stride, tuple(pads), second.dilation, second.groups)
    x = data.draw(maps(first.in_channels))
    expected = fits(first, x) + fits(second, x)
    assert close(affine.run(affine.add(first, second), x), expected)
    assert close(affine.run(affine.add(second, first), x), expected)


@settings(max_examples=100)
@given(st.data())
def test_add_keeps_bias_maps(data):
    """An inverted residual with its padding left inside, and a shortcut."""
    stride = data.draw(st.sampled_from([1, 2]))
    expand = conv(12, 4, seed=data.draw(seeds))
    depthwise = conv(12, 12, 3, pads=1, groups=12, stride=stride, seed=data.draw(seeds))
    project = conv(4, 12, seed=data.draw(seeds))
    shortcut = affine.identity(4) if stride == 1 else conv(4, 4, stride=2, seed=data.draw(seeds))
    branch = affine.compose(project, affine.compose(depthwise, expand))
    x = data.draw(maps(4))
    expected = affine.run(project, affine.run(depthwise, affine.run(expand, x))) + affine.run(shortcut, x)
    for whole in (affine.add(branch, shortcut), affine.add(shortcut, branch)):
        assert whole.taps is not None
        assert whole.kernel_size == (3, 3)
        assert close(affine.run(whole, x), expected)


# --- what is refused, and why that is right ---


def naive(outer: Affine, inner: Affine) -> Affine:
    """What an engine without border care would do: pads added, biases summed."""
    bare_outer = Affine(outer.weight, outer.bias, outer.stride, NO_PADS, outer.dilation, outer.groups)
    composed = affine.compose(bare_outer, inner)
    steps = (inner.stride[0], inner.stride[0], inner.stride[1], inner.stride[1])
    pads = tuple(i + s * o for i, s, o in zip(inner.padding, steps, outer.padding, strict=True))
    return Affine(composed.weight, composed.bias, composed.stride, pads, composed.dilation, composed.groups)


REFUSED = {
    "3x3 p1 after 3x3 p1, biases": (conv(3, 4, 3, pads=1), conv(4, 2, 3, pads=1, seed=7)),
    "3x3 p1 after 3x3 p1, no biases": (
        conv(3, 4, 3, pads=1, bias=False),
        conv(4, 2, 3, pads=1, bias=False, seed=7),
    ),
    "3x3 p1 after 3x3 p0": (conv(3, 4, 3, pads=1), conv(4, 2, 3, bias=False, seed=7)),
    "3x3 p1 after biased 3x3 p2": (conv(3, 4, 3, pads=1), conv(4, 2, 3, pads=2, seed=7)),
    "pad after 3x3 p1": (affine.pad(4, (1, 1, 1, 1)), conv(4, 2, 3, pads=1, bias=False, seed=7)),
    "padded at the top only": (conv(3, 4, 3, pads=(1, 0, 0, 0)), conv(4, 2, 3, pads=1, bias=False, seed=7)),
    "3x3 p1 after 3x3 s2 p1": (conv(3, 4, 3, pads=1), conv(4, 2, 3, pads=1, stride=2, bias=False, seed=7)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_right(case):
    """The naive composition is right in the interior and wrong in the ring."""
    outer, inner = REFUSED[case]
    with pytest.raises(MergeError):
        affine.compose(outer, inner)
    x = rand(2, 2, 13, 14, seed=3)
    expected = affine.run(outer, affine.run(inner, x))
    merged = affine.run(naive(outer, inner), x)
    error = (merged - expected).abs().amax(dim=(0, 1)) / expected.abs().max()
    assert error.max() > 1e-3
    assert error[2:-2, 2:-2].max() < 1e-13


@pytest.mark.parametrize("bias", [True, False])
def test_the_remedy_of_a_refusal_is_exact(bias):
    """All padding in front: what the pruned flow then trains is what the merged layer computes."""
    outer, inner = conv(3, 4, 3, bias=bias), conv(4, 2, 3, pads=2, bias=bias, seed=7)
    assert composition_is_exact(outer, inner, rand(2, 2, 13, 14, seed=3))


def test_a_bias_map_behind_padding_is_refused():
    """Taps that lie on padding in the middle of a run are not those on padding at its front."""
    tapped = affine.compose(conv(4, 6, 3, pads=1), conv(6, 4, seed=5))
    assert tapped.taps is not None
    for inner in (affine.pad(4, (1, 1, 1, 1)), conv(4, 4, 3, pads=2, bias=False), conv(4, 4, 3, bias=False)):
        with pytest.raises(MergeError, match="bias per tap"):
            affine.compose(tapped, inner)


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(MergeError, match="3 input channels do not fit 4 output channels"):
        affine.compose(conv(2, 3), conv(4, 2))


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (conv(3, 2, stride=2), "stride"),
        (conv(4, 2), "channels"),
        (conv(3, 2, 3), "sizes"),
        (conv(3, 2, 3, pads=(1, 0, 1, 1)), "sizes"),
        (conv(3, 2, 3, pads=Same((3, 3), (1, 1))), "alignment"),
    ],
)
def test_sums_that_are_no_convolution_are_refused(second, reason):
    with pytest.raises(MergeError, match=reason):
        affine.add(conv(3, 2), second)


# --- SAME ---


def same_by_definition(a: Affine, x: Tensor) -> Tensor:
    """Output ``ceil(size / stride)``, the odd pixel at the bottom and at the right."""
    pads: list[int] = []
    for axis in (1, 0):  # F.pad counts from the last axis
        size = x.shape[2 + axis]
        out = -(-size // a.stride[axis])
        total = max(0, (out - 1) * a.stride[axis] + a.span[axis] + 1 - size)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), a.weight, a.bias, a.stride, 0, a.dilation, a.groups)


def same_conv(
    out: int, inp: int, size: int, stride: int, *, dilation: int = 1, groups: int = 1, seed: int = 0
) -> Affine:
    padding = affine.same_padding((size, size), (stride, stride), (dilation, dilation))
    return conv(out, inp, size, pads=padding, stride=stride, dilation=dilation, groups=groups, seed=seed)


@given(st.sampled_from([1, 2, 3, 5]), st.integers(1, 3), st.integers(1, 2), sizes, seeds)
def test_same_padding_is_tensorflows(size, stride, dilation, hw, seed):
    a = same_conv(3, 2, size, stride, dilation=dilation, seed=seed)
    assert isinstance(a.padding, Same) == (stride != 1 and size != 1)
    x = rand(2, 2, *hw, seed=seed)
    expected = same_by_definition(a, x)
    assert expected.shape[-2:] == tuple(math.ceil(n / stride) for n in hw)
    assert close(affine.run(a, x), expected)


@given(st.sampled_from([2, 3, 5]), st.integers(1, 3), sizes, seeds)
def test_same_padding_stays_dynamic_in_a_composition(size, stride, hw, seed):
    """Behind a biased 1x1 with a bias map, before a 1x1, and as a pad in front: exact at every size."""
    expand, depthwise = conv(8, 3, seed=seed), same_conv(8, 8, size, stride, groups=8, seed=seed + 2)
    project = conv(5, 8, seed=seed + 4)
    x = rand(2, 3, *hw, seed=seed)
    kept = affine.compose(project, affine.compose(depthwise, expand))
    expected = affine.run(project, affine.run(depthwise, affine.run(expand, x)))
    assert kept.taps is not None
    assert close(affine.run(kept, x), expected)
    bare = Affine(depthwise.weight, depthwise.bias, depthwise.stride, groups=8)
    first = affine.pad(3, depthwise.padding)
    moved = affine.compose(project, affine.compose(bare, affine.compose(expand, first)))
    expected = affine.run(project, affine.run(bare, affine.run(expand, affine.run(first, x))))
    assert moved.taps is None
    assert close(affine.run(moved, x), expected)


def test_same_padding_without_fixed_alignment_is_refused():
    strided = same_conv(4, 4, 3, 2)
    for outer, inner in (
        (strided, conv(4, 4, 3, pads=1)),  # SAME behind another padded operator
        (strided, conv(4, 4, stride=2)),
        (conv(4, 4, 3, pads=1), strided),
        (strided, same_conv(4, 4, 3, 2)),
    ):
        with pytest.raises(MergeError):
            affine.compose(outer, inner)
    with pytest.raises(MergeError):  # a 3x3 SAME pads 1 in all at even sizes, 2 at odd: the shortcut moves
        affine.add(strided, conv(4, 4, stride=2))
    both = affine.add(strided, same_conv(4, 4, 3, 2, seed=9))
    x = rand(1, 4, 9, 10, seed=0)
    assert close(affine.run(both, x), affine.run(strided, x) + affine.run(same_conv(4, 4, 3, 2, seed=9), x))


# --- pieces ---


@given(operators(pads=four_pads), seeds)
def test_identity_is_the_unit(a, seed):
    x = rand(1, a.in_channels, 12, 11, seed=seed)
    expected = fits(a, x)
    before = affine.compose(a, affine.identity(a.in_channels))
    behind = affine.compose(affine.identity(a.out_channels), a)
    for composed in (before, behind):
        assert torch.equal(composed.weight, a.weight)
        assert (composed.stride, composed.padding, composed.groups) == (a.stride, a.padding, a.groups)
        assert close(affine.run(composed, x), expected)


@pytest.mark.parametrize(("out", "inp", "groups"), [(8, 4, 4), (12, 12, 12), (6, 12, 6), (4, 8, 2), (5, 3, 1)])
def test_regroup_is_the_same_operator(out, inp, groups):
    a = conv(out, inp, (3, 2), groups=groups)
    x = rand(2, inp, 6, 7, seed=1)
    for fewer in (g for g in range(1, groups + 1) if groups % g == 0):
        wide = affine.regroup(a.weight, groups, fewer)
        assert wide.shape == (out, inp // fewer, 3, 2)
        assert int((wide != 0).sum()) == a.weight.numel()
        assert close(F.conv2d(x, wide, a.bias, groups=fewer), affine.run(a, x))


@pytest.mark.parametrize("outer_multiplier", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_depthwise_chains_stay_depthwise_and_equal_the_dense_path(outer_multiplier, stride, dilation):
    inner = conv(6, 6, (3, 2), pads=1, stride=stride, groups=6, seed=1)
    outer = conv(6 * outer_multiplier, 6, 3, dilation=dilation, groups=6, seed=2)
    fast = affine.compose(outer, inner)
    slow = affine.compose(dense(outer), dense(inner))
    assert fast.groups == 6
    assert fast.depthwise == (outer_multiplier == 1)
    assert slow.groups == 1
    assert close(affine.regroup(fast.weight, 6, 1), slow.weight)
    assert close(fast.bias, slow.bias)
    assert composition_is_exact(outer, inner, rand(1, 6, 15, 13, seed=3))


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize("learned", [True, False])
def test_batchnorm_uses_its_own_eps(eps, learned):
    mean, var = rand(5, seed=0), rand(5, seed=1).abs() * 0.1
    weight, bias = (rand(5, seed=2), rand(5, seed=3)) if learned else (None, None)
    x = rand(2, 5, 4, 3, seed=4)
    expected = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    assert close(affine.run(affine.batchnorm(mean, var, weight, bias, eps), x), expected)
    wrong = affine.run(affine.batchnorm(mean, var, weight, bias, eps * 2), x)
    assert not close(wrong, expected)


def test_negate_and_diagonal():
    x = rand(2, 5, 4, 3, seed=0)
    assert torch.equal(affine.run(affine.negate(5), x), -x)
    scale, shift = rand(5, seed=1), rand(5, seed=2)
    expected = x * scale[:, None, None] + shift[:, None, None]
    assert close(affine.run(affine.diagonal(scale, shift), x), expected)


@pytest.mark.parametrize(("old", "new"), [(7, 3), (3, 1), (5, 5), (4, 2)])
def test_centre_crop_takes_the_middle(old, new):
    weight = rand(2, 3, old, old, seed=0)
    cropped = affine.centre_crop(weight, new)
    edge = (old - new) // 2
    assert torch.equal(cropped, weight[:, :, edge : old - edge, edge : old - edge])
    cropped.zero_()
    assert weight.abs().min() > 0, "the crop is a copy"


def test_centre_crop_refuses_to_grow():
    with pytest.raises(MergeError, match="centre 5x5 of a 3x3"):
        affine.centre_crop(rand(1, 1, 3, 3, seed=0), 5)


def test_dtype_and_device_follow_the_weights():
    single = Affine(torch.randn(4, 4, 3, 3), torch.randn(4))
    unit = affine.identity(4, like=single.weight)
    assert affine.compose(single, unit).weight.dtype == torch.float32
    assert affine.pad(4, (1, 1, 1, 1), like=single.weight).weight.dtype == torch.float32
