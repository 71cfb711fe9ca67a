"""``attention``: softmax(q k^T * scale) v in float32, in one call. For inference: there is no backward.

``attention_packed`` is the same on q, k and v as one linear layer gives them. A view costs little, but there are many
around attention, and a batch of one image waits for them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from updp.ops import rows as table


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, variant: str | None = None) -> Tensor:
    """``softmax(q @ k^T * scale) @ v``; inference only.

    Args:
        q: ``(N, heads, queries, depth)``; strides do not matter, if the last one is 1: anything else is copied.
        k: ``(N, heads, keys, depth)``.
        v: ``(N, heads, keys, width)``.
        scale: one over the square root of the depth when left out.
        variant: a name of `kernel_rows`, or ``reference``; the best that runs here when left out.

    Returns:
        ``(N, heads, queries, width)``, of which ``transpose(1, 2)`` is contiguous. The same bits on any number of
        threads; variants differ by rounding.

    Raises:
        ValueError: shapes that do not fit, a variant that cannot run here.
        TypeError: a tensor is not float32, not on the CPU, or asks for a gradient.
    """
    if variant is None:
        on_cpu = all(each.device.type == "cpu" for each in (q, k, v))
        variant = table.pick("attention", q.dtype, None) if on_cpu else table.REFERENCE
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    result: Tensor = torch.ops.updp.attention.default(q, k, v, scale, variant)
    return result


def attention_packed(qkv: Tensor, heads: int, scale: float | None = None, variant: str | None = None) -> Tensor:
    """`attention` of tokens to each other; inference only.

    Args:
        qkv: ``(N, tokens, 3 * heads * depth)``: of each token q of all heads, then k, then v; copied, if it is not
            contiguous.
        scale: one over the square root of the depth when left out.
        variant: as for `attention`.

    Returns:
        ``(N, tokens, heads * depth)``, contiguous; the bits are those of `attention`.

    Raises:
        ValueError, TypeError: as of `attention`.
    """
    if variant is None:
        variant = table.pick("attention", qkv.dtype, None) if qkv.device.type == "cpu" else table.REFERENCE
    scale = 1 / math.sqrt(_part_shape(qkv.shape, heads)[-1]) if scale is None else scale
    result: Tensor = torch.ops.updp.attention_packed.default(qkv, heads, scale, variant)
    return result


def attention_parts(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``(N, heads, tokens, depth)`` of q, k and v in what `attention_packed` takes."""
    batch, heads, tokens, depth = _part_shape(qkv.shape, heads)
    q, k, v = qkv.reshape(batch, tokens, 3, heads, depth).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attention_variants() -> list[str]:
    """The compiled variants of the best instruction set here; empty if none is built."""
    rows = table.available_rows("attention", torch.float32)
    return [row.name for row in rows if row.isa == rows[0].isa]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition in plain torch; any dtype and device."""
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * scale, -1), v)


class _Plan(NamedTuple):
    """All that depends on shapes and strides alone."""

    run: Any  # of the compiled plan
    shape: tuple[int, ...]  # of the output
    strides: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _plan(variant: str, *sizes: tuple[int, ...]) -> _Plan | None:
    """The plan for the shapes and strides of q, k and v, which the compiled module checks; None for the reference."""
    shapes, strides = sizes[:3], sizes[3:]
    shape = _out_shape(*shapes)
    if table.pick("attention", torch.float32, variant) == table.REFERENCE:
        return None
    compiled = table.NATIVE.AttentionPlan(variant, *shapes, *strides)
    return _Plan(compiled.run, shape, _strides(shape))


@functools.lru_cache(maxsize=4096)
def _packed_plan(variant: str, shape: tuple[int, ...], heads: int) -> tuple[Any, int, tuple[int, ...]]:
    """What runs it, bytes from q to k and from k to v, and the shape of what comes out."""
    part = _part_shape(shape, heads)
    table.pick("attention", torch.float32, variant)
    _, _, tokens, depth = part
    strides = (tokens * shape[2], depth, shape[2], 1)
    compiled = table.NATIVE.AttentionPlan(variant, part, part, part, strides, strides, strides)
    return compiled.run, 4 * heads * depth, (*shape[:2], heads * depth)


def _part_shape(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """Of q, of k and of v."""
    if len(shape) != 3 or heads < 1 or 0 in shape[1:] or shape[2] % (3 * heads) != 0:
        raise ValueError(
            f"attention: q, k and v together have shape {tuple(shape)}, need (N, tokens, 3 * heads * depth) of"
            f" {heads} heads"
        )
    return (shape[0], heads, shape[1], shape[2] // (3 * heads))


def _out_shape(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> tuple[int, ...]:
    if not len(q) == len(k) == len(v) == 4 or k[:2] != q[:2] or v[:3] != k[:3] or k[3] != q[3] or 0 in (*k[2:], v[3]):
        raise ValueError(
            f"attention: q has shape {tuple(q)}, k {tuple(k)}, v {tuple(v)}, "
            "need (N, heads, queries, depth), (N, heads, keys, depth) and (N, heads, keys, width)"
        )
    return (*q[:3], v[3])


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a dense tensor (N, queries, heads, width), seen as (N, heads, queries, width)."""
    _, heads, queries, width = shape
    return (queries * heads * width, width, heads * width, 1)


def _cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, variant: str) -> Tensor:
    """Written for small overhead."""
    if variant == table.REFERENCE:
        return _anywhere(q, k, v, scale, variant)
    if torch.is_grad_enabled():
        _refuse_gradients(q, k, v)
    if not q.dtype is k.dtype is v.dtype is torch.float32:
        raise TypeError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}, need float32")
    strides = q.stride(), k.stride(), v.stride()
    if any(each[-1:] != (1,) for each in strides):
        q, k, v = (each if each.stride()[-1:] == (1,) else each.contiguous() for each in (q, k, v))
        strides = q.stride(), k.stride(), v.stride()
    plan = _plan(variant, q.shape, k.shape, v.shape, *strides)
    assert plan is not None
    out = torch.empty_strided(plan.shape, plan.strides, dtype=torch.float32)
    plan.run(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), scale, torch.get_num_threads())
    return out


def _packed_cpu(qkv: Tensor, heads: int, scale: float, variant: str) -> Tensor:
    """Written for small overhead."""
    if variant == table.REFERENCE:
        return _packed_anywhere(qkv, heads, scale, variant)
    if torch.is_grad_enabled():
        _refuse_gradients(qkv)
    if qkv.dtype is not torch.float32:
        raise TypeError(f"attention: q, k and v together are {qkv.dtype}, need float32")
    run, step, shape = _packed_plan(variant, qkv.shape, heads)
    qkv = qkv.contiguous()
    out = qkv.new_empty(shape)
    q = qkv.data_ptr()
    run(q, q + step, q + 2 * step, out.data_ptr(), scale, torch.get_num_threads())
    return out


def _refuse_gradients(*tensors: Tensor) -> None:
    if any(tensor.requires_grad for tensor in tensors):
        raise TypeError("attention: a tensor asks for a gradient, and this operator has none: use torch.no_grad()")


def _anywhere(q: Tensor, k: Tensor, v: Tensor, scale: float, variant: str) -> Tensor:
    """The reference; the only variant on other devices than the CPU."""
    if variant != table.REFERENCE:
        raise TypeError(f"attention: {variant} runs on the CPU, got a tensor on {q.device}")
    _refuse_gradients(q, k, v)
    _out_shape(q.shape, k.shape, v.shape)
    return attention_reference(q, k, v, scale).transpose(1, 2).contiguous().transpose(1, 2)


def _packed_anywhere(qkv: Tensor, heads: int, scale: float, variant: str) -> Tensor:
    return _anywhere(*attention_parts(qkv, heads), scale, variant).transpose(1, 2).flatten(2)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, variant: str) -> Tensor:
    shape = _out_shape(q.shape, k.shape, v.shape)
    return q.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


def _packed_fake(qkv: Tensor, heads: int, scale: float, variant: str) -> Tensor:
    batch, _, tokens, depth = _part_shape(qkv.shape, heads)
    return qkv.new_empty(batch, tokens, heads * depth)


table.LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, float scale, str variant) -> Tensor")
table.LIBRARY.impl("attention", _cpu, "CPU")
table.LIBRARY.impl("attention", _anywhere, "CompositeExplicitAutograd")
torch.library.register_fake("updp::attention", _fake, lib=table.LIBRARY)

table.LIBRARY.define("attention_packed(Tensor qkv, int heads, float scale, str variant) -> Tensor")
table.LIBRARY.impl("attention_packed", _packed_cpu, "CPU")
table.LIBRARY.impl("attention_packed", _packed_anywhere, "CompositeExplicitAutograd")
torch.library.register_fake("updp::attention_packed", _packed_fake, lib=table.LIBRARY)
