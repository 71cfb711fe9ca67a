"""``conv2d`` and ``linear``: a float32 convolution, dense or depthwise, with what follows it in a network, in one pass.

``activation(conv(x, weight) + bias) * scale + shift``, plus a residual at the end or before the activation. Weights are
packed once for a variant; activations are NHWC (``channels_last``). For inference: there is no backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from updp.ops import rows as table
from updp.ops.form import ACTIVATIONS, ConvForm

_DEPTHWISE = "depthwise"  # the algorithm whose groups are all channels
_TILES = {"winograd4": 4, "winograd2": 2}  # outputs of a tile of Winograd's F(m x m, 3x3), a side


def conv_variants(
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    out_shape: Sequence[int] = (1, 56, 56),
    groups: int = 1,
) -> list[str]:
    """The compiled variants of the best instruction set here that can run a convolution, best guess first.

    Args:
        weight_shape: ``(K, C / groups, kh, kw)``, or ``(K, C)`` of a linear layer.
        stride: vertical, horizontal.
        out_shape: batch, height and width of the output, on which the guess depends.
        groups: 1, or K of a depthwise convolution; no row is for any other.

    Returns:
        Names of `kernel_rows`, for :func:`pack_conv` and :class:`ConvForm`; empty if none is built.
    """
    k, c, kh, kw = _four(weight_shape)
    rows = table.available_rows("conv", torch.float32)
    rows = tuple(row for row in rows if row.isa == rows[0].isa and (row.algorithm == _DEPTHWISE) == (groups != 1))
    if groups != 1 and (groups, 1) != (k, c):
        return []
    if (kh, kw) != (3, 3) or tuple(stride) != (1, 1):
        rows = tuple(row for row in rows if row.algorithm not in _TILES)

    def cost(algorithm: str) -> float:
        """Products, those of Winograd's transforms too, as if the weight met some more tiles: it has to be read."""
        side = _TILES.get(algorithm, 1)
        tiles = out_shape[0] * math.prod(-(-size // side) for size in out_shape[1:])
        points = (side + 2) ** 2 if algorithm in _TILES else kh * kw
        return points * (k * c * (tiles + 12) + (6 * tiles * (k + c) if algorithm in _TILES else 0))

    return [row.name for row in sorted(rows, key=lambda row: cost(row.algorithm))]


def pack_conv(weight: Tensor, variant: str) -> Tensor:
    """The weight ``(K, C / groups, kh, kw)``, or ``(K, C)`` of a linear layer, as a variant reads it: one dimension.

    Raises:
        ValueError: a variant that cannot run here, or not with this kernel size; another number of dimensions.
        TypeError: the weight is not float32, or not on the CPU.
    """
    if weight.dim() not in (2, 4) or 0 in weight.shape:
        raise ValueError(f"pack_conv: the weight has shape {tuple(weight.shape)}, need (K, C, kh, kw) or (K, C)")
    if table.pick("conv", torch.float32, variant) == table.REFERENCE:
        return weight.detach().flatten().clone()
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise TypeError(f"pack_conv: the weight is {weight.dtype} on {weight.device}, need float32 on the CPU")
    weight, shape = weight.detach().contiguous(), _four(weight.shape)
    packed = weight.new_empty(table.NATIVE.conv_packed_size(variant, shape))
    table.NATIVE.conv_pack(variant, shape, weight.data_ptr(), packed.data_ptr(), packed.numel())
    return packed


def conv2d(
    x: Tensor,
    packed: Tensor,
    form: str,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(conv(x, weight) + bias) * scale + shift + residual``; inference only.

    Args:
        x: ``(N, C, H, W)`` float32; anything but ``channels_last`` is copied to it first.
        packed: what :func:`pack_conv` gave for the form's variant.
        form: the text of a :class:`ConvForm`: what is constant. In one text, because a call costs less so.
        bias: ``(K,)``.
        scale: ``(K,)``, behind the activation; together with ``shift``.
        shift: ``(K,)``.
        residual: as the output, or one image for all of them; the form says whether it is added before the
            activation or at the end.

    Returns:
        ``(N, K, H', W')`` in ``channels_last``. The same bits on any number of threads; variants differ by rounding.

    Raises:
        ValueError: shapes that do not fit, a form that is none, a variant that cannot run here.
        TypeError: a tensor is not float32, not on the CPU, or asks for a gradient.
    """
    result: Tensor = torch.ops.updp.conv2d.default(x, packed, form, bias, scale, shift, residual)
    return result


def linear(
    x: Tensor,
    packed: Tensor,
    form: str,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As :func:`conv2d`, for a weight ``(K, C)`` and ``x`` of shape ``(..., C)``; the output is contiguous."""
    result: Tensor = torch.ops.updp.linear.default(x, packed, form, bias, scale, shift, residual)
    return result


def conv_reference(
    x: Tensor,
    weight: Tensor,
    form: ConvForm,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition of `conv2d` and `linear` in plain torch, for a weight that is not packed; any dtype and device."""
    if (scale is None) != (shift is None):
        raise ValueError("conv: scale and shift come together, got one of them")
    if form.is_linear:
        out = F.linear(x, weight, bias)
    else:
        top, left, bottom, right = form.padding
        out = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, form.stride, groups=form.groups)
    if residual is not None and form.residual_first:
        out = out + residual
    out = _activate(form.activation, out)
    if scale is not None and shift is not None:
        place = (-1,) if form.is_linear else (-1, 1, 1)
        out = out * scale.view(place) + shift.view(place)
    return out if residual is None or form.residual_first else out + residual


def _activate(activation: str, x: Tensor) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "relu6": F.relu6,
        "gelu": F.gelu,
        "silu": F.silu,
        "hardswish": F.hardswish,
    }
    return x if activation == "none" else functions[activation](x)


def _four(shape: Sequence[int]) -> tuple[int, int, int, int]:
    k, c, *size = shape
    kh, kw = size or (1, 1)
    return k, c, kh, kw


class ConvPlan(NamedTuple):
    """All that depends on the form and the input's shape alone."""

    compiled: Any
    run: Any  # of the compiled plan
    shape: tuple[int, ...]  # of the output
    strides: tuple[int, ...]
    channels: int
    packed_size: int
    activation: int
    residual_first: bool


@functools.lru_cache(maxsize=4096)
def plan_of(text: str, shape: tuple[int, ...]) -> ConvPlan | None:
    """The plan for an input of this shape, whose sizes the compiled module checks; None for the reference."""
    form = ConvForm.parse(text)
    if form.variant == table.REFERENCE:
        return None
    table.pick("conv", torch.float32, form.variant)
    groups = form.weight[0] if form.variant.split("_")[1] == _DEPTHWISE else 1
    if form.groups != groups:
        raise ValueError(f"conv: got {form.groups} groups, {form.variant} is for {groups} here")
    if len(shape) < 1 or (len(shape) != 4 and not form.is_linear):
        raise ValueError(
            f"conv: the input has shape {tuple(shape)}, need {'(..., C)' if form.is_linear else '(N, C, H, W)'}"
        )
    n, c, h, w = (math.prod(shape[:-1]), shape[-1], 1, 1) if form.is_linear else shape
    weight = _four(form.weight)
    compiled = table.NATIVE.ConvPlan(form.variant, (n, h, w, c), weight, form.stride, form.padding)
    n, height, width, k = compiled.out_shape
    if form.is_linear:
        shape = (*shape[:-1], k)
        strides = torch.empty(shape, device="meta").stride()
    else:
        shape, strides = (n, k, height, width), (height * width * k, 1, width * k, k)
    number = ACTIVATIONS.index(form.activation)
    return ConvPlan(compiled, compiled.run, shape, strides, k, compiled.packed_size, number, form.residual_first)


def _run(
    plan: ConvPlan,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Check what the compiled plan cannot see in addresses, and run it; written for small overhead."""
    if torch.is_grad_enabled():  # asked here too: a call less
        refuse_gradients(x, packed, bias, scale, shift, residual)
    if x.dtype is not torch.float32 or (residual is not None and residual.dtype is not torch.float32):
        raise TypeError(f"conv: the input is {x.dtype}, the residual {getattr(residual, 'dtype', None)}, need float32")
    shared = False
    if residual is not None and residual.shape != plan.shape:
        shared = residual.shape == (1, *plan.shape[1:]) and len(plan.shape) == 4
        if not shared:
            raise ValueError(f"conv: the residual has shape {tuple(residual.shape)}, the output {plan.shape}")
    if (scale is None) != (shift is None):
        raise ValueError("conv: scale and shift come together, got one of them")
    out = x.new_empty_strided(plan.shape, plan.strides)
    plan.run(
        x.data_ptr(),
        _address("the packed weight", packed, plan.packed_size),
        out.data_ptr(),
        0 if bias is None else _address("bias", bias, plan.channels),
        0 if scale is None else _address("scale", scale, plan.channels),
        0 if shift is None else _address("shift", shift, plan.channels),
        0 if residual is None else residual.data_ptr(),
        shared,
        plan.activation,
        plan.residual_first,
        torch.get_num_threads(),
    )
    return out


def refuse_gradients(*tensors: Tensor | None) -> None:
    """Raise for a tensor that asks for a gradient, where gradients are on."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise TypeError("conv: a tensor asks for a gradient, and this operator has none: use torch.no_grad()")


def _address(name: str, vector: Tensor, size: int) -> int:
    if vector.dtype is not torch.float32:
        raise TypeError(f"conv: {name} is {vector.dtype}, need float32")
    if vector.numel() != size or vector.dim() != 1 or not vector.is_contiguous():
        raise ValueError(f"conv: {name} has shape {tuple(vector.shape)}, need ({size},), dense (see pack_conv)")
    return vector.data_ptr()


def _on_cpu(layout: torch.memory_format) -> Callable[..., Tensor]:
    def run(x: Tensor, packed: Tensor, form: str, *others: Tensor | None) -> Tensor:
        """The others: bias, scale, shift, residual."""
        plan = plan_of(form, x.shape)
        if plan is None:
            return _anywhere(x, packed, form, *others)
        bias, scale, shift, residual = others
        if residual is not None:
            residual = residual.contiguous(memory_format=layout)
        return _run(plan, x.contiguous(memory_format=layout), packed, bias, scale, shift, residual)

    return run


def _anywhere(x: Tensor, packed: Tensor, text: str, *others: Tensor | None) -> Tensor:
    """The reference; the only variant on other devices than the CPU."""
    form = ConvForm.parse(text)
    if form.variant != table.REFERENCE:
        raise TypeError(f"conv: {form.variant} runs on the CPU, got a tensor on {x.device}")
    refuse_gradients(x, packed, *others)
    out = conv_reference(x, packed.view(form.weight), form, *others)
    return out.contiguous() if form.is_linear else out.contiguous(memory_format=torch.channels_last)


def _fake(x: Tensor, packed: Tensor, text: str, *others: Tensor | None) -> Tensor:
    form = ConvForm.parse(text)
    k, _, *kernel = form.weight
    channels = x.shape[-1 if form.is_linear else 1]
    if channels != form.channels:
        raise ValueError(f"conv: the input has {channels} channels, the weight is for {form.channels}")
    if form.is_linear:
        return x.new_empty(*x.shape[:-1], k)
    sizes = [
        (x.shape[axis + 2] + form.padding[axis] + form.padding[axis + 2] - kernel[axis]) // form.stride[axis] + 1
        for axis in (0, 1)
    ]
    shape = (x.shape[0], k, *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_ARGUMENTS = "Tensor x, Tensor packed, str form, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual"
for _name, _layout in (("conv2d", torch.channels_last), ("linear", torch.contiguous_format)):
    table.LIBRARY.define(f"{_name}({_ARGUMENTS}) -> Tensor")
    table.LIBRARY.impl(_name, _on_cpu(_layout), "CPU")
    table.LIBRARY.impl(_name, _anywhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"updp::{_name}", _fake, lib=table.LIBRARY)
