"""What an operator of a pruned block is given, and what it should give for the block to equal its baseline.

The baseline block runs on the baseline network's maps and is recorded step by step: the reference. The pruned block
runs on the pruned network's maps up to the operator. What the operator should give is the reference behind the steps
that it stands for; at the end of a branch it is what the sum lacks, so that it also makes up for what the shortcut
brings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from updp.flow import Across, Call, FlowModule, Node, Nodes, Parallel, ToLayout, walk
from updp.kinds import kind_of
from updp.layers import Layout
from updp.recipe import PrunedFlow, prune, unchanged
from updp.structure import BoundBlock

Key: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """A map or tokens, and where its channels are."""

    tensor: Tensor
    layout: Layout

    def into(self, layout: Layout) -> Tensor:
        """The same values in a layout; tokens have but one."""
        if layout == self.layout or self.tensor.dim() != 4:
            return self.tensor
        return self.tensor.permute(0, 2, 3, 1) if layout == "last" else self.tensor.permute(0, 3, 1, 2)


def reference_of(block: BoundBlock) -> PrunedFlow:
    """The baseline block in the steps of its pruned forms: a norm and its activation are two."""
    return prune(block, unchanged(block.name)).eval()


def record(flow: FlowModule, x: Tensor) -> dict[Key, Value]:
    """Run a flow; what every step and every sum gives, by the names of the steps in it."""
    values: dict[Key, Value] = {}
    _record(flow, flow.program, x, flow.entry, values)
    return values


def _record(flow: FlowModule, nodes: Nodes, x: Tensor, layout: Layout, values: dict[Key, Value]) -> Tensor:
    for node in nodes:
        if isinstance(node, ToLayout):
            layout = node.layout
        if isinstance(node, Parallel):
            branches = [_record(flow, branch, x, layout, values) for branch in node.flows]
            x = sum(branches[1:], branches[0])
        elif isinstance(node, Across):
            x = _record(flow, node.flow, x.transpose(1, 2), "last", values).transpose(1, 2)
        else:
            x = flow.run((node,), x)
        if not isinstance(node, ToLayout):
            values[key_of(node)] = Value(x, layout)
    return x


def key_of(node: Node) -> Key:
    """The steps in a node; appended layers and moved padding are none of the block's own."""
    names = (inner.name for inner in walk((node,)) if isinstance(inner, Call))
    return tuple(name for name in names if not name.startswith(("append.", "pad.")))


@dataclass(frozen=True)
class Observed:
    """The input of an operator and what it should give, both as the operator has its channels."""

    input: Tensor
    wanted: Tensor


def observe(flow: PrunedFlow, operator: str, x: Tensor, reference: Mapping[Key, Value]) -> Observed:
    """Run a pruned flow up to one of its operators.

    Args:
        operator: the name of a part.
        x: the block's input in the pruned network.
        reference: the baseline block's values on the same images.
    """
    return _Observer(flow, operator, reference).visit(flow.program, x, flow.entry, None)


class _Observer:
    def __init__(self, flow: PrunedFlow, operator: str, reference: Mapping[Key, Value]) -> None:
        self.flow, self.operator, self.reference = flow, operator, reference

    def visit(self, nodes: Nodes, x: Tensor, layout: Layout, end: Value | None) -> Observed:
        """Walk to the node that holds the operator; ``end`` is what these nodes should give, where that is known."""
        for index, node in enumerate(nodes):
            if isinstance(node, ToLayout):
                layout = node.layout
            if not self.holds(node):
                x = self.flow.run((node,), x)
                continue
            wanted = self.wanted(node, nodes[index + 1 :], end)
            if isinstance(node, Parallel):
                return self.inside(node, x, layout, wanted)
            if isinstance(node, Across):
                turned = Value(wanted.tensor.transpose(1, 2), "last")
                return self.visit(node.flow, x.transpose(1, 2), "last", turned)
            return Observed(x, wanted.into(layout))
        raise AssertionError(f"{self.operator} is no part of the flow")

    def holds(self, node: Node) -> bool:
        return any(isinstance(inner, Call) and inner.name == self.operator for inner in walk((node,)))

    def wanted(self, node: Node, behind: Sequence[Node], end: Value | None) -> Value:
        if end is not None and all(self.vanishes(other) for other in behind):
            return end
        return self.reference[self.source_key(node)]

    def source_key(self, node: Node) -> Key:
        """The reference's name for what a node gives: a composed operator gives what its last step gave."""
        if isinstance(node, Call) and node.name in self.flow.composed:
            own = [inner for inner in self.flow.composed[node.name] if key_of(inner)]
            return key_of(own[-1])
        names: list[str] = []
        for inner in walk((node,)):
            if isinstance(inner, Call):
                sources = self.flow.composed.get(inner.name, (inner,))
                names += [name for source in sources for name in key_of(source)]
        return tuple(names)

    def vanishes(self, node: Node) -> bool:
        if isinstance(node, Call):
            return kind_of(self.flow.part(node.name)).vanishes
        return isinstance(node, ToLayout)

    def inside(self, node: Parallel, x: Tensor, layout: Layout, wanted: Value) -> Observed:
        """The branch with the operator must give what the others leave."""
        rest = wanted.into(layout)
        for branch in node.flows:
            if not any(self.holds(inner) for inner in branch):
                rest = rest - self.flow.run(branch, x)
        branch = next(branch for branch in node.flows if any(self.holds(inner) for inner in branch))
        return self.visit(branch, x, layout, Value(rest, layout))
