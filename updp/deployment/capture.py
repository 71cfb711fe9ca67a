"""A network as a flat graph of torch's own operators, ready to be rewritten: nothing in it is done for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from updp.errors import InputError
from updp.exporting import quiet

aten = torch.ops.aten
_NEW = (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default)
"""They ask their input for nothing but its shape."""
_NOTHING = (aten.dropout.default, aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default)
"""In inference they give what they are given."""


def capture(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of a network in inference: the batch size is free, if the network allows it, the image size is not.

    The network itself is left as it is; the graph holds its tensors, and copies of none.

    Raises:
        InputError: `torch.export` cannot follow the network.
    """
    images = example[:1].expand(2, *example.shape[1:])
    was_training = model.training
    try:
        with quiet(), torch.no_grad():
            program = _exported(model.eval(), images)
    finally:
        model.train(was_training)
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    _drop_nothings(graph)
    for node in calls(
        graph, aten.view.default, aten._unsafe_view.default
    ):  # of maps whose channels are last, a view may not exist
        node.target = aten.reshape.default
    _fold_constants(graph)
    return graph


def _exported(model: nn.Module, images: Tensor) -> Any:
    try:
        free = ({0: torch.export.Dim("batch")},)
        return torch.export.export(model, (images,), dynamic_shapes=free).run_decompositions({})
    except Exception as error:  # whatever a forward says of symbolic sizes
        try:
            return torch.export.export(model, (images,)).run_decompositions({})
        except Exception:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{type(model).__name__} cannot be deployed: torch.export: {reason}") from error


def _drop_nothings(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _NOTHING:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def join_permutations(graph: fx.GraphModule) -> None:
    """Two permutations, one behind the other, are one, or none."""
    for node in calls(graph, aten.permute.default):
        source, order = args_of(node)
        if source.op == "call_function" and source.target is aten.permute.default:
            before, first = args_of(source)
            joined = [first[place] for place in order]
            node.args = (before, joined)
            if joined == sorted(joined):
                node.replace_all_uses_with(before)
    graph.graph.eliminate_dead_code()


def _fold_constants(graph: fx.GraphModule) -> None:
    """What depends on no image is computed now."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        shape = node.meta["val"].shape
        if node.target in _NEW and all(isinstance(size, int) for size in shape):
            fill = _fill(node)
            value = torch.full(shape, fill, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
        elif node.all_input_nodes and all(source.op == "get_attr" for source in node.all_input_nodes):
            with torch.no_grad():
                value = node.target(*_values(graph, node.args), **_values(graph, node.kwargs))
        else:
            continue
        node.replace_all_uses_with(constant(graph, node, value))
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _fill(node: fx.Node) -> float:
    if node.target is aten.full_like.default:
        return float(node.args[1])  # type: ignore[arg-type]
    return 1.0 if node.target is aten.ones_like.default else 0.0


def _values(graph: fx.GraphModule, arguments: Any) -> Any:
    return fx.node.map_arg(arguments, lambda node: tensor_of(graph, node))


def tensor_of(graph: fx.GraphModule, node: Any) -> Tensor:
    """The tensor behind a node that reads an attribute."""
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    assert isinstance(value, Tensor)
    return value


def constant(graph: fx.GraphModule, before: fx.Node, value: Tensor, name: str = "constant") -> fx.Node:
    """A new node that gives a tensor, in front of another."""
    number = sum(1 for key in graph._buffers if key.startswith(name))
    graph.register_buffer(f"{name}_{number}", value.detach())
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(f"{name}_{number}")
    node.meta["val"] = value
    return node


def own_tensors(graph: fx.GraphModule) -> Iterator[str]:
    """Names of parameters and buffers that no node reads any more."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in read and not any(name.startswith(f"{module}.") for module in called):
            yield name


def calls(graph: fx.GraphModule, *targets: Callable[..., Any]) -> list[fx.Node]:
    """The nodes that call one of these operators, in order."""
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target in targets]


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """A call's arguments, of whatever types its operator takes."""
    return tuple(node.args)


def module_of(node: fx.Node) -> str:
    """The name of the module whose forward a node is in; empty for the network itself."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values()]
    return names[-1] if names else ""


def put_module(graph: fx.GraphModule, nodes: Sequence[fx.Node], name: str, *inputs: fx.Node) -> None:
    """Replace nodes, of which only the last is read, by a call of the module of that name."""
    end = nodes[-1]
    with graph.graph.inserting_before(end):
        node = graph.graph.call_module(name, inputs)
    node.meta["val"] = end.meta["val"]
    end.replace_all_uses_with(node)
    for old in reversed(nodes):
        graph.graph.erase_node(old)
