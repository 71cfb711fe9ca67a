"""The forms in which one chain can run: native algorithms, oneDNN with a packed weight, and plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from updp import ops
from updp.deployment.chains import Chain, Residual

TORCH, ONEDNN = "torch", "onednn"
_SHAPES = 4  # of inputs, whose packed weights oneDNN's form keeps
_ATTRIBUTES: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""), "relu": ("relu", [], ""), "relu6": ("hardtanh", [0.0, 6.0], ""),
    "gelu": ("gelu", [], "none"), "silu": ("swish", [], ""), "hardswish": ("hardswish", [], ""),
}  # fmt: skip
"""oneDNN's names: attribute, its numbers, its algorithm."""


@dataclass(frozen=True)
class Problem:
    """What a chain computes, but for its numbers.

    Attributes:
        weight: ``(K, C / groups, kh, kw)``, or ``(K, C)`` of a linear layer.
        pads: zeros above, left, below and right.
        scaled: whether an affine map stands behind the activation.
    """

    weight: tuple[int, ...]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    activation: str
    scaled: bool
    residual: Residual
    plain: ClassVar[str] = TORCH
    since: ClassVar[int] = 1

    @classmethod
    def of(cls, chain: Chain) -> Problem:
        operator = chain.operator
        return cls(
            tuple(operator.weight.shape), operator.stride, operator.pads, operator.dilation, operator.groups,
            chain.activation, chain.scale is not None, chain.place,
        )  # fmt: skip

    @property
    def is_linear(self) -> bool:
        return len(self.weight) == 2

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the output, for an input of this shape."""
        if self.is_linear:
            return (*shape[:-1], self.weight[0])
        size = [
            (shape[2 + i] + self.pads[i] + self.pads[2 + i] - self.dilation[i] * (self.weight[2 + i] - 1) - 1)
            // self.stride[i] + 1
            for i in (0, 1)
        ]  # fmt: skip
        return (shape[0], self.weight[0], *size)

    def products(self, shape: tuple[int, ...]) -> int:
        """Multiply-accumulates, for an input of this shape."""
        return math.prod(self.out_shape(shape)) * math.prod(self.weight[1:])

    def forms(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[str]:
        return forms_for(self, shape, dtype, device)

    def build(self, form: str, operands: Operands) -> nn.Module:
        return build(form, self, operands)

    def __str__(self) -> str:
        """For people and as the key of a plan."""
        words = ["x".join(map(str, self.weight))]
        if self.stride != (1, 1):
            words.append("stride " + "x".join(map(str, self.stride)))
        if any(self.pads):
            words.append("pad " + ",".join(map(str, self.pads)))
        if self.dilation != (1, 1):
            words.append("dilation " + "x".join(map(str, self.dilation)))
        words += [f"groups {self.groups}"] * (self.groups != 1)
        first, last = (["add"] * (self.residual == place) for place in ("first", "last"))
        words += [*first, *([self.activation] * (self.activation != "none")), *(["affine"] * self.scaled), *last]
        return " ".join(words)


class Operands(nn.Module):
    """The numbers of a chain, in the network's precision."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, chain: Chain, dtype: torch.dtype) -> Operands:
        operator = chain.operator
        weight = operator.weight.to(dtype)
        if not operator.is_linear:
            weight = weight.contiguous(memory_format=torch.channels_last)
        bias = operator.bias.to(dtype) if operator.has_bias else None
        scale, shift = (None if each is None else each.to(dtype) for each in (chain.scale, chain.shift))
        return cls(weight, bias, scale, shift)


def forms_for(problem: Problem, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[str]:
    """Names of the forms that can run a problem here; plain torch is always one."""
    forms = [TORCH]
    if device.type != "cpu" or dtype != torch.float32:
        return forms
    if _has_onednn() and (problem.is_linear or problem.pads[:2] == problem.pads[2:]):
        forms.append(ONEDNN)
    if problem.dilation == (1, 1):
        out = problem.out_shape(shape)
        size = (1, 1, math.prod(out[:-1])) if problem.is_linear else (out[0], *out[2:])
        forms += ops.conv_variants(problem.weight, problem.stride, size, problem.groups)
    return forms


def build(form: str, problem: Problem, operands: Operands) -> Form:
    """The module that runs a problem in a form: of the input and what is added.

    Raises:
        ValueError: no such form here.
    """
    if form == TORCH:
        return TorchForm(problem, operands)
    return OneDnnForm(problem, operands) if form == ONEDNN else NativeForm(form, problem, operands)


class Form(nn.Module):
    """A problem in one of its forms; called with the input and, where something is added, that."""

    def __init__(self, name: str, problem: Problem) -> None:
        super().__init__()
        self.name, self.problem = name, problem

    def extra_repr(self) -> str:
        return f"{self.problem}: {self.name}"


class TorchForm(Form):
    """The operators of torch, one after the other, in place where the operands are their own."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        super().__init__(TORCH, problem)
        self.operands = operands

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        problem, own = self.problem, self.operands
        out = self._operator(x)
        if residual is not None and problem.residual == "first":
            out = out.add_(residual)
        out = _activate(problem.activation, out)
        return _finish(problem, out, own, residual)

    def _operator(self, x: Tensor) -> Tensor:
        problem, own = self.problem, self.operands
        if problem.is_linear:
            return F.linear(x, own.weight, own.bias)
        top, left, bottom, right = problem.pads
        padding = (top, left)
        if (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, own.weight, own.bias, problem.stride, padding, problem.dilation, problem.groups)


class OneDnnForm(Form):
    """oneDNN with a weight that is packed once, and the activation in the same call: what inductor generates too.

    Compilers and exporters cannot see into packed weights: they are given plain torch.
    """

    def __init__(self, problem: Problem, operands: Operands) -> None:
        super().__init__(ONEDNN, problem)
        self.plain = TorchForm(problem, operands)
        self.attribute = _ATTRIBUTES["none" if problem.residual == "first" else problem.activation]
        self._packed: dict[tuple[int, ...], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}  # packed tensors cannot be copied

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            plain: Tensor = self.plain(x, residual)
            return plain
        problem, own = self.problem, self.plain.operands
        out = self._operator(x)
        if residual is not None and problem.residual == "first":
            out = _activate(problem.activation, out.add_(residual))
        return _finish(problem, out, own, residual)

    def _operator(self, x: Tensor) -> Tensor:
        problem, own = self.problem, self.plain.operands
        key = tuple(x.shape)
        if (packed := self._packed.get(key)) is None:
            if len(self._packed) == _SHAPES:
                self._packed.clear()
            packed = self._packed[key] = _packed(problem, own.weight, key)
        if problem.is_linear:
            return torch.ops.mkldnn._linear_pointwise(x, packed, own.bias, *self.attribute)  # type: ignore[no-any-return]
        return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            x, packed, own.bias, list(problem.pads[:2]), list(problem.stride), list(problem.dilation), problem.groups,
            *self.attribute,
        )  # fmt: skip


class NativeForm(Form):
    """One call of a kernel of ``csrc/``: operator, activation, affine map and sum in one pass over the output."""

    packed: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, variant: str, problem: Problem, operands: Operands) -> None:
        super().__init__(variant, problem)
        form = ops.ConvForm(
            variant, problem.weight, problem.stride, problem.pads, problem.activation, problem.residual == "first",
            problem.groups,
        )  # fmt: skip
        self.text = str(form)
        self.register_buffer("packed", ops.pack_conv(operands.weight, variant))
        for name in ("bias", "scale", "shift"):
            self.register_buffer(name, getattr(operands, name))
        self._run = torch.ops.updp.linear.default if problem.is_linear else torch.ops.updp.conv2d.default

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out: Tensor = self._run(x, self.packed, self.text, self.bias, self.scale, self.shift, residual)
        return out


def _packed(problem: Problem, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    if problem.is_linear:
        rows = math.prod(shape[:-1])
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # type: ignore[no-any-return]
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    plain, geometry = weight.contiguous().to_mkldnn(), (problem.pads[:2], problem.stride, problem.dilation)
    packed: Tensor = reorder(plain, *geometry, problem.groups, list(shape))
    return packed


def _has_onednn() -> bool:
    """Private operators of torch: what is not there is not offered."""
    names = ("_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight")
    there = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return there and torch.backends.mkldnn.is_available() and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")


def _activate(activation: str, x: Tensor) -> Tensor:
    """In place where there is such a function; the operand is the operator's output, which nobody else has."""
    if activation == "relu":
        return x.relu_()
    if activation == "relu6":
        return F.hardtanh_(x, 0.0, 6.0)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "silu":
        return F.silu(x, inplace=True)
    return F.hardswish(x, inplace=True) if activation == "hardswish" else x


def _finish(problem: Problem, out: Tensor, own: Operands, residual: Tensor | None) -> Tensor:
    if own.scale is not None and own.shift is not None:
        place = (-1,) if problem.is_linear else (-1, 1, 1)
        out = torch.addcmul(own.shift.view(place), out, own.scale.view(place))
    return out.add_(residual) if residual is not None and problem.residual == "last" else out
