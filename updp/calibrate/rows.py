"""What an operator sees: rows of inputs and outputs at sampled positions of a map or of tokens.

A convolution with a bias per tap (`updp.layers.PaddedConv2d`) sees one more input for each tap: 1 where the tap lies on
the map, 0 where it lies on padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from updp.affine import pads_of
from updp.layers import PaddedConv2d, conv_padding, pad_map


def shape_of(operator: nn.Module) -> tuple[int, int, int]:
    """Groups, inputs and outputs of each group: the shape of the operator's `Equations`."""
    weight, taps = weight_of(operator), _taps_of(operator)
    groups = operator.groups if isinstance(operator, nn.Conv2d) else 1
    return groups, weight[0].numel() + (0 if taps is None else taps[0].numel()), weight.shape[0] // groups


def weight_of(operator: nn.Module) -> Tensor:
    """The weight of a convolution or a linear layer."""
    weight = operator.weight
    assert isinstance(weight, Tensor)
    return weight


def _taps_of(operator: nn.Module) -> Tensor | None:
    return operator.taps if isinstance(operator, PaddedConv2d) else None


def sample(operator: nn.Module, x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of a batch.

    Args:
        operator: a convolution or a linear layer.
        x: its input, ``(N, C, H, W)`` or ``(..., C)``.
        y: what its output should be.
        count: positions of each image, borders among them; all of them where there are fewer.

    Returns:
        ``(G, n, inputs)`` and ``(G, n, outputs)``, the order of the inputs being that of the weight's own entries;
        those of the taps follow, where there are any.
    """
    if not isinstance(operator, nn.Conv2d):
        x, y = x.reshape(x.shape[0], -1, x.shape[-1]), y.reshape(y.shape[0], -1, y.shape[-1])
        index = _positions(x.shape[0], x.shape[1], count, generator).to(x.device)
        image = torch.arange(x.shape[0], device=x.device)[:, None]
        return x[image, index].flatten(0, 1)[None], y[image, index].flatten(0, 1)[None]
    seen, wanted = windows(operator, x, y, count, generator)
    groups = operator.groups
    rows = seen[:, : operator.in_channels].reshape(len(seen), groups, -1).transpose(0, 1)
    if _taps_of(operator) is not None:
        rows = torch.cat([rows, seen[None, :, -1].expand(groups, -1, -1)], dim=2)
    return rows, wanted.reshape(len(wanted), groups, -1).transpose(0, 1)


def windows(conv: nn.Conv2d, x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a convolution sees at sampled positions of its output, channel by channel.

    Args:
        conv: gives kernel size, stride, dilation and padding.
        x: its input, ``(N, C, H, W)``.
        y: any map of its output's size, ``(N, O, H', W')``.
        count: positions of each image.

    Returns:
        ``(n, C + 1, kh * kw)``, the last channel being 1 on the map and 0 on padding, and ``(n, O)``.
    """
    padding = conv_padding(conv)
    assert padding is not None
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    padded = pad_map(x, pads_of(padding, x.shape[-2], x.shape[-1])).permute(0, 2, 3, 1)
    index = _positions(x.shape[0], y.shape[-2] * y.shape[-1], count, generator).to(x.device)
    rows, columns = index // y.shape[-1], index % y.shape[-1]
    image = torch.arange(x.shape[0], device=x.device)[:, None]
    taps = [
        padded[image, rows * conv.stride[0] + i * conv.dilation[0], columns * conv.stride[1] + j * conv.dilation[1]]
        for i in range(conv.kernel_size[0])
        for j in range(conv.kernel_size[1])
    ]
    return torch.stack(taps, -1).flatten(0, 1), y.permute(0, 2, 3, 1)[image, rows, columns].flatten(0, 1)


def _positions(images: int, places: int, count: int, generator: torch.Generator) -> Tensor:
    """Different places for each image, ``(images, at most count)``."""
    return torch.rand(images, places, generator=generator).argsort(1)[:, :count]


def as_solution(operator: nn.Module) -> Tensor:
    """The operator's weight, and its taps, in the order of a solution, ``(G, inputs, outputs)``."""
    weight, taps = weight_of(operator).detach().double(), _taps_of(operator)
    rows = weight.flatten(1)
    if taps is not None:
        rows = torch.cat([rows, taps.detach().double().flatten(1)], dim=1)
    groups, inputs, outputs = shape_of(operator)
    return rows.reshape(groups, outputs, inputs).transpose(1, 2)


def assign(operator: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Write a solution into the operator, in its own dtype.

    Raises:
        ValueError: the operator has no bias to take the solution's.
    """
    own, taps = weight_of(operator), _taps_of(operator)
    if not isinstance(operator.bias, nn.Parameter):
        raise ValueError("the operator has no bias")
    rows = weight.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        own.copy_(rows[:, : own[0].numel()].reshape(own.shape))
        if taps is not None:
            taps.copy_(rows[:, own[0].numel() :].reshape(taps.shape))
        operator.bias.copy_(bias.reshape(-1))
