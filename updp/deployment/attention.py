"""Attention in a network's graph, and the forms in which it can run: torch's operator and the kernel of ``csrc/``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from updp import ops
from updp.deployment.capture import args_of, aten, calls, module_of
from updp.deployment.forms import TORCH

_ARGUMENTS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS: tuple[Any, ...] = (None, 0.0, False, None, False)


@dataclass(frozen=True)
class AttentionProblem:
    """softmax(q k^T * scale) v, without a mask.

    Attributes:
        queries, keys: tokens.
        depth: channels of a head of q and k; ``width`` of v.
        packed: whether q, k and v come as one tensor, and the channels of all heads go side by side; a plan does not
            say it.
    """

    heads: int
    queries: int
    keys: int
    depth: int
    width: int
    scale: float
    packed: bool = False
    plain: ClassVar[str] = TORCH
    since: ClassVar[int] = 2

    def products(self, shape: tuple[int, ...]) -> int:
        """Multiply-accumulates, for a first input of this shape."""
        return shape[0] * self.heads * self.queries * self.keys * (self.depth + self.width)

    def forms(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[str]:
        """Names of the forms that can run it here; plain torch is always one."""
        native = device.type == "cpu" and dtype == torch.float32
        return [TORCH, *(ops.attention_variants() if native else [])]

    def build(self, form: str, operands: nn.Module) -> nn.Module:
        """The module that runs it in a form: of q, k and v, or of these together."""
        return _Packed(form, self) if self.packed else _Attention(form, self)

    def __str__(self) -> str:
        """For people and as the key of a plan."""
        tokens = f"{self.queries}x{self.keys} tokens"
        return f"attention {self.heads} heads {tokens} {self.depth}x{self.width} channels scale {self.scale:.6g}"


class _Attention(nn.Module):
    """The problem in one of its forms; what comes out has a head's channels side by side, token by token."""

    def __init__(self, form: str, problem: AttentionProblem) -> None:
        super().__init__()
        self.name, self.problem = form, problem

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = self.problem.scale
        if self.name == TORCH:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        out: Tensor = torch.ops.updp.attention.default(q, k, v, scale, self.name)
        return out

    def extra_repr(self) -> str:
        return f"{self.problem}: {self.name}"


class _Packed(_Attention):
    """The same, of what one linear layer gives to what the next one takes, without a view between."""

    def forward(self, qkv: Tensor) -> Tensor:  # type: ignore[override]
        heads, scale = self.problem.heads, self.problem.scale
        if self.name == TORCH:
            return super().forward(*ops.attention_parts(qkv, heads)).transpose(1, 2).flatten(2)
        out: Tensor = torch.ops.updp.attention_packed.default(qkv, heads, scale, self.name)
        return out


@dataclass(frozen=True)
class Attention:
    """Where a graph computes attention: ``inputs`` are q, k and v, or all in one; out comes the last node."""

    problem: AttentionProblem
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]

    @property
    def module(self) -> str:
        """The name of the module whose forward it is in."""
        return module_of(self.nodes[0]) or "attention"


def find_attentions(graph: fx.GraphModule) -> Iterator[Attention]:
    """All of them, written as one operator or as two products with a softmax between."""
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        q, k, v, *rest = args_of(node)
        given = dict(zip(_ARGUMENTS, _DEFAULTS, strict=True)) | dict(zip(_ARGUMENTS, rest, strict=False))
        given |= dict(node.kwargs)
        scale = given.pop("scale")
        if all(given[name] == default for name, default in zip(_ARGUMENTS, _DEFAULTS, strict=True) if name in given):
            yield from _attention(q, k, v, node, scale)
    for node in calls(graph, aten.matmul.default):
        yield from _from_products(node)


def _from_products(node: fx.Node) -> Iterator[Attention]:
    """(softmax((q * scale) @ k^T)) @ v, or with the scale behind the product, or without."""
    weights, v = args_of(node)
    if not _only(weights, aten.softmax.int) or args_of(weights)[1] not in (-1, 3) or len(args_of(weights)) != 2:
        return
    scores, scale = _unscaled(args_of(weights)[0])
    if not _only(scores, aten.matmul.default):
        return
    q, columns = args_of(scores)
    if not _only(columns, aten.transpose.int) or sorted(axis % 4 for axis in args_of(columns)[1:]) != [2, 3]:
        return
    q, more = _unscaled(q)
    yield from _attention(q, args_of(columns)[0], v, node, scale * more)


def _only(node: Any, target: Any) -> bool:
    """Whether it is a call of an operator that one node alone needs."""
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1 and not node.kwargs


def _unscaled(node: Any) -> tuple[Any, float]:
    """What is multiplied by a number, and the number."""
    if _only(node, aten.mul.Tensor) and isinstance(args_of(node)[1], float | int):
        source, factor = args_of(node)
        return source, float(factor)
    return node, 1.0


def _attention(q: Any, k: Any, v: Any, end: fx.Node, scale: float | None) -> Iterator[Attention]:
    """If the sizes are known, but for the batch, and those of one attention."""
    if not all(isinstance(each, fx.Node) and isinstance(each.meta.get("val"), Tensor) for each in (q, k, v)):
        return
    shapes = [each.meta["val"].shape for each in (q, k, v)]
    if any(len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]) for shape in shapes):
        return
    (batch, heads, queries, depth), of_k, of_v = shapes
    keys, width = of_v[2:]
    if of_k == (batch, heads, keys, depth) and of_v[:2] == (batch, heads) and 0 not in shapes[0][1:]:
        scale = 1 / math.sqrt(depth) if scale is None else float(scale)
        problem = AttentionProblem(heads, queries, keys, depth, width, scale)
        source, behind = _source_of((q, k, v)), _joined(end, problem)
        if source is None or behind is None:
            yield Attention(problem, (q, k, v), (end,))
        else:
            yield Attention(replace(problem, packed=True), (source,), (end, *behind))


def _source_of(parts: tuple[fx.Node, ...]) -> fx.Node | None:
    """``x`` where q, k and v are the parts of ``x.reshape(N, tokens, 3, heads, depth).permute(2, 0, 3, 1, 4)``."""
    turned = {_taken_from(part, place) for place, part in enumerate(parts)}
    permuted = next(iter(turned))
    if len(turned) != 1 or permuted is None or not _calls(permuted, aten.permute.default, [2, 0, 3, 1, 4]):
        return None
    split = args_of(permuted)[0]
    if not _calls(split, aten.reshape.default):
        return None
    x: fx.Node = args_of(split)[0]
    (_, tokens, parts_, heads, depth), shape = split.meta["val"].shape, x.meta["val"].shape
    return x if parts_ == 3 and len(shape) == 3 and shape[1:] == (tokens, 3 * heads * depth) else None


def _taken_from(part: fx.Node, place: int) -> fx.Node | None:
    """What a part is the one at this place of, along its first axis."""
    if _calls(part, aten.select.int, 0, place):
        return args_of(part)[0]  # type: ignore[no-any-return]
    if _calls(part, getitem, place) and _calls(args_of(part)[0], aten.unbind.int):
        source, *axis = args_of(args_of(part)[0])
        return source if axis in ([], [0]) else None
    return None


def _joined(end: fx.Node, problem: AttentionProblem) -> tuple[fx.Node, fx.Node] | None:
    """What puts the channels of all heads side by side, if nothing else reads what comes out."""
    turned, *others = end.users
    if others or not _calls(turned, aten.transpose.int, 1, 2) or len(turned.users) != 1:
        return None
    (joined,) = turned.users
    wanted = (problem.queries, problem.heads * problem.width)
    is_joined = _calls(joined, aten.reshape.default) and joined.meta["val"].shape[1:] == wanted
    return (turned, joined) if is_joined else None


def _calls(node: Any, target: Any, *arguments: Any) -> bool:
    """Whether it is a call of an operator; with these arguments behind the first, if any are given."""
    found = isinstance(node, fx.Node) and node.target is target
    return found and (not arguments or list(args_of(node)[1:]) == list(arguments))
