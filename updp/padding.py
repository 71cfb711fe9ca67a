"""Where a run pads and strides: padding to its front, stride to its end (UPDP; DepthShrinker 4.4).

A zero-padded hidden map is not what a merged convolution sees: zeros are not conv1(zeros) + bias. Padding on the
first operator and stride on the last make the merge exact at the borders too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from updp.affine import NO_PADS, Padding, Same, centre_crop, same_padding
from updp.errors import MergeError
from updp.flow import Call, Node, Nodes, Run, children, rebuild, walk
from updp.kinds import kind_of
from updp.layers import Pad, conv_padding, make_conv


@dataclass(frozen=True)
class Geometry:
    """A convolution's own stride and padding, before the recipe moves them."""

    stride: tuple[int, int]
    padding: Padding


def crop_conv(parts: dict[str, nn.Module], name: str, conv: nn.Conv2d, geometry: Geometry, size: int) -> Geometry:
    """Put the centre crop of a convolution in its place; its padding shrinks with it. Returns its new geometry."""
    _refuse_taps(name, conv)
    weight = nn.Parameter(centre_crop(conv.weight.detach(), size), requires_grad=conv.weight.requires_grad)
    bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
    dilation = (conv.dilation[0], conv.dilation[1])
    padding = _cropped_padding(name, geometry.padding, (conv.kernel_size[0], conv.kernel_size[1]), size, dilation)
    parts[name] = make_conv(
        weight, bias, stride=geometry.stride, pads=padding, dilation=dilation, groups=conv.groups
    ).train(conv.training)
    return Geometry(geometry.stride, padding)


def _cropped_padding(
    name: str, padding: Padding, old: tuple[int, int], size: int, dilation: tuple[int, int]
) -> Padding:
    if isinstance(padding, Same):
        return same_padding((size, size), padding.stride, dilation)
    out = []
    for axis in (0, 1):
        before = (old[axis] - size) // 2 * dilation[axis]
        after = (old[axis] - size) * dilation[axis] - before
        out += [padding[2 * axis] - before, padding[2 * axis + 1] - after]
    if min(out) < 0:
        raise MergeError(
            f"resize: {name}, {old[0]}x{old[1]} with padding {padding} and dilation {dilation},"
            f" has no centre {size}x{size} of equal output"
        )
    return (out[0], out[1], out[2], out[3])


def move_padding(nodes: Nodes, parts: dict[str, nn.Module], geometry: Mapping[str, Geometry]) -> Nodes:
    """Rewrite every run: nodes are returned, the parts that change are replaced in ``parts``.

    Raises:
        MergeError: no layout of a run gives maps of the same size; a convolution that stands twice would change.
    """
    out = _move_in_runs(nodes, parts, geometry)
    calls = [node.name for node in walk(nodes) if isinstance(node, Call)]
    for name, own in geometry.items():
        if calls.count(name) > 1 and _geometry_of(parts, name) != own:
            raise MergeError(f"{name} stands in the flow {calls.count(name)} times: its padding and stride cannot move")
    return out


def _move_in_runs(nodes: Nodes, parts: dict[str, nn.Module], geometry: Mapping[str, Geometry]) -> Nodes:
    out: list[Node] = []
    for node in nodes:
        if isinstance(node, Run):
            out.append(Run(_move_in_chain(node.flow, parts, geometry)))
        else:
            out.append(rebuild(node, lambda flow: _move_in_runs(flow, parts, geometry)))
    return tuple(out)


def _move_in_chain(chain: Nodes, parts: dict[str, nn.Module], geometry: Mapping[str, Geometry]) -> Nodes:
    """One chain of a run; the branches of its sums are chains of their own.

    Padding goes to the front and stride to the last wide convolution; where that changes the size of the map, the
    stride stays.
    """
    inner = tuple(rebuild(node, lambda flow: _move_in_chain(flow, parts, geometry)) for node in chain)
    convs = [node.name for node in chain if isinstance(node, Call) and node.name in geometry]
    padded = [name for name in convs if geometry[name].padding != NO_PADS]
    for strides_move in (True, False) if _stride_may_move(convs, parts, geometry) else (False,):
        for name in convs:  # an earlier layout may have moved them: start from their own geometry
            _set_geometry(parts, name, geometry[name])
        size = _effect(inner, parts)
        nodes = inner
        if padded and (strides_move or padded != convs[:1] or not _is_first_effect(chain, convs, parts)):
            pad = f"pad.{padded[0]}"
            parts[pad] = Pad(_total_padding(padded, convs, parts, geometry))
            nodes = (Call(pad), *inner)
            for name in convs:
                _set_geometry(parts, name, Geometry(geometry[name].stride, NO_PADS))
        if strides_move:
            _move_strides(convs, parts, geometry)
        if _effect(nodes, parts) == size:
            return nodes
    raise MergeError(
        f"the padding of {', '.join(padded)} cannot move to the front of the run:"
        " behind a stride, or beside SAME padding, the map would have another size"
    )


def _effect(nodes: Nodes, parts: Mapping[str, nn.Module]) -> tuple[int, int, int, int]:
    """What a chain does to the size of a map: strides ``s`` and growths ``t``, ``(n - 1 + t) // s + 1`` from ``n``."""
    height, width, down, across = 1, 1, 0, 0
    for node in nodes:
        part = parts[node.name] if isinstance(node, Call) else None
        if isinstance(part, nn.Conv2d):
            (sh, sw), padding = part.stride, conv_padding(part)
            spans = [(k - 1) * d for k, d in zip(part.kernel_size, part.dilation, strict=True)]
        elif isinstance(part, Pad):
            (sh, sw), padding, spans = (1, 1), part.padding, [0, 0]
            if isinstance(padding, Same):  # as much as the run behind it takes off again
                spans, padding = (
                    [-(k - 1) * d for k, d in zip(padding.kernel_size, padding.dilation, strict=True)],
                    NO_PADS,
                )
        else:
            flow = next((flow for flow in children(node) if flow), ())
            sh, sw, th, tw = _effect(flow, parts)
            padding, spans = NO_PADS, [-th, -tw]
        if not isinstance(padding, Same):  # SAME gives ``(n - 1) // s + 1``
            assert padding is not None
            down += height * (padding[0] + padding[1] - spans[0])
            across += width * (padding[2] + padding[3] - spans[1])
        height, width = height * sh, width * sw
    return height, width, down, across


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


def _stride_may_move(convs: list[str], parts: Mapping[str, nn.Module], geometry: Mapping[str, Geometry]) -> bool:
    """A stride stays where nothing behind it is wider than 1x1: moving it would only cost training compute."""
    first = next((i for i, name in enumerate(convs) if geometry[name].stride != (1, 1)), len(convs))
    return any(_wide(name, parts) for name in convs[first + 1 :])


def _move_strides(convs: list[str], parts: dict[str, nn.Module], geometry: Mapping[str, Geometry]) -> None:
    total = _total_stride(convs, geometry)
    last = [name for name in convs if _wide(name, parts)][-1]
    for name in convs:
        _set_geometry(parts, name, Geometry(total if name == last else (1, 1), _geometry_of(parts, name).padding))


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


def _geometry_of(parts: Mapping[str, nn.Module], name: str) -> Geometry:
    conv = parts[name]
    assert isinstance(conv, nn.Conv2d)
    padding = conv_padding(conv)
    assert padding is not None
    return Geometry((conv.stride[0], conv.stride[1]), padding)


def _set_geometry(parts: dict[str, nn.Module], name: str, wanted: Geometry) -> None:
    """The same weights under another stride and padding; the module is kept where nothing changes."""
    if _geometry_of(parts, name) == wanted:
        return
    conv = parts[name]
    assert isinstance(conv, nn.Conv2d)
    _refuse_taps(name, conv)
    assert isinstance(conv.weight, nn.Parameter) and (conv.bias is None or isinstance(conv.bias, nn.Parameter))
    parts[name] = make_conv(
        conv.weight,
        conv.bias,
        stride=wanted.stride,
        pads=wanted.padding,
        dilation=(conv.dilation[0], conv.dilation[1]),
        groups=conv.groups,
    ).train(conv.training)


def _refuse_taps(name: str, conv: nn.Conv2d) -> None:
    if getattr(conv, "taps", None) is not None:
        raise MergeError(
            f"{name} has a bias per tap, made for its own kernel, padding and stride: none of them can change"
        )
