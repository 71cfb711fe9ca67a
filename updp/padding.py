"""Where a run pads and strides: padding to its front, stride to its end (UPDP; DepthShrinker 4.4).

A zero-padded hidden map is not what a merged convolution sees: zeros are not conv1(zeros) + bias. Padding on the
first operator and stride on the last make the merge exact at the borders too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from updp.affine import NO_PADS, Padding, Same, centre_crop
from updp.errors import MergeError
from updp.flow import Call, Node, Nodes, Run, rebuild
from updp.kinds import kind_of
from updp.layers import Pad, conv_padding, make_conv


@dataclass(frozen=True)
class Geometry:
    """A convolution's own stride and padding, before the recipe moves them."""

    stride: tuple[int, int]
    padding: Padding


def crop_conv(parts: dict[str, nn.Module], name: str, conv: nn.Conv2d, geometry: Geometry, size: int) -> Geometry:
    """Put the centre crop of a convolution in its place; its padding shrinks with it. Returns its new geometry."""
    weight = nn.Parameter(centre_crop(conv.weight.detach(), size), requires_grad=conv.weight.requires_grad)
    bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
    dilation = (conv.dilation[0], conv.dilation[1])
    padding = _cropped_padding(geometry.padding, (conv.kernel_size[0], conv.kernel_size[1]), size, dilation)
    parts[name] = make_conv(
        weight, bias, stride=geometry.stride, pads=padding, dilation=dilation, groups=conv.groups
    ).train(conv.training)
    return Geometry(geometry.stride, padding)


def _cropped_padding(padding: Padding, old: tuple[int, int], size: int, dilation: tuple[int, int]) -> Padding:
    if isinstance(padding, Same):
        return replace(padding, kernel_size=(size, size))
    out = []
    for axis in (0, 1):
        before = (old[axis] - size) // 2 * dilation[axis]
        after = (old[axis] - size) * dilation[axis] - before
        out += [padding[2 * axis] - before, padding[2 * axis + 1] - after]
    if min(out) < 0:
        raise MergeError(
            f"resize: {old[0]}x{old[1]} with padding {padding} has no centre {size}x{size} of equal output"
        )
    return (out[0], out[1], out[2], out[3])


def move_padding(nodes: Nodes, parts: dict[str, nn.Module], geometry: Mapping[str, Geometry]) -> Nodes:
    """Rewrite every run: nodes are returned, the parts that change are replaced in ``parts``."""
    out: list[Node] = []
    for node in nodes:
        if isinstance(node, Run):
            out.append(Run(_move_in_chain(node.flow, parts, geometry)))
        else:
            out.append(rebuild(node, lambda flow: move_padding(flow, parts, geometry)))
    return tuple(out)


def _move_in_chain(chain: Nodes, parts: dict[str, nn.Module], geometry: Mapping[str, Geometry]) -> Nodes:
    """One chain of a run; the branches of its sums are chains of their own."""
    inner = tuple(rebuild(node, lambda flow: _move_in_chain(flow, parts, geometry)) for node in chain)
    convs = [node.name for node in chain if isinstance(node, Call) and node.name in geometry]
    for name in convs:  # an earlier layout may have moved them: start from their own geometry
        _set_geometry(parts, name, geometry[name].stride, geometry[name].padding)
    padded = [name for name in convs if geometry[name].padding != NO_PADS]
    alone_in_front = bool(padded) and padded == convs[:1] and _is_first_effect(chain, convs, parts)
    strides_move = _stride_must_move(convs, parts, geometry)
    if not padded or (alone_in_front and not strides_move):
        if strides_move:
            _move_strides(convs, parts, geometry)
        return inner
    total = _total_padding(padded, convs, parts, geometry)
    for name in convs:
        _set_geometry(parts, name, geometry[name].stride, NO_PADS)
    if strides_move:
        _move_strides(convs, parts, geometry)
    name = f"pad.{padded[0]}"
    parts[name] = Pad(total)
    return (Call(name), *inner)


def _is_first_effect(chain: Nodes, convs: list[str], parts: Mapping[str, nn.Module]) -> bool:
    """Whether nothing but identities stands before the chain's first convolution."""
    for node in chain:
        if not isinstance(node, Call):
            return False
        if node.name == convs[0]:
            return True
        if not kind_of(parts[node.name]).vanishes:
            return False
    return False


def _wide(name: str, parts: Mapping[str, nn.Module]) -> bool:
    conv = parts[name]
    assert isinstance(conv, nn.Conv2d)
    return max(conv.kernel_size) > 1


def _stride_must_move(convs: list[str], parts: Mapping[str, nn.Module], geometry: Mapping[str, Geometry]) -> bool:
    """A stride stays where nothing behind it is wider than 1x1: moving it would only cost training compute.

    Raises:
        MergeError: a 1x1 behind the stride pads: no padding in front gives an output of the same size.
    """
    for i, name in enumerate(convs):
        if geometry[name].stride != (1, 1):
            behind = convs[i + 1 :]
            for later in behind:
                if not _wide(later, parts) and geometry[later].padding != NO_PADS:
                    raise MergeError(f"{later}, a padded 1x1 behind the strided {name}, cannot be merged with it")
            return any(_wide(later, parts) for later in behind)
    return False


def _move_strides(convs: list[str], parts: dict[str, nn.Module], geometry: Mapping[str, Geometry]) -> None:
    total = _total_stride(convs, geometry)
    last = [name for name in convs if _wide(name, parts)][-1]
    for name in convs:
        conv = parts[name]
        assert isinstance(conv, nn.Conv2d)
        padding = conv_padding(conv)
        assert padding is not None
        _set_geometry(parts, name, total if name == last else (1, 1), padding)


def _total_stride(convs: list[str], geometry: Mapping[str, Geometry]) -> tuple[int, int]:
    height = width = 1
    for name in convs:
        height, width = height * geometry[name].stride[0], width * geometry[name].stride[1]
    return height, width


def _total_padding(
    padded: list[str], convs: list[str], parts: Mapping[str, nn.Module], geometry: Mapping[str, Geometry]
) -> Padding:
    """Paddings add unweighted, because the stride moves to the end; SAME is that of the composed convolution."""
    dynamic = [name for name in padded if isinstance(geometry[name].padding, Same)]
    if not dynamic:
        sums = [0, 0, 0, 0]
        for name in padded:
            for i, value in enumerate(geometry[name].padding):  # type: ignore[arg-type]
                sums[i] += value
        return (sums[0], sums[1], sums[2], sums[3])
    if len(dynamic) != len(padded):
        raise MergeError(f"SAME padding of {dynamic[0]} mixed with fixed padding in one run has no fixed alignment")
    spans = [0, 0]
    for name in convs:
        conv = parts[name]
        assert isinstance(conv, nn.Conv2d)
        for axis in (0, 1):
            spans[axis] += (conv.kernel_size[axis] - 1) * conv.dilation[axis]
    return Same((spans[0] + 1, spans[1] + 1), _total_stride(convs, geometry))


def _set_geometry(parts: dict[str, nn.Module], name: str, stride: tuple[int, int], padding: Padding) -> None:
    """The same weights under another stride and padding; the module is kept where nothing changes."""
    conv = parts[name]
    assert isinstance(conv, nn.Conv2d)
    if conv.stride == stride and conv_padding(conv) == padding:
        return
    assert isinstance(conv.weight, nn.Parameter) and (conv.bias is None or isinstance(conv.bias, nn.Parameter))
    parts[name] = make_conv(
        conv.weight,
        conv.bias,
        stride=stride,
        pads=padding,
        dilation=(conv.dilation[0], conv.dilation[1]),
        groups=conv.groups,
    ).train(conv.training)
