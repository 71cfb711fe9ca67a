"""Layer norms in a network's graph, and the forms that they can run in: torch's operator and the kernel of ``csrc/``.

A norm over the channels of a map is one over the last dimension between two permutations: with channels last, these
move nothing, and rows are rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from updp import ops
from updp.deployment.capture import args_of, aten, calls, module_of, tensor_of
from updp.deployment.forms import TORCH


@dataclass(frozen=True)
class NormProblem:
    """A layer norm over the last dimension.

    Attributes:
        weighted, shifted: whether there is a factor for each channel, and something that is added.
    """

    channels: int
    eps: float
    weighted: bool
    shifted: bool
    plain: ClassVar[str] = TORCH
    since: ClassVar[int] = 3

    def forms(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[str]:
        """Names of the forms that can run it here; plain torch is always one."""
        native = device.type == "cpu" and dtype == torch.float32
        return [TORCH, *(ops.layer_norm_variants() if native else [])]

    def build(self, form: str, operands: NormOperands) -> nn.Module:
        """The module that runs it in a form."""
        return _Norm(form, self, operands)

    def __str__(self) -> str:
        """For people and as the key of a plan."""
        words = [f"layer norm {self.channels} channels eps {self.eps:.6g}"]
        return " ".join([*words, *["weight"] * self.weighted, *["bias"] * self.shifted])


class NormOperands(nn.Module):
    """The numbers of a layer norm."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        for name, tensor in (("weight", weight), ("bias", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())


class _Norm(nn.Module):
    """The problem in one of its forms."""

    def __init__(self, form: str, problem: NormProblem, operands: NormOperands) -> None:
        super().__init__()
        self.name, self.problem, self.operands = form, problem, operands

    def forward(self, x: Tensor) -> Tensor:
        own, eps = self.operands, self.problem.eps
        if self.name == TORCH:
            return F.layer_norm(x, (self.problem.channels,), own.weight, own.bias, eps)
        out: Tensor = torch.ops.updp.layer_norm.default(x, own.weight, own.bias, eps, self.name)
        return out

    def extra_repr(self) -> str:
        return f"{self.problem}: {self.name}"


@dataclass(frozen=True)
class Norm:
    """Where a graph computes a layer norm: ``node`` is what comes out."""

    problem: NormProblem
    operands: NormOperands
    x: fx.Node
    node: fx.Node

    @property
    def module(self) -> str:
        """The name of the module whose forward it is in."""
        return module_of(self.node) or "layer_norm"


def find_norms(graph: fx.GraphModule) -> Iterator[Norm]:
    """Those over the last dimension with constant weights."""
    for node in calls(graph, aten.layer_norm.default):
        x, shape, *rest = args_of(node)
        weight, bias, eps = [*rest, *(None, None, 1e-5)[len(rest) :]][:3]
        constant = all(
            isinstance(each, fx.Node) and each.op == "get_attr" for each in (weight, bias) if each is not None
        )
        if len(shape) == 1 and constant and not node.kwargs and isinstance(x, fx.Node) and "val" in x.meta:
            operands = NormOperands(*(None if each is None else tensor_of(graph, each) for each in (weight, bias)))
            problem = NormProblem(int(shape[0]), float(eps), weight is not None, bias is not None)
            yield Norm(problem, operands, x, node)
