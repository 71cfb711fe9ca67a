"""Norms and per-channel factors in a graph: each one affine map, given to a neighbour wherever that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from updp.deployment.capture import args_of, aten, calls, constant, tensor_of


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    """``x * scale + shift``, both ``(C,)`` along an axis: what a norm is in inference."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


@dataclass
class Operator:
    """A convolution or linear layer of a graph, with its weights in float64: affine maps are folded into these.

    Attributes:
        weight: ``(K, C / groups, kh, kw)``, or ``(K, C)`` of a linear layer.
        bias: ``(K,)``.
        pads: zeros above, left, below and right; the padding of a node in front is taken in.
    """

    node: fx.Node
    input: fx.Node
    weight: Tensor
    bias: Tensor
    has_bias: bool
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        return self.weight.dim() == 2

    @property
    def axis(self) -> int:
        """Of the channels."""
        return -1 if self.is_linear else 1

    def fold_behind(self, scale: Tensor, shift: Tensor) -> None:
        """Take in an affine map of the output."""
        self.weight = self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))
        self.bias, self.has_bias = self.bias * scale + shift, True

    def takes_in_front(self, axis: int, dims: int) -> bool:
        """Whether an affine map of the input can be taken in: zeros of a border would have to be shifted too."""
        return not any(self.pads) and axis in (self.axis, self.axis % dims)

    def fold_in_front(self, scale: Tensor, shift: Tensor) -> None:
        """Take in an affine map of the input."""
        per_group = scale.view(self.groups, -1), shift.view(self.groups, -1)
        scales, shifts = (each.repeat_interleave(len(self.weight) // self.groups, 0) for each in per_group)
        shape = (*scales.shape, *[1] * (self.weight.dim() - 2))
        self.bias = self.bias + (self.weight * shifts.view(shape)).flatten(1).sum(1)
        self.weight, self.has_bias = self.weight * scales.view(shape), True


def operators_of(graph: fx.GraphModule) -> dict[fx.Node, Operator]:
    """The convolutions of maps and the linear layers whose weights are constant."""
    found = {}
    for node in calls(graph, aten.conv2d.default, aten.conv2d.padding, aten.linear.default):
        x, weight, *rest = args_of(node)
        bias = rest[0] if rest else None
        if all(isinstance(each, fx.Node) and each.op == "get_attr" for each in (weight, bias) if each is not None):
            weights = tensor_of(graph, weight).detach().double()
            no_bias = weights.new_zeros(len(weights))
            biases = no_bias if bias is None else tensor_of(graph, bias).detach().double()
            operator = Operator(node, x, weights, biases, bias is not None)
            if node.target is not aten.linear.default:
                _read_geometry(operator)
            found[node] = operator
    return found


def _read_geometry(operator: Operator) -> None:
    """Stride, padding, dilation and groups from the arguments of a convolution."""
    names = ("stride", "padding", "dilation", "groups")
    arguments = dict(zip(names, args_of(operator.node)[3:], strict=False)) | dict(operator.node.kwargs)
    operator.stride, operator.dilation = (_pair(arguments.get(name, 1)) for name in ("stride", "dilation"))
    operator.groups = int(arguments.get("groups", 1))
    padding = arguments.get("padding", 0)
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(operator.dilation, operator.weight.shape[2:], strict=True)]
        before = [size // 2 if padding == "same" else 0 for size in reach]
        behind = [size - size // 2 if padding == "same" else 0 for size in reach]
        operator.pads = (before[0], before[1], behind[0], behind[1])
    else:
        operator.pads = _pair(padding) * 2  # above and left, below and right
    _take_padding(operator)


def _take_padding(operator: Operator) -> None:
    """Zeros that a node of their own puts around the input."""
    node = operator.input
    if node.op != "call_function" or node.target not in (aten.constant_pad_nd.default, aten.pad.default):
        return
    source, sizes, *rest = args_of(node)
    mode, fill = ("constant", *rest, 0.0)[:2] if not rest or not isinstance(rest[0], str) else (*rest, 0.0)[:2]
    if mode == "constant" and not fill and len(sizes) == 4 and min(sizes) >= 0:
        left, right, top, bottom = sizes
        own = operator.pads
        operator.pads = (own[0] + top, own[1] + left, own[2] + bottom, own[3] + right)
        operator.input = source


def name_affines(graph: fx.GraphModule) -> None:
    """Write norms with fixed statistics, and products and sums with one number a channel, as `channel_affine`."""
    for node in calls(graph, aten._native_batch_norm_legit_no_training.default):
        _name_norm(graph, node)
    for node in calls(graph, aten.mul.Tensor, aten.add.Tensor):
        _name_constant(graph, node)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()


def _name_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias, mean, variance, _, eps = args_of(node)
    used = [user for user in node.users if args_of(user)[1] == 0]
    if len(used) != len(node.users) or any(
        isinstance(each, fx.Node) and each.op != "get_attr" for each in (weight, bias, mean, variance)
    ):
        return
    scale = (tensor_of(graph, variance).detach().double() + float(eps)).rsqrt()
    if weight is not None:
        scale = scale * tensor_of(graph, weight).detach().double()
    shift = -tensor_of(graph, mean).detach().double() * scale
    if bias is not None:
        shift = shift + tensor_of(graph, bias).detach().double()
    axis = 1
    (out,) = used
    # A norm over tokens runs on rows: (N, L, C) -> (N L, C) -> (N, L, C).
    if x.target is aten.reshape.default and x.meta["val"].dim() == 2:
        source, behind = args_of(x)[0], next(iter(out.users))
        again = behind.target is aten.reshape.default and len(out.users) == 1
        if again and behind.meta["val"].shape == source.meta["val"].shape:
            x, out, axis = source, behind, -1
    _insert(graph, out, x, scale, shift, axis)


def _name_constant(graph: fx.GraphModule, node: fx.Node) -> None:
    """A product or a sum with a constant that has one number a channel, or one for all."""
    pair = args_of(node)[:2]
    for x, other in (pair, pair[::-1]):
        if not isinstance(x, fx.Node) or x.op == "get_attr" or node.kwargs:
            continue
        if not (isinstance(other, fx.Node) and other.op == "get_attr"):
            continue
        value, shape = tensor_of(graph, other).detach().double(), x.meta["val"].shape
        padded = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
        wide = [axis for axis, size in enumerate(padded) if size != 1]
        if len(wide) != 1 or len(padded) != len(shape) or wide[0] == 0 or padded[wide[0]] != shape[wide[0]]:
            continue
        channels, one = value.flatten(), torch.ones_like(value.flatten())
        is_product = node.target is aten.mul.Tensor
        scale, shift = (channels, 0 * one) if is_product else (one, channels)
        _insert(graph, node, x, scale, shift, wide[0])
        return


def _insert(graph: fx.GraphModule, out: fx.Node, x: fx.Node, scale: Tensor, shift: Tensor, axis: int) -> None:
    constants = [constant(graph, out, each, "affine") for each in (scale, shift)]
    with graph.graph.inserting_before(out):
        node = graph.graph.call_function(channel_affine, (x, *constants, axis))
    node.meta["val"] = out.meta["val"]
    out.replace_all_uses_with(node)


def fold_forward(graph: fx.GraphModule, operators: Mapping[fx.Node, Operator]) -> None:
    """Give affine maps to all that is behind them, where that takes them, and nothing in front would for nothing."""
    inputs: dict[fx.Node, list[Operator]] = {}
    for operator in operators.values():
        inputs.setdefault(operator.input, []).append(operator)
    _bare_layer_norms(graph, inputs)
    for node in calls(graph, channel_affine):
        x, scale, shift, axis = args_of(node)
        behind, dims = inputs.get(node, []), node.meta["val"].dim()
        if (isinstance(x, fx.Node) and x in operators and len(x.users) == 1) or len(behind) != len(node.users):
            continue
        if behind and all(operator.takes_in_front(axis, dims) for operator in behind):
            values = tensor_of(graph, scale), tensor_of(graph, shift)
            _fold_into(node, x, behind, values)


def _fold_into(node: fx.Node, x: fx.Node, behind: list[Operator], values: tuple[Tensor, Tensor]) -> None:
    for operator in behind:
        operator.fold_in_front(*values)
        operator.input = x
    node.replace_all_uses_with(x)


def settle_affines(graph: fx.GraphModule, dtype: torch.dtype) -> None:
    """Give the affine maps that nothing took the network's precision."""
    for node in calls(graph, channel_affine):
        for constant_node in args_of(node)[1:3]:
            name = str(constant_node.target)
            graph.register_buffer(name, tensor_of(graph, constant_node).to(dtype))


def _bare_layer_norms(graph: fx.GraphModule, inputs: Mapping[fx.Node, list[Operator]]) -> None:
    """Give the weights of a layer norm to the linear layers behind it."""
    for node in calls(graph, aten.layer_norm.default):
        x, shape, *rest = args_of(node)
        weight, bias, *more = [*rest, None, None][: max(len(rest), 2)]
        behind = inputs.get(node, [])
        foldable = len(shape) == 1 and behind and len(behind) == len(node.users)
        if foldable and isinstance(weight, fx.Node) and all(operator.is_linear for operator in behind):
            scale = tensor_of(graph, weight).detach().double()
            shift = tensor_of(graph, bias).detach().double() if isinstance(bias, fx.Node) else 0 * scale
            for operator in behind:
                operator.fold_in_front(scale, shift)
            node.args = (x, shape, None, None, *more)


def _pair(value: object) -> tuple[int, int]:
    values = value if isinstance(value, list | tuple) else (value,)
    return int(values[0]), int(values[-1])
