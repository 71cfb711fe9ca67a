"""``conv_program``: several convolutions in one call.

A program has lines. A line is one convolution, or several behind each other that go strip by strip of rows: of the maps
between them only the rows that a strip needs are there at a time, in the second cache. A line reads the input or what a
line before it gave, and may add such a map. What is computed is what :func:`conv2d` computes, the same bits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from updp.ops import rows as table
from updp.ops.conv import conv2d, plan_of, refuse_gradients
from updp.ops.form import ConvForm

_LINE = re.compile(r"(?P<source>\d+) (?P<added>\d+|-): (?P<forms>.+)")
_OPERANDS = ("packed", "bias", "scale", "shift", "residual")


@dataclass(frozen=True)
class Line:
    """One line of a program; ``str()`` is its text, ``parse`` reads it.

    Args:
        forms: texts of `ConvForm`; of several, paddings above and below are smaller than the kernel.
        source: the map that is read: 0 is the program's input, i what line i gave, counted from 1.
        added: the map that is the residual of the line's one convolution.
    """

    forms: tuple[str, ...]
    source: int = 0
    added: int | None = None

    def __str__(self) -> str:
        return f"{self.source} {'-' if self.added is None else self.added}: {'; '.join(self.forms)}"

    @classmethod
    def parse(cls, text: str) -> Line:
        """Read what ``str()`` gave.

        Raises:
            ValueError: the text is no line.
        """
        if (found := _LINE.fullmatch(text)) is None:
            raise ValueError(f"program: got line {text!r}, need the text of a Line")
        added = None if found["added"] == "-" else int(found["added"])
        return cls(tuple(found["forms"].split("; ")), int(found["source"]), added)


def conv_program(x: Tensor, program: str, operands: Sequence[Tensor | None]) -> Tensor:
    """Run a program; inference only.

    Args:
        x: ``(N, C, H, W)`` float32; anything but ``channels_last`` is copied to it first.
        program: its lines, in the order in which they run, each ``str()`` of a :class:`Line`.
        operands: five for each convolution: packed weight, bias, scale, shift, residual, as `conv2d` takes them. A
            residual here is one image, the same for all of a batch; None where the line adds a map.

    Returns:
        What the last line gives, in ``channels_last``. The same bits on any number of threads.

    Raises:
        ValueError: as `conv2d`; lines that do not fit together.
        TypeError: as `conv2d`.
    """
    result: Tensor = torch.ops.updp.conv_program.default(x, program, list(operands))
    return result


class _Plan(NamedTuple):
    """All that depends on the program, the input's shape and the number of threads alone."""

    run: Any  # of the compiled program
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    slots: list[int]  # elements
    operands: tuple[tuple[tuple[int, ...], ...], ...]  # shapes, of each convolution


@functools.lru_cache(maxsize=512)
def _plan(program: str, shape: tuple[int, ...], threads: int) -> _Plan | None:
    """The plan for an input of this shape; None if one of the convolutions is the reference."""
    maps, lines, operands = [shape], [], []
    strides: tuple[int, ...] = ()
    for line in map(Line.parse, program.split("\n")):
        steps = []
        if line.source >= len(maps):
            raise ValueError(f"program: line {len(maps)} reads map {line.source}, there are {len(maps)} before it")
        shape = maps[line.source]
        for text in line.forms:
            if ConvForm.parse(text).is_linear:
                raise ValueError(f"program: got form {text!r}, need convolutions of maps")
            if (plan := plan_of(text, shape)) is None:
                return None
            shape, strides = plan.shape, plan.strides
            steps.append((plan.compiled, plan.activation, plan.residual_first))
            operands.append(((plan.packed_size,), *[(plan.channels,)] * 3, (1, *shape[1:])))
        maps.append(shape)
        lines.append((steps, line.source, -1 if line.added is None else line.added))
    compiled = table.NATIVE.ConvProgram(lines, threads)
    return _Plan(compiled.run, shape, strides, compiled.slots, tuple(operands))


def program_bytes(program: str, shape: Sequence[int]) -> int:
    """Bytes of the maps between lines that a call on an input of this shape holds at the same time."""
    plan = _plan(program, tuple(shape), torch.get_num_threads())
    return 0 if plan is None else 4 * sum(plan.slots)


def _cpu(x: Tensor, program: str, operands: list[Tensor | None]) -> Tensor:
    plan = _plan(program, x.shape, torch.get_num_threads())
    if plan is None:
        return _anywhere(x, program, operands)
    refuse_gradients(x, *operands)
    if x.dtype is not torch.float32:
        raise TypeError(f"program: the input is {x.dtype}, need float32")
    x = x.contiguous(memory_format=torch.channels_last)
    kept = [None if each is None else _dense(each) for each in operands]
    given = _each(len(plan.operands), kept)
    addresses = [_addresses(shapes, own) for shapes, own in zip(plan.operands, given, strict=True)]
    slots = [x.new_empty(elements) for elements in plan.slots]
    out = x.new_empty_strided(plan.shape, plan.strides)
    plan.run(x.data_ptr(), out.data_ptr(), [slot.data_ptr() for slot in slots], addresses)
    return out


def _dense(operand: Tensor) -> Tensor:
    return operand.contiguous(memory_format=torch.channels_last) if operand.dim() == 4 else operand.contiguous()


def _each(count: int, operands: Sequence[Tensor | None]) -> Iterator[Sequence[Tensor | None]]:
    """The operands of each convolution."""
    width = len(_OPERANDS)
    if len(operands) != count * width:
        raise ValueError(f"program: got {len(operands)} operands for {count} convolutions, need {count * width}")
    return (operands[start : start + width] for start in range(0, len(operands), width))


def _addresses(shapes: Sequence[tuple[int, ...]], operands: Sequence[Tensor | None]) -> list[int]:
    """Addresses of one convolution's operands, 0 for what is left out, after what an address does not show."""
    if operands[0] is None:
        raise ValueError("program: a convolution has no packed weight")
    for name, operand, shape in zip(_OPERANDS, operands, shapes, strict=True):
        if operand is None:
            continue
        if operand.dtype is not torch.float32:
            raise TypeError(f"program: {name} is {operand.dtype}, need float32")
        if operand.shape != shape:
            raise ValueError(f"program: {name} has shape {tuple(operand.shape)}, need {shape}")
    return [0 if operand is None else operand.data_ptr() for operand in operands]


def _anywhere(x: Tensor, program: str, operands: list[Tensor | None]) -> Tensor:
    """One convolution after the other; on other devices than the CPU, their references."""
    lines = [Line.parse(text) for text in program.split("\n")]
    given = iter(_each(sum(len(line.forms) for line in lines), operands))
    maps = [x]
    for line in lines:
        x = maps[line.source]
        for text in line.forms:
            packed, bias, scale, shift, residual = next(given)
            if packed is None:
                raise ValueError("program: a convolution has no packed weight")
            x = conv2d(x, packed, text, bias, scale, shift, residual if line.added is None else maps[line.added])
        maps.append(x)
    return x


table.LIBRARY.define("conv_program(Tensor x, str program, Tensor?[] operands) -> Tensor")
table.LIBRARY.impl("conv_program", _cpu, "CPU")
table.LIBRARY.impl("conv_program", _anywhere, "CompositeExplicitAutograd")
torch.library.register_fake("updp::conv_program", _anywhere, lib=table.LIBRARY)
