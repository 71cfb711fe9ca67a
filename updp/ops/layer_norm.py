"""``layer_norm``: rows less their mean, over their deviation, in float32, in one call. For inference: no backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from updp.ops import rows as table


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, variant: str | None = None
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension; inference only.

    Args:
        x: ``(..., C)``; copied, if it is not contiguous.
        weight, bias: ``(C,)``.
        variant: a name of `kernel_rows`, or ``reference``; the best that runs here when left out.

    Returns:
        Of x's shape, contiguous. The same bits on any number of threads; variants differ by rounding.

    Raises:
        ValueError: shapes that do not fit, a variant that cannot run here.
        TypeError: a tensor is not float32, not on the CPU, or asks for a gradient.
    """
    if variant is None:
        variant = table.pick("layer_norm", x.dtype, None) if x.device.type == "cpu" else table.REFERENCE
    result: Tensor = torch.ops.updp.layer_norm.default(x, weight, bias, eps, variant)
    return result


def layer_norm_variants() -> list[str]:
    """The compiled variants of the best instruction set here; empty if none is built."""
    rows = table.available_rows("layer_norm", torch.float32)
    return [row.name for row in rows if row.isa == rows[0].isa]


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition in plain torch; any dtype and device."""
    difference = x - x.mean(-1, keepdim=True)
    out = difference / (difference.square().mean(-1, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@functools.lru_cache(maxsize=4096)
def _plan(
    variant: str, x: tuple[int, ...], weight: tuple[int, ...] | None, bias: tuple[int, ...] | None, eps: float
) -> Callable[..., None] | None:
    """The compiled plan for these shapes, to be run; None for the reference."""
    _check_shapes(x, weight, bias)
    if table.pick("layer_norm", torch.float32, variant) == table.REFERENCE:
        return None
    run: Callable[..., None] = table.NATIVE.LayerNormPlan(variant, math.prod(x[:-1]), x[-1], eps).run
    return run


def _check_shapes(x: tuple[int, ...], weight: tuple[int, ...] | None, bias: tuple[int, ...] | None) -> None:
    if len(x) == 0 or x[-1] == 0:
        raise ValueError(f"layer_norm: x has shape {tuple(x)}, need (..., C), C from 1")
    for name, shape in (("weight", weight), ("bias", bias)):
        if shape is not None and shape != x[-1:]:
            raise ValueError(f"layer_norm: {name} has shape {tuple(shape)}, x {tuple(x)}, need ({x[-1]},)")


def _cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, variant: str) -> Tensor:
    """Written for small overhead."""
    if variant == table.REFERENCE:
        return _anywhere(x, weight, bias, eps, variant)
    if torch.is_grad_enabled():
        _refuse_gradients(x, weight, bias)
    of_weight, weight, at_weight = _channels("weight", weight)
    of_bias, bias, at_bias = _channels("bias", bias)
    if x.dtype is not torch.float32:
        raise TypeError(f"layer_norm: x is {x.dtype}, need float32")
    run = _plan(variant, x.shape, of_weight, of_bias, eps)
    assert run is not None
    x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(x.data_ptr(), at_weight, at_bias, out.data_ptr(), torch.get_num_threads())
    return out


def _channels(name: str, tensor: Tensor | None) -> tuple[tuple[int, ...] | None, Tensor | None, int]:
    """Shape, contiguous tensor and address of a weight or bias; the address of one that is left out is 0."""
    if tensor is None:
        return None, None, 0
    if tensor.dtype is not torch.float32:
        raise TypeError(f"layer_norm: {name} is {tensor.dtype}, need float32")
    tensor = tensor.contiguous()
    return tensor.shape, tensor, tensor.data_ptr()


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise TypeError("layer_norm: a tensor asks for a gradient, and this operator has none: use torch.no_grad()")


def _anywhere(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, variant: str) -> Tensor:
    """The reference; the only variant on other devices than the CPU."""
    if variant != table.REFERENCE:
        raise TypeError(f"layer_norm: {variant} runs on the CPU, got a tensor on {x.device}")
    _refuse_gradients(x, weight, bias)
    _check_shapes(x.shape, *(None if each is None else each.shape for each in (weight, bias)))
    return layer_norm_reference(x, weight, bias, eps).contiguous()


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, variant: str) -> Tensor:
    _check_shapes(x.shape, *(None if each is None else each.shape for each in (weight, bias)))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


table.LIBRARY.define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str variant) -> Tensor")
table.LIBRARY.impl("layer_norm", _cpu, "CPU")
table.LIBRARY.impl("layer_norm", _anywhere, "CompositeExplicitAutograd")
torch.library.register_fake("updp::layer_norm", _fake, lib=table.LIBRARY)
