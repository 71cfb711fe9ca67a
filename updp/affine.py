"""The algebra of affine convolutions: the readable definition that everything merged is held to.

Every linear operator on a feature map is one object, `Affine`: a weight ``(O, I/groups, kh, kw)``, a bias ``(O,)``,
stride, padding, dilation and groups. A linear layer is a 1x1, a batch norm in eval mode or a layer scale is a
depthwise 1x1, the identity is the unit, a pad is the unit with padding. Think of a weight as indexed by *offset*
(dilation * tap - padding): `compose` adds offsets, `add` aligns them.

Both are exact inside a map. At borders `compose` is exact only where the inner map, evaluated outside, equals the
zeros that the outer padding puts there; otherwise it repairs the ring with `Affine.taps` (a bias per tap, summed
over the taps that lie on the map) where that is exact, or raises `MergeError`. It never approximates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from updp.errors import MergeError
from updp.ops import depthwise_compose

Pair: TypeAlias = tuple[int, int]
Pads: TypeAlias = tuple[int, int, int, int]  # top, bottom, left, right
NO_PADS: Pads = (0, 0, 0, 0)


@dataclass(frozen=True)
class Same:
    """TensorFlow's SAME padding of one convolution: as much as makes the output ``ceil(size / stride)`` long."""

    kernel_size: Pair
    stride: Pair
    dilation: Pair = (1, 1)

    def pads(self, height: int, width: int) -> Pads:
        """Top, bottom, left and right padding of a map of ``height x width``; the odd pixel goes bottom and right."""
        out = []
        for size, k, s, d in zip((height, width), self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            out += [total // 2, total - total // 2]
        return (out[0], out[1], out[2], out[3])


Padding: TypeAlias = Pads | Same


def same_padding(kernel_size: Pair, stride: Pair, dilation: Pair) -> Padding:
    """SAME padding; at stride 1, and of a 1x1, it does not depend on the size and becomes four integers."""
    if stride == (1, 1) or kernel_size == (1, 1):
        totals = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
        return (totals[0] // 2, totals[0] - totals[0] // 2, totals[1] // 2, totals[1] - totals[1] // 2)
    return Same(kernel_size, stride, dilation)


@dataclass(frozen=True, eq=False)
class Affine:
    """One affine convolution.

    Shapes: ``weight (O, I/groups, kh, kw)``; ``bias (O,)`` or None where there is none by construction;
    ``taps (O, kh, kw)`` or None: what each tap adds to an output where that tap lies on the map (not on padding).
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Pair = (1, 1)
    padding: Padding = NO_PADS
    dilation: Pair = (1, 1)
    groups: int = 1
    taps: Tensor | None = None

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def kernel_size(self) -> Pair:
        return (self.weight.shape[2], self.weight.shape[3])

    @property
    def depthwise(self) -> bool:
        """One input channel per output channel, in order."""
        return self.groups == self.out_channels and self.weight.shape[1] == 1

    @property
    def pointwise(self) -> bool:
        """Sees one position only and nothing outside the map: 1x1, not padded."""
        return self.kernel_size == (1, 1) and self.padding == NO_PADS

    def to(self, device: torch.device) -> Affine:
        if self.weight.device == device:
            return self
        bias, taps = (None if t is None else t.to(device) for t in (self.bias, self.taps))
        return replace(self, weight=self.weight.to(device), bias=bias, taps=taps)

    @property
    def span(self) -> Pair:
        """How many pixels beyond the first tap the last one reaches."""
        return (
            (self.kernel_size[0] - 1) * self.dilation[0],
            (self.kernel_size[1] - 1) * self.dilation[1],
        )


def identity(channels: int, *, like: Tensor | None = None) -> Affine:
    """The unit of `compose`: a depthwise 1x1 of ones."""
    dtype, device = (like.dtype, like.device) if like is not None else (torch.float64, None)
    return Affine(torch.ones(channels, 1, 1, 1, dtype=dtype, device=device), groups=channels)


def diagonal(scale: Tensor, shift: Tensor | None = None) -> Affine:
    """A per-channel scale ``(C,)`` and shift ``(C,)``, as a depthwise 1x1."""
    return Affine(scale.reshape(-1, 1, 1, 1), shift, groups=scale.numel())


def batchnorm(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
    """A batch norm in eval mode with its *own* eps: ``weight * (x - mean) / sqrt(var + eps) + bias``."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return diagonal(scale, shift if bias is None else shift + bias)


def pad(channels: int, padding: Padding, *, like: Tensor | None = None) -> Affine:
    """The unit behind zero padding: an output larger than its input."""
    return replace(identity(channels, like=like), padding=padding)


def negate(channels: int, *, like: Tensor | None = None) -> Affine:
    """Minus the identity."""
    unit = identity(channels, like=like)
    return replace(unit, weight=-unit.weight)


def regroup(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """The same operator written with ``fewer`` groups: zeros between the groups that become one."""
    if groups == fewer:
        return weight
    out, per_group, kh, kw = weight.shape
    joined = groups // fewer
    blocks = weight.reshape(fewer, joined, out // groups, per_group, kh, kw)
    wide = weight.new_zeros(fewer, joined, out // groups, joined, per_group, kh, kw)
    index = torch.arange(joined, device=weight.device)
    wide[:, index, :, index] = blocks.permute(1, 0, 2, 3, 4, 5)
    return wide.reshape(out, joined * per_group, kh, kw)


def centre_crop(weight: Tensor, size: int) -> Tensor:
    """The middle ``size x size`` taps of a weight ``(O, I, kh, kw)`` (UPDP's kernel change 7 -> 3 and 3 -> 1)."""
    top, left = (weight.shape[2] - size) // 2, (weight.shape[3] - size) // 2
    if top < 0 or left < 0:
        raise MergeError(f"cannot take the centre {size}x{size} of a {weight.shape[2]}x{weight.shape[3]} weight")
    return weight[:, :, top : top + size, left : left + size].clone()


def compose(outer: Affine, inner: Affine) -> Affine:
    """``outer`` after ``inner``: offsets add (``a_f + s_f * a_g``), strides multiply, channels contract.

    ``W[o, i, a_f + s_f a_g] = sum_m W_g[o, m, a_g] W_f[m, i, a_f]`` and ``b = b_g + sum_{m, a} W_g b_f``
    (UPDP section "reparameterization"; DepthShrinker eq. 6).

    Raises:
        MergeError: the channels do not fit, or the composition is not exact at the borders.
    """
    if outer.in_channels != inner.out_channels:
        raise MergeError(f"{outer.in_channels} input channels do not fit {inner.out_channels} output channels")
    if outer.taps is not None and not inner.pointwise:
        raise MergeError("a bias per tap knows only the map it was made for: nothing padded or wider can go in front")
    padding = _composed_padding(outer, inner)
    weight, groups, dilation = _contract(outer, inner)
    bias, taps = _composed_bias(outer, inner)
    stride = (outer.stride[0] * inner.stride[0], outer.stride[1] * inner.stride[1])
    return Affine(weight, bias, stride, padding, dilation, groups, taps)


def _composed_padding(outer: Affine, inner: Affine) -> Padding:
    """Offsets add, so paddings add, the outer one in steps of the inner stride; exact cases only."""
    if outer.padding == NO_PADS:
        return inner.padding
    if isinstance(outer.padding, Same) or isinstance(inner.padding, Same):
        if inner.pointwise and inner.stride == (1, 1):
            return outer.padding
        raise MergeError("SAME padding behind another padded or strided operator has no fixed alignment")
    if inner.kernel_size != (1, 1) or inner.padding != NO_PADS:
        _check_sees_only_zeros(outer, inner)
    sh, sw = inner.stride
    t, b, le, r = outer.padding
    it, ib, il, ir = inner.padding
    return (it + sh * t, ib + sh * b, il + sw * le, ir + sw * r)


def _check_sees_only_zeros(outer: Affine, inner: Affine) -> None:
    """Outside its map the inner operator must see only zeros: padding >= span on every side padded again.

    Enough at any stride: the first position behind ``n`` outputs reads from ``n * stride - padding before`` on,
    which is at least ``size + padding behind - span``.
    """
    assert not isinstance(inner.padding, Same) and not isinstance(outer.padding, Same)
    span = (inner.span[0], inner.span[0], inner.span[1], inner.span[1])
    wrong = any(o > 0 and i < s for o, i, s in zip(outer.padding, inner.padding, span, strict=True))
    if wrong or inner.bias is not None or inner.taps is not None:
        kind = f"{inner.kernel_size[0]}x{inner.kernel_size[1]}"
        raise MergeError(
            f"a padded operator after a {kind} one is wrong in the border ring, and no bias map repairs it;"
            " move the padding to the front of the run (padding: first)"
        )


def _contract(outer: Affine, inner: Affine) -> tuple[Tensor, int, Pair]:
    """The composed weight, its groups and its dilation."""
    dilation = _common_dilation(outer, inner)
    if outer.depthwise and inner.depthwise:
        weight = depthwise_compose(outer.weight[:, 0], inner.weight[:, 0], inner.stride, inner.dilation, outer.dilation)
        return weight[:, None], outer.out_channels, dilation
    groups = _composed_groups(outer, inner)
    # One tap of the outer weight spreads the inner weight over a lattice of the composed one.
    step = [s * d // g for s, d, g in zip(inner.stride, outer.dilation, dilation, strict=True)]
    apart = [max(d // g, 1) for d, g in zip(inner.dilation, dilation, strict=True)]
    reach = [(k - 1) * a + 1 for k, a in zip(inner.kernel_size, apart, strict=True)]
    size = [(k - 1) * s + r for k, s, r in zip(outer.kernel_size, step, reach, strict=True)]
    weight = outer.weight.new_zeros(outer.out_channels, inner.in_channels // groups, *size)
    product = _products(outer, inner, groups)
    for y in range(outer.kernel_size[0]):
        rows = slice(y * step[0], y * step[0] + reach[0], apart[0])
        for x in range(outer.kernel_size[1]):
            columns = slice(x * step[1], x * step[1] + reach[1], apart[1])
            weight[:, :, rows, columns] += product(y, x)
    return weight, groups, dilation


def _composed_groups(outer: Affine, inner: Affine) -> int:
    """A depthwise operator keeps the other's groups."""
    if outer.depthwise:
        return inner.groups
    if inner.depthwise:
        return outer.groups
    return math.gcd(outer.groups, inner.groups)


def _common_dilation(outer: Affine, inner: Affine) -> Pair:
    """The coarsest grid on which all offsets of a composition lie."""
    out = []
    for axis in (0, 1):
        a = inner.dilation[axis] if inner.kernel_size[axis] > 1 else 0
        b = inner.stride[axis] * outer.dilation[axis] if outer.kernel_size[axis] > 1 else 0
        out.append(math.gcd(a, b) or 1)
    return (out[0], out[1])


def _products(outer: Affine, inner: Affine, groups: int) -> Callable[[int, int], Tensor]:
    """A function (y, x) -> the inner weight seen through tap (y, x) of the outer one, ``(O, I/groups, kh, kw)``."""
    if outer.depthwise:
        return lambda y, x: outer.weight[:, :, y, x, None, None] * inner.weight
    if inner.depthwise:
        per_group = inner.weight[:, 0].reshape(groups, -1, *inner.kernel_size)
        expanded = per_group.repeat_interleave(outer.out_channels // groups, dim=0)
        return lambda y, x: outer.weight[:, :, y, x, None, None] * expanded
    left = regroup(outer.weight, outer.groups, groups)
    right = regroup(inner.weight, inner.groups, groups)
    left = left.reshape(groups, -1, *left.shape[1:])
    right = right.reshape(groups, right.shape[0] // groups, -1)
    shape = (outer.out_channels, inner.in_channels // groups, *inner.kernel_size)
    return lambda y, x: torch.bmm(left[..., y, x], right).reshape(shape)


def _through(outer: Affine, values: Tensor) -> Tensor:
    """What each outer tap makes of inner channel values: ``(M, ...) -> (O, kh, kw, ...)``."""
    groups = outer.groups
    weight = outer.weight.reshape(groups, outer.out_channels // groups, -1, *outer.kernel_size)
    grouped = values.reshape(groups, weight.shape[2], -1)
    out = torch.einsum("gomyx,gmv->goyxv", weight, grouped)
    return out.reshape(outer.out_channels, *outer.kernel_size, *values.shape[1:])


def _composed_bias(outer: Affine, inner: Affine) -> tuple[Tensor | None, Tensor | None]:
    """Bias and tap bias of a composition. Behind outer padding an inner bias exists on the map only: tap bias."""
    bias, taps = outer.bias, outer.taps
    if inner.bias is not None:
        spread = _through(outer, inner.bias)
        if outer.padding == NO_PADS:
            total = spread.sum(dim=(1, 2))
            bias = total if bias is None else bias + total
        else:
            taps = spread if taps is None else taps + spread
    if inner.taps is not None:
        # The inner taps read a map of ones: one more input channel, contracted like the others.
        ones = Affine(inner.taps[:, None], stride=inner.stride, dilation=inner.dilation)
        merged, _, _ = _contract(replace(outer, weight=regroup(outer.weight, outer.groups, 1), groups=1), ones)
        if taps is not None and taps.shape != merged[:, 0].shape:
            raise MergeError("two bias maps of different reach meet in one run")
        taps = merged[:, 0] if taps is None else taps + merged[:, 0]
    return bias, taps


def add(first: Affine, second: Affine) -> Affine:
    """Parallel branches: offsets align, weights and biases add (identity and strided 1x1 shortcuts included).

    Raises:
        MergeError: the branches differ in channels, stride or output size, or have no fixed alignment.
    """
    if (first.in_channels, first.out_channels) != (second.in_channels, second.out_channels):
        raise MergeError("the branches of a sum differ in channels")
    if first.stride != second.stride:
        raise MergeError(f"the branches of a sum differ in stride: {first.stride} and {second.stride}")
    groups = math.gcd(first.groups, second.groups)
    if isinstance(first.padding, Same) or isinstance(second.padding, Same):
        if (first.padding, first.kernel_size, first.dilation) != (
            second.padding,
            second.kernel_size,
            second.dilation,
        ):
            raise MergeError("SAME padding with stride > 1 and another branch have no fixed alignment")
        geometry = (first.kernel_size, first.padding, first.dilation)
    else:
        geometry = _union_geometry(first, second)
    parts = [_on_grid(branch, groups, *geometry) for branch in (first, second)]
    return replace(
        parts[0],
        weight=parts[0].weight + parts[1].weight,
        bias=_sum_optional(first.bias, second.bias),
        taps=_sum_optional(parts[0].taps, parts[1].taps),
    )


def _sum_optional(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _union_geometry(first: Affine, second: Affine) -> tuple[Pair, Pads, Pair]:
    """Kernel size, padding and dilation of the smallest grid that holds both branches' offsets."""
    sizes, pads, dilations = [], [], []
    for axis in (0, 1):
        before = [a.padding[2 * axis] for a in (first, second)]  # type: ignore[index]
        growth = [sum(a.padding[2 * axis : 2 * axis + 2]) - a.span[axis] for a in (first, second)]  # type: ignore[index]
        if growth[0] != growth[1]:
            raise MergeError("the branches of a sum give maps of different sizes")
        steps = [a.dilation[axis] if a.kernel_size[axis] > 1 else 0 for a in (first, second)]
        dilation = math.gcd(*steps, before[0] - before[1]) or 1
        lead = max(before)
        last = max(a.span[axis] - p for a, p in zip((first, second), before, strict=True))
        sizes.append((lead + last) // dilation + 1)
        pads += [lead, growth[0] + last]
        dilations.append(dilation)
    return (sizes[0], sizes[1]), (pads[0], pads[1], pads[2], pads[3]), (dilations[0], dilations[1])


def _on_grid(a: Affine, groups: int, size: Pair, padding: Padding, dilation: Pair) -> Affine:
    """The same operator on a larger grid of taps, zeros elsewhere."""
    weight = regroup(a.weight, a.groups, groups)
    taps = a.taps
    if (a.kernel_size, a.padding, a.dilation) != (size, padding, dilation):
        assert not isinstance(padding, Same) and not isinstance(a.padding, Same)
        top = (padding[0] - a.padding[0]) // dilation[0]
        left = (padding[2] - a.padding[2]) // dilation[1]
        rows = top + torch.arange(a.kernel_size[0], device=weight.device) * a.dilation[0] // dilation[0]
        columns = left + torch.arange(a.kernel_size[1], device=weight.device) * a.dilation[1] // dilation[1]
        wide = weight.new_zeros(*weight.shape[:2], *size)
        wide[:, :, rows[:, None], columns] = weight
        weight = wide
        if taps is not None:
            wide = taps.new_zeros(taps.shape[0], *size)
            wide[:, rows[:, None], columns] = taps
            taps = wide
    return Affine(weight, a.bias, a.stride, padding, dilation, groups, taps)


def pads_of(padding: Padding, height: int, width: int) -> Pads:
    """Top, bottom, left and right padding of a map of ``height x width``."""
    return padding.pads(height, width) if isinstance(padding, Same) else padding


def run(a: Affine, x: Tensor) -> Tensor:
    """Apply to a map ``(N, I, H, W)``: the reference of every merged layer."""
    top, bottom, left, right = pads_of(a.padding, x.shape[-2], x.shape[-1])
    pads = (left, right, top, bottom)
    out = F.conv2d(F.pad(x, pads), a.weight, a.bias, a.stride, 0, a.dilation, a.groups)
    if a.taps is not None:
        ones = F.pad(x.new_ones(1, 1, *x.shape[-2:]), pads)
        out = out + F.conv2d(ones, a.taps[:, None], None, a.stride, 0, a.dilation)
    return out
