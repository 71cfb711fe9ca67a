"""Consecutive native convolutions of a deployed network in one call.

A call of one convolution is some microseconds of Python and of torch, and of code that is in no cache any more when the
next one comes: what a batch of one image waits for. Nothing else changes: kernels are the same, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, fx, nn

from updp.deployment.capture import args_of, tensor_of
from updp.deployment.forms import NativeForm
from updp.ops import Line, conv_program, program_bytes


class Lines(nn.Module):
    """A program of `updp.ops.conv_program`.

    Args:
        lines: in order.
        parts: all convolutions, in order.
        residuals: the constant that each adds, or None.
    """

    def __init__(self, lines: Sequence[Line], parts: Sequence[NativeForm], residuals: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.lines, self.parts = tuple(lines), nn.ModuleList(parts)
        for place, residual in enumerate(residuals):
            self.register_buffer(f"residual_{place}", residual)
        self._text = "\n".join(map(str, lines))

    @property
    def residuals(self) -> list[Tensor | None]:
        return [getattr(self, f"residual_{place}") for place in range(len(self.parts))]

    def forward(self, x: Tensor, residual: None = None) -> Tensor:
        operands: list[Tensor | None] = []
        for part, added in zip(self.parts, self.residuals, strict=True):
            assert isinstance(part, NativeForm)
            operands += [part.packed, part.bias, part.scale, part.shift, added]
        return conv_program(x, self._text, operands)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Of the maps within, for an input of this shape."""
        return program_bytes(self._text, shape)

    def extra_repr(self) -> str:
        return self._text


def join_calls(graph: fx.GraphModule) -> None:
    """Replace native convolutions, each of which reads what one before it gave, by one program."""
    for number, nodes in enumerate(list(_regions(graph))):
        place = f"fused.program_{number}"
        graph.add_submodule(place, _program(graph, nodes))
        with graph.graph.inserting_before(nodes[-1]):
            node = graph.graph.call_module(place, (_source(nodes),))
        node.meta["val"] = nodes[-1].meta.get("val")
        nodes[-1].replace_all_uses_with(node)
        for old in reversed(nodes):
            graph.graph.erase_node(old)
    graph.graph.eliminate_dead_code()  # constants that were read outside
    graph.delete_all_unused_submodules()
    graph.recompile()


def _regions(graph: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Nodes that read one map from without, and of which only the last is read from without."""
    region: list[fx.Node] = []
    for node in [node for node in graph.graph.nodes if node.op not in ("get_attr", "placeholder")]:
        is_native = node.op == "call_module" and _is_native(graph, node)
        if is_native and len(_outside([*region, node])) == 1:
            region.append(node)
            continue
        yield from _closed(region)
        region = [node] if is_native and len(_outside([node])) == 1 else []
    yield from _closed(region)


def _closed(nodes: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """The longest pieces of two or more of which nothing but the last node is read from without."""
    while len(nodes) > 1:
        length = next((n for n in range(len(nodes), 1, -1) if _hides(nodes[:n])), 1)
        if length > 1 and len(_outside(nodes[:length])) == 1:
            yield nodes[:length]
        nodes = nodes[length:]


def _hides(nodes: list[fx.Node]) -> bool:
    inside = set(nodes)
    return all(user in inside for node in nodes[:-1] for user in node.users)


def _is_native(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = graph.get_submodule(str(node.target))
    return isinstance(module, Lines) or (isinstance(module, NativeForm) and not module.problem.is_linear)


def _outside(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The maps that are read from without."""
    read = {source: None for node in nodes for source in args_of(node) if source.op != "get_attr"}
    return [source for source in read if source not in nodes]


def _source(nodes: Sequence[fx.Node]) -> fx.Node:
    (source,) = _outside(nodes)
    return source


def _program(graph: fx.GraphModule, nodes: Sequence[fx.Node]) -> Lines:
    maps = {_source(nodes): 0} | {node: number for number, node in enumerate(nodes, 1)}
    lines: list[Line] = []
    parts: list[NativeForm] = []
    residuals: list[Tensor | None] = []
    for node in nodes:
        source, *added = args_of(node)
        module = graph.get_submodule(str(node.target))
        if isinstance(module, Lines):
            lines.append(Line(module.lines[0].forms, maps[source]))
            parts += [part for part in module.parts if isinstance(part, NativeForm)]
            residuals += module.residuals
            continue
        assert isinstance(module, NativeForm)
        constant = added[0] if added and added[0].op == "get_attr" else None
        dynamic = maps[added[0]] if added and constant is None else None
        lines.append(Line((module.text,), maps[source], dynamic))
        parts.append(module)
        residuals.append(None if constant is None else tensor_of(graph, constant))
    return Lines(lines, parts, residuals)
