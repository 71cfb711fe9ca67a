"""``depthwise_compose``: the weight of two depthwise convolutions, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from updp.ops import rows as table

Pair: TypeAlias = tuple[int, int]

_MAX_TAPS = 2**20  # of one composed channel (1024 x 1024); more is a mistake in a stride or a dilation


class _Axis(NamedTuple):
    """One axis: inner tap ``a`` and outer tap ``b`` meet at ``a * inner_step + b * outer_step``."""

    grid: int  # dilation of the composed weight
    size: int
    inner_step: int
    outer_step: int
    inner_size: int

    def window(self, outer_tap: int) -> slice:
        """Where the whole inner weight lands when seen through one outer tap."""
        start = outer_tap * self.outer_step
        return slice(start, start + (self.inner_size - 1) * self.inner_step + 1, self.inner_step)


def _axis(outer_size: int, inner_size: int, stride: int, inner_dilation: int, outer_dilation: int) -> _Axis:
    """The coarsest grid that holds all offsets: ``gcd(d1 if k1 > 1, s1 d2 if k2 > 1)``, else 1."""
    inner_step = inner_dilation if inner_size > 1 else 0
    outer_step = stride * outer_dilation if outer_size > 1 else 0
    grid = math.gcd(inner_step, outer_step) or 1
    size = ((inner_size - 1) * inner_step + (outer_size - 1) * outer_step) // grid + 1
    return _Axis(grid, size, inner_step // grid or 1, outer_step // grid or 1, inner_size)


def _axes(
    outer: Tensor, inner: Tensor, inner_stride: Pair, inner_dilation: Pair, outer_dilation: Pair
) -> tuple[_Axis, _Axis]:
    """Both axes of a composition, from the weights' shapes ``(C, kh, kw)``."""
    steps = list(zip(inner_stride, inner_dilation, outer_dilation, strict=True))
    return (
        _axis(outer.shape[1], inner.shape[1], *steps[0]),
        _axis(outer.shape[2], inner.shape[2], *steps[1]),
    )


def _windows(outer: Tensor, axes: tuple[_Axis, _Axis]) -> Iterator[tuple[int, int, slice, slice]]:
    """Every outer tap with the window of the composed weight that it writes."""
    for y in range(outer.shape[1]):
        for x in range(outer.shape[2]):
            yield y, x, axes[0].window(y), axes[1].window(x)


def depthwise_compose_reference(
    outer: Tensor, inner: Tensor, inner_stride: Pair, inner_dilation: Pair, outer_dilation: Pair
) -> Tensor:
    """The definition of `depthwise_compose` in plain torch: the same arguments, any dtype and device."""
    axes = _axes(outer, inner, inner_stride, inner_dilation, outer_dilation)
    out = inner.new_zeros(inner.shape[0], axes[0].size, axes[1].size)
    for y, x, rows, columns in _windows(outer, axes):
        out[:, rows, columns] += outer[:, y, x, None, None] * inner
    return out


def _check_weights(outer: Tensor, inner: Tensor) -> None:
    for name, weight in (("outer", outer), ("inner", inner)):
        if weight.dim() != 3 or 0 in weight.shape[1:]:
            raise ValueError(f"depthwise_compose: {name} has shape {tuple(weight.shape)}, need (C, kh > 0, kw > 0)")
        if not weight.is_floating_point():
            raise TypeError(f"depthwise_compose: {name} has dtype {weight.dtype}, need a floating one")
    if outer.shape[0] != inner.shape[0]:
        raise ValueError(f"depthwise_compose: outer has {outer.shape[0]} channels, inner {inner.shape[0]}")
    if outer.dtype != inner.dtype or outer.device != inner.device:
        raise TypeError(
            "depthwise_compose: both weights need one dtype and one device,"
            f" got {outer.dtype} on {outer.device} and {inner.dtype} on {inner.device}"
        )


def _checked_axes(outer: Tensor, inner: Tensor, **pairs: Pair) -> tuple[_Axis, _Axis]:
    for name, pair in pairs.items():
        if len(pair) != 2 or any(not 1 <= value < 2**31 for value in pair):
            raise ValueError(f"depthwise_compose: {name} is {tuple(pair)}, need two integers from 1 to 2**31 - 1")
    axes = _axes(outer, inner, pairs["inner_stride"], pairs["inner_dilation"], pairs["outer_dilation"])
    if axes[0].size * axes[1].size > _MAX_TAPS:
        raise ValueError(
            f"depthwise_compose: the composed weight would be {axes[0].size} x {axes[1].size} taps a channel,"
            f" more than {_MAX_TAPS}"
        )
    return axes


def depthwise_compose(
    outer: Tensor,
    inner: Tensor,
    inner_stride: Pair = (1, 1),
    inner_dilation: Pair = (1, 1),
    outer_dilation: Pair = (1, 1),
    *,
    variant: str | None = None,
) -> Tensor:
    """The weight of one depthwise convolution that does what ``inner`` and then ``outer`` do.

    Offsets add: ``W[c, (d1 a1 + s1 d2 a2) / g] = sum W2[c, a2] W1[c, a1]`` with tap indices ``a``, dilations
    ``d``, the inner stride ``s1``, and per axis the coarsest grid that holds all offsets,
    ``g = gcd(d1 if k1 > 1, s1 d2 if k2 > 1)``, or 1 if there is neither. The composed convolution has
    dilation ``g`` and the product of the strides.

    Args:
        outer: weight ``(C, k2h, k2w)`` of the convolution that runs last.
        inner: weight ``(C, k1h, k1w)`` of the one that runs first; same dtype and device.
        inner_stride: stride ``s1`` of the inner convolution, (vertical, horizontal).
        inner_dilation: dilation ``d1`` of the inner convolution.
        outer_dilation: dilation ``d2`` of the outer convolution.
        variant: a name of `kernel_rows` or ``"reference"``; None takes the best for this CPU.

    Returns:
        ``(C, (d1 (k1h - 1) + s1 d2 (k2h - 1)) / g + 1, likewise)``. The same bits for every variant and
        any number of threads.

    Raises:
        ValueError: shapes do not fit, a stride or dilation below 1, or a variant that cannot run here.
        TypeError: not a floating dtype, or two dtypes or devices.
    """
    result: Tensor = torch.ops.updp.depthwise_compose.default(
        outer, inner, inner_stride, inner_dilation, outer_dilation, variant
    )
    return result


def _depthwise_compose_cpu(
    outer: Tensor,
    inner: Tensor,
    inner_stride: Pair,
    inner_dilation: Pair,
    outer_dilation: Pair,
    variant: str | None = None,
) -> Tensor:
    """Check, pick a row, run it on raw pointers."""
    _check_weights(outer, inner)
    geometry = {
        "inner_stride": inner_stride,
        "inner_dilation": inner_dilation,
        "outer_dilation": outer_dilation,
    }
    rows, columns = _checked_axes(outer, inner, **geometry)
    picked = table.pick("dwcompose", outer.dtype, variant) if outer.device.type == "cpu" else table.REFERENCE
    if picked == table.REFERENCE:
        return depthwise_compose_reference(outer, inner, **geometry)
    outer, inner = outer.contiguous(), inner.contiguous()
    out = inner.new_empty(inner.shape[0], rows.size, columns.size)
    arrays = [(t.data_ptr(), tuple(t.shape), t.stride()) for t in (outer, inner, out)]
    table.NATIVE.dwcompose(picked, *arrays, inner_stride, inner_dilation, outer_dilation, torch.get_num_threads())
    return out


def _depthwise_compose_fake(
    outer: Tensor,
    inner: Tensor,
    inner_stride: Pair,
    inner_dilation: Pair,
    outer_dilation: Pair,
    variant: str | None = None,
) -> Tensor:
    _check_weights(outer, inner)
    rows, columns = _axes(outer, inner, inner_stride, inner_dilation, outer_dilation)
    return inner.new_empty(inner.shape[0], rows.size, columns.size)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    outer, inner, *geometry, _ = inputs
    ctx.save_for_backward(outer, inner)
    ctx.geometry = geometry


def _depthwise_compose_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """The operator is bilinear: each weight's gradient correlates ``grad`` with the other weight."""
    outer, inner = ctx.saved_tensors
    windows = list(_windows(outer, _axes(outer, inner, *ctx.geometry)))
    grad_outer = grad_inner = None
    if ctx.needs_input_grad[0]:
        sums = [(grad[:, rows, columns] * inner).sum(dim=(1, 2)) for _, _, rows, columns in windows]
        grad_outer = torch.stack(sums, dim=1).reshape(outer.shape)
    if ctx.needs_input_grad[1]:
        grad_inner = sum(outer[:, y, x, None, None] * grad[:, rows, columns] for y, x, rows, columns in windows)
    return grad_outer, grad_inner, None, None, None, None


table.LIBRARY.define(
    "depthwise_compose(Tensor outer, Tensor inner, int[2] inner_stride, int[2] inner_dilation,"
    " int[2] outer_dilation, str? variant=None) -> Tensor"
)
table.LIBRARY.impl("depthwise_compose", _depthwise_compose_cpu, "CompositeExplicitAutograd")
torch.library.register_fake("updp::depthwise_compose", _depthwise_compose_fake, lib=table.LIBRARY)
torch.library.register_autograd(
    "updp::depthwise_compose",
    _depthwise_compose_backward,
    setup_context=_save_for_backward,
    lib=table.LIBRARY,
)
