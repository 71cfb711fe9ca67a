"""A flow that runs: nodes that name parts, and the module that interprets them.

Baseline structures, pruned flows and merged blocks are all a `FlowModule`; only their nodes and parts differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from updp.kinds import kind_of
from updp.layers import BatchNorm, Layout, Scale


@dataclass(frozen=True)
class Call:
    """Run one part."""

    name: str


@dataclass(frozen=True)
class Parallel:
    """Run several flows on the same input and add their outputs; an empty flow is the identity shortcut."""

    flows: tuple[Nodes, ...]
    name: str | None = None


@dataclass(frozen=True)
class Across:
    """Run a flow with tokens and channels exchanged ``(N, L, C) -> (N, C, L)``."""

    flow: Nodes


@dataclass(frozen=True)
class Run:
    """A chain of affine operators that merge into one; runs like the chain."""

    flow: Nodes


@dataclass(frozen=True)
class ToLayout:
    """Permute a map ``(N, C, H, W)`` <-> ``(N, H, W, C)``; put in by the engine, never by a spec."""

    layout: Layout


Node: TypeAlias = Call | Parallel | Across | Run | ToLayout
Nodes: TypeAlias = tuple[Node, ...]


def walk(nodes: Nodes) -> Iterator[Node]:
    """Every node, in order of execution, parents before children."""
    for node in nodes:
        yield node
        for flow in children(node):
            yield from walk(flow)


def children(node: Node) -> tuple[Nodes, ...]:
    """The flows inside a node."""
    if isinstance(node, Parallel):
        return node.flows
    if isinstance(node, Across | Run):
        return (node.flow,)
    return ()


def rebuild(node: Node, change: Callable[[Nodes], Nodes]) -> Node:
    """The same node with every child flow changed."""
    if isinstance(node, Parallel):
        return Parallel(tuple(change(flow) for flow in node.flows), node.name)
    if isinstance(node, Across):
        return Across(change(node.flow))
    if isinstance(node, Run):
        return Run(change(node.flow))
    return node


def part_key(name: str) -> str:
    """A step's path as the name of a module: ``mlp.fc1`` -> ``mlp_fc1``; ``keys`` -> ``keys_``, which is free."""
    key = name.replace(".", "_").replace("[", "_").replace("]", "").replace(":", "_")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tuples, lists and mappings with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


class FlowModule(nn.Module):
    """Interprets nodes over its parts.

    Args:
        nodes: what runs, without layout changes: those are worked out here.
        parts: step name -> module. Modules are held, not copied: flows share weights by sharing modules.
        entry: the layout of the input, and of the output.
        extras: step name -> further arguments of that call (recorded from the model's own forward).
    """

    def __init__(
        self,
        nodes: Nodes,
        parts: Mapping[str, nn.Module],
        entry: Layout,
        extras: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    ) -> None:
        super().__init__()
        self.entry: Layout = entry
        self.extras = dict(extras or {})
        self.parts = nn.ModuleDict()
        self.rewire(nodes, parts)

    def rewire(self, nodes: Nodes, parts: Mapping[str, nn.Module]) -> None:
        """Replace nodes and parts, keeping every part that is given again."""
        names = [node.name for node in walk(nodes) if isinstance(node, Call)]
        keys = {part_key(name): name for name in names}
        if len(keys) != len(set(names)):
            raise ValueError(f"step names collide: {sorted(names)}")
        self.parts = nn.ModuleDict({key: _own_layout(parts[name]) for key, name in keys.items()})
        self.nodes = nodes
        self.program, _ = _with_layouts(nodes, self.part, self.entry)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlowModule:
        """Recorded arguments move and change their dtype with the weights."""
        super()._apply(fn, recurse)
        self.extras = {name: map_tensors(extra, fn) for name, extra in self.extras.items()}
        return self

    def part(self, name: str) -> nn.Module:
        return self.parts[part_key(name)]

    @property
    def named_parts(self) -> dict[str, nn.Module]:
        return {node.name: self.part(node.name) for node in walk(self.nodes) if isinstance(node, Call)}

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.run(self.program, x)

    def run(self, nodes: Nodes, x: Tensor) -> Tensor:
        for node in nodes:
            x = self._step(node, x)
        return x

    def _step(self, node: Node, x: Tensor) -> Tensor:
        if isinstance(node, Call):
            args, kwargs = self.extras.get(node.name, ((), {}))
            out: Tensor = self.parts[part_key(node.name)](x, *args, **kwargs)
            return out
        if isinstance(node, Parallel):
            total = self.run(node.flows[0], x)
            for flow in node.flows[1:]:
                total = total + self.run(flow, x)
            return total
        if isinstance(node, Across):
            return self.run(node.flow, x.transpose(1, 2)).transpose(1, 2)
        if isinstance(node, Run):
            return self.run(node.flow, x)
        return x.permute(0, 2, 3, 1) if node.layout == "last" else x.permute(0, 3, 1, 2)


def _own_layout(part: nn.Module) -> nn.Module:
    """A shared scale stands in another layout in every flow: the parameter is shared, the module is not."""
    return Scale(part.weight) if isinstance(part, Scale) else part


def _with_layouts(nodes: Nodes, part: Callable[[str], nn.Module], entry: Layout) -> tuple[Nodes, Layout]:
    """Insert the permutations that the parts need; back in the entry layout at the end.

    Layouts change as late as possible; parts that work in either (`BatchNorm`, `Scale`) take what they find.
    """
    out: list[Node] = []
    current = entry
    for node in nodes:
        if isinstance(node, Call):
            module = part(node.name)
            wanted = kind_of(module).layout
            if wanted is not None and wanted != current:
                out.append(ToLayout(wanted))
                current = wanted
            if isinstance(module, Scale | BatchNorm):
                module.layout = current
            out.append(node)
        elif isinstance(node, Across):
            out.append(Across(_with_layouts(node.flow, part, "last")[0]))
        else:
            layout = current
            out.append(rebuild(node, lambda flow, at=layout: _with_layouts(flow, part, at)[0]))  # type: ignore[misc]
    if current != entry:
        out.append(ToLayout(entry))
    return tuple(out), entry
