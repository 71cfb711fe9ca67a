"""An operator and all that follows it: what a network's graph is cut into, so that each can run in one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor, fx

from updp.deployment.affines import Operator, channel_affine
from updp.deployment.capture import args_of, aten, tensor_of

Residual: TypeAlias = Literal["none", "first", "last"]
"""Whether something is added before the activation, or at the end."""

# What a stage of a chain may be followed by: later ones only.
_BARE, _ADDED, _ACTIVE, _SCALED, _CLOSED = range(5)
_TO_FIRST, _TO_LAST = (
    [0, 3, 1, 2],
    [0, 2, 3, 1],
)  # permutations of a map's dimensions: channels to the front, to the end


@dataclass
class Chain:
    """An operator, an activation behind it, an affine map behind that, and something that is added.

    ``nodes`` are all that it stands for, in order; ``turned`` says that channels move from the end to the front
    behind the operator, a linear one: the others were found to act on the map in that order.
    """

    operator: Operator
    nodes: list[fx.Node] = field(default_factory=list)
    activation: str = "none"
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: fx.Node | None = None
    place: Residual = "none"
    turned: bool = False
    stage: int = _BARE

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


def find_chains(graph: fx.GraphModule, operators: Mapping[fx.Node, Operator]) -> Iterator[Chain]:
    """The chain that begins at each operator; none shares a node with another."""
    taken: set[fx.Node] = set()
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    for node, operator in operators.items():
        chain = Chain(operator, [node])
        while len(chain.end.users) == 1:
            follower = next(iter(chain.end.users))
            if follower in taken or follower in operators or not _takes(graph, chain, follower, order):
                break
            chain.nodes.append(follower)
        if chain.place == "none" and chain.residual is not None:
            chain.place = "last"
        taken |= set(chain.nodes)
        yield chain


def _takes(graph: fx.GraphModule, chain: Chain, node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Take a node into a chain, if that is what may follow."""
    if node.op != "call_function":
        return False
    if node.target is aten.permute.default:
        return _turn(chain, node)
    if node.target is channel_affine:
        return _scale(graph, chain, node)
    if node.target is aten.add.Tensor:
        return _add(chain, node, order)
    activation = activation_of(node)
    if activation is None or chain.stage > _ADDED:
        return False
    if chain.stage == _ADDED:
        chain.place = "first"
    chain.activation, chain.stage = activation, _ACTIVE
    return True


def activation_of(node: fx.Node) -> str | None:
    """The name of an activation that every form knows."""
    names: dict[Any, str] = {
        aten.relu.default: "relu", aten.silu.default: "silu", aten.hardswish.default: "hardswish",
    }  # fmt: skip
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        return "relu6" if list(args_of(node)[1:]) == [0.0, 6.0] else None
    if node.target is aten.gelu.default:
        return "gelu" if node.kwargs.get("approximate", "none") == "none" else None
    return names.get(node.target) if len(args_of(node)) == 1 else None


def _turn(chain: Chain, node: fx.Node) -> bool:
    if chain.turned or not chain.operator.is_linear or list(args_of(node)[1]) != _TO_FIRST:
        return False
    chain.turned = True
    return True


def _scale(graph: fx.GraphModule, chain: Chain, node: fx.Node) -> bool:
    _, scale, shift, axis = args_of(node)
    dims, wanted = node.meta["val"].dim(), 1 if chain.turned else chain.operator.axis
    if axis % dims != wanted % dims or chain.stage == _CLOSED:
        return False
    factor, offset = tensor_of(graph, scale), tensor_of(graph, shift)
    if chain.stage == _BARE:
        chain.operator.fold_behind(factor, offset)
        return True
    if chain.stage == _ADDED:
        chain.place = "first"
    if chain.scale is not None and chain.shift is not None:
        factor, offset = chain.scale * factor, chain.shift * factor + offset
    chain.scale, chain.shift, chain.stage = factor, offset, _SCALED
    return True


def _add(chain: Chain, node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Something of the same shape that is there before the operator runs, or at least before it is added."""
    if node.kwargs or chain.residual is not None or len(args_of(node)) != 2:
        return False
    other = next((each for each in args_of(node) if each is not chain.end), None)
    if not isinstance(other, fx.Node) or "val" not in other.meta or other in chain.nodes:
        return False
    shape, own = other.meta["val"].shape, node.meta["val"].shape
    if order[other] > order[node]:
        return False
    if shape != own and not (shape[1:] == own[1:] and shape[0] == 1 and other.op == "get_attr"):
        return False
    chain.residual = other
    chain.stage = _ADDED if chain.stage == _BARE else _CLOSED
    chain.place = "last" if chain.stage == _CLOSED else "none"
    return True


def put(graph: fx.GraphModule, chain: Chain, name: str, moved: dict[fx.Node, fx.Node]) -> None:
    """Replace the nodes of a chain by a call of the module of that name, given the input and what is added.

    Args:
        moved: ends of chains that were replaced before, and what replaced them; this one is added.
    """
    x, residual = chain.operator.input, chain.residual
    arguments = [moved.get(x, x)]
    with graph.graph.inserting_before(chain.end):
        if residual is not None:
            residual = moved.get(residual, residual)
            if chain.turned:
                residual = graph.graph.call_function(aten.permute.default, (residual, _TO_LAST))
            arguments.append(residual)
        node = out = graph.graph.call_module(name, tuple(arguments))
        if chain.turned:
            node = graph.graph.call_function(aten.permute.default, (out, _TO_FIRST))
    node.meta["val"] = chain.end.meta["val"]
    moved[chain.end] = node
    chain.end.replace_all_uses_with(node)
    for old in reversed(chain.nodes):
        graph.graph.erase_node(old)
