"""How large the space is in which a paper searches for widths: counted from the convolutions and what couples them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node, symbolic_trace

from updp.errors import InputError

_SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")


def genes(model: nn.Module) -> tuple[int, ...]:
    """Widths that can be chosen one by one: of every convolution, one where outputs are added to each other.

    A depthwise convolution is as wide as what comes into it; the width of the classifier is no choice.

    Raises:
        InputError: the network cannot be traced.
    """
    try:
        traced = symbolic_trace(model)
    except Exception as error:  # whatever a forward pass does that tracing cannot follow
        raise InputError(f"the widths of {type(model).__name__} cannot be traced: {error}") from error
    same: dict[Node, Node] = {}

    def first(node: Node) -> Node:
        while same.get(node, node) is not node:
            node = same[node]
        return node

    widths: dict[Node, int] = {}
    for node in traced.graph.nodes:
        module = _module(traced, node)
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            widths[node] = module.out_channels
        elif not isinstance(module, nn.Linear):
            before = node.all_input_nodes
            for other in before if node.target in _SUMS else before[:1]:
                same[first(node)] = first(other)
    return tuple({first(node): width for node, width in widths.items()}.values())


def channels(model: nn.Module) -> int:
    """Channels that come into convolutions and linear layers, without the first."""
    return sum(_incoming(model)) - next(_incoming(model))


def _incoming(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            yield module.in_channels
        elif isinstance(module, nn.Linear):
            yield module.in_features


def _module(traced: GraphModule, node: Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None
