"""A chain of affine steps becomes one operator: its algebra, and the module that computes it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from updp import affine
from updp.affine import Affine, Same
from updp.errors import MergeError
from updp.flow import Call, Node, Nodes, Parallel, Run, walk
from updp.kinds import kind_of
from updp.layers import make_conv


def affine_of(
    nodes: Nodes, parts: Mapping[str, nn.Module], channels: int, device: torch.device | None = None
) -> Affine:
    """The one operator that a chain of affine nodes computes, float64, on the device of the whole chain's weights.

    Raises:
        MergeError: with the step at which exactness would be lost.
    """
    device = _device_of(nodes, parts) if device is None else device
    total: Affine | None = None
    for node in nodes:
        try:
            current = _affine_of_one(node, parts, channels if total is None else total.out_channels, device)
            total = current if total is None else affine.compose(current, total)
        except MergeError as error:
            told = str(error)  # a sum inside has said at which step
            raise MergeError(
                told if told.startswith("at ") else f"at {getattr(node, 'name', None) or 'a sum'}: {told}"
            ) from None
    assert total is not None
    return total


def _affine_of_one(node: Node, parts: Mapping[str, nn.Module], channels: int, device: torch.device) -> Affine:
    if isinstance(node, Parallel):
        unit = affine.identity(channels).to(device)
        return functools.reduce(affine.add, [affine_of(f, parts, channels, device) if f else unit for f in node.flows])
    if isinstance(node, Run):
        return affine_of(node.flow, parts, channels, device)
    form = kind_of(parts[node.name]).affine if isinstance(node, Call) else None
    if form is None:
        raise MergeError("not affine")
    assert isinstance(node, Call)
    return form(parts[node.name], channels).to(device)


def _device_of(nodes: Nodes, parts: Mapping[str, nn.Module]) -> torch.device:
    """Where a chain's weights are; units have none of their own."""
    modules = (parts[node.name] for node in walk(nodes) if isinstance(node, Call))
    return next((t.device for m in modules for t in (*m.parameters(), *m.buffers())), torch.device("cpu"))


def module_of(composed: Affine, nodes: Nodes, parts: Mapping[str, nn.Module]) -> nn.Module:
    """The module of a composed chain, on its source's device and in its dtype: linear where every source is.

    Raises:
        MergeError: the padding in front of the chain is not one that a module has.
    """
    sources = [parts[n.name] for n in walk(nodes) if isinstance(n, Call)]
    operators = [m for m in sources if kind_of(m).is_operator]
    like = operators[0].weight
    assert isinstance(like, Tensor)

    def parameter(tensor: Tensor) -> nn.Parameter:
        # Fresh memory, since strides choose the convolution algorithm (of size-1 dimensions too, which
        # `contiguous` leaves alone): the same weights loaded again must give the same bits.
        return nn.Parameter(torch.empty(tensor.shape, dtype=like.dtype, device=like.device).copy_(tensor))

    weight, bias = parameter(composed.weight), None if composed.bias is None else parameter(composed.bias)
    if not any(kind_of(m).layout == "first" for m in operators):
        linear = nn.Linear(composed.in_channels, composed.out_channels, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.data.flatten(1))
        linear.register_parameter("bias", bias)
        return linear.eval()
    taps = None if composed.taps is None else composed.taps.to(like.device, like.dtype)
    return make_conv(
        weight,
        bias,
        stride=composed.stride,
        pads=_as_module_padding(composed),
        dilation=composed.dilation,
        groups=composed.groups,
        taps=taps,
    ).eval()


def _as_module_padding(composed: Affine) -> affine.Padding:
    """SAME padding put in front of a run must be what the composed convolution itself would ask for."""
    padding = composed.padding
    if isinstance(padding, Same):
        spans = [(k - 1) * d for k, d in zip(padding.kernel_size, padding.dilation, strict=True)]
        if spans != list(composed.span) or padding.stride != composed.stride:
            raise MergeError(f"{padding} in front of the run is not the SAME padding of the merged convolution")
        return replace(padding, kernel_size=composed.kernel_size, dilation=composed.dilation)
    return padding
