"""``conv_sequence``: convolutions one behind the other in one call, strip by strip of rows.

Of the maps between only the rows that a strip needs are there at a time, in the second cache. What is computed is what
:func:`conv2d` computes, one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from updp.ops import rows as table
from updp.ops.conv import conv2d, plan_of, refuse_gradients
from updp.ops.form import ConvForm

_SEPARATOR = "; "
_OPERANDS = ("packed", "bias", "scale", "shift", "residual")


def conv_sequence(x: Tensor, forms: Sequence[str], operands: Sequence[Tensor | None]) -> Tensor:
    """``conv2d`` with each form, each on what the one before gave; inference only.

    Args:
        x: ``(N, C, H, W)`` float32; anything but ``channels_last`` is copied to it first.
        forms: the text of a :class:`ConvForm` for each, of native variants; paddings above and below are smaller than
            the kernel.
        operands: five for each: packed weight, bias, scale, shift, residual, as `conv2d` takes them. A residual is one
            image, the same for all of a batch.

    Returns:
        ``(N, K, H', W')`` in ``channels_last``. The same bits on any number of threads.

    Raises:
        ValueError: as `conv2d`; forms that do not fit together.
        TypeError: as `conv2d`.
    """
    result: Tensor = torch.ops.updp.conv_sequence.default(x, _SEPARATOR.join(forms), list(operands))
    return result


class _Plan(NamedTuple):
    run: Any  # of the compiled sequence
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    operands: tuple[tuple[tuple[int, ...], ...], ...]  # shapes of each convolution's


@functools.lru_cache(maxsize=1024)
def _plan(forms: str, shape: tuple[int, ...], threads: int) -> _Plan | None:
    """The plan for an input of this shape; None if one of the convolutions is the reference."""
    plans, operands = [], []
    for text in forms.split(_SEPARATOR):
        plan = plan_of(text, shape)
        if plan is None:
            return None
        if ConvForm.parse(text).is_linear:
            raise ValueError(f"sequence: got form {text!r}, need convolutions of maps")
        plans.append((plan.compiled, plan.activation, plan.residual_first))
        shape, strides, channels = plan.shape, plan.strides, plan.channels
        operands.append(((plan.packed_size,), *[(channels,)] * 3, (1, *shape[1:])))
    return _Plan(table.NATIVE.ConvSequence(plans, threads).run, shape, strides, tuple(operands))


def _cpu(x: Tensor, forms: str, operands: list[Tensor | None]) -> Tensor:
    plan = _plan(forms, x.shape, torch.get_num_threads())
    if plan is None:
        return _anywhere(x, forms, operands)
    refuse_gradients(x, *operands)
    x = x.contiguous(memory_format=torch.channels_last)
    kept = [None if each is None else _dense(each) for each in operands]
    addresses = [_addresses(shapes, own) for shapes, own in zip(plan.operands, _each(forms, kept), strict=True)]
    if x.dtype is not torch.float32:
        raise TypeError(f"sequence: the input is {x.dtype}, need float32")
    out = torch.empty_strided(plan.shape, plan.strides)
    plan.run(x.data_ptr(), out.data_ptr(), addresses)
    return out


def _dense(operand: Tensor) -> Tensor:
    return operand.contiguous(memory_format=torch.channels_last) if operand.dim() == 4 else operand.contiguous()


def _each(forms: str, operands: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
    """The operands of each convolution."""
    count, width = forms.count(_SEPARATOR) + 1, len(_OPERANDS)
    if len(operands) != count * width:
        raise ValueError(f"sequence: got {len(operands)} operands for {count} convolutions, need {count * width}")
    return [operands[start : start + width] for start in range(0, len(operands), width)]


def _addresses(shapes: Sequence[tuple[int, ...]], operands: Sequence[Tensor | None]) -> list[int]:
    """Addresses of one convolution's operands, 0 for what is left out, after what an address does not show."""
    for name, operand, shape in zip(_OPERANDS, operands, shapes, strict=True):
        if operand is None:
            if name == "packed":
                raise ValueError("sequence: a convolution has no packed weight")
            continue
        if operand.dtype is not torch.float32:
            raise TypeError(f"sequence: {name} is {operand.dtype}, need float32")
        if operand.shape != shape:
            raise ValueError(f"sequence: {name} has shape {tuple(operand.shape)}, need {shape}")
    return [0 if operand is None else operand.data_ptr() for operand in operands]


def _anywhere(x: Tensor, forms: str, operands: list[Tensor | None]) -> Tensor:
    """One after the other; on other devices than the CPU, the reference."""
    for text, (packed, *rest) in zip(forms.split(_SEPARATOR), _each(forms, operands), strict=True):
        if packed is None:
            raise ValueError("sequence: a convolution has no packed weight")
        x = conv2d(x, packed, text, *rest)
    return x


def _fake(x: Tensor, forms: str, operands: list[Tensor | None]) -> Tensor:
    return _anywhere(x, forms, operands)


table.LIBRARY.define("conv_sequence(Tensor x, str forms, Tensor?[] operands) -> Tensor")
table.LIBRARY.impl("conv_sequence", _cpu, "CPU")
table.LIBRARY.impl("conv_sequence", _anywhere, "CompositeExplicitAutograd")
torch.library.register_fake("updp::conv_sequence", _fake, lib=table.LIBRARY)
