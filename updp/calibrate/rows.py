"""What an operator sees: rows of inputs and outputs at sampled positions of a map or of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from updp.affine import pads_of
from updp.layers import conv_padding, pad_map


def shape_of(operator: nn.Module) -> tuple[int, int, int]:
    """Groups, inputs and outputs of each group: the shape of the operator's `Equations`."""
    weight = weight_of(operator)
    groups = operator.groups if isinstance(operator, nn.Conv2d) else 1
    return groups, weight[0].numel(), weight.shape[0] // groups


def weight_of(operator: nn.Module) -> Tensor:
    """The weight of a convolution or a linear layer."""
    weight = operator.weight
    assert isinstance(weight, Tensor)
    return weight


def sample(operator: nn.Module, x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of a batch.

    Args:
        operator: a convolution or a linear layer.
        x: its input, ``(N, C, H, W)`` or ``(..., C)``.
        y: what its output should be.
        count: positions of each image, borders among them; all of them where there are fewer.

    Returns:
        ``(G, n, inputs)`` and ``(G, n, outputs)``, the order of the inputs being that of the weight's own entries.
    """
    if isinstance(operator, nn.Conv2d):
        return _sample_map(operator, x, y, count, generator)
    x, y = x.reshape(x.shape[0], -1, x.shape[-1]), y.reshape(y.shape[0], -1, y.shape[-1])
    index = _positions(x.shape[0], x.shape[1], count, generator).to(x.device)
    image = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[image, index].flatten(0, 1)[None], y[image, index].flatten(0, 1)[None]


def _positions(images: int, places: int, count: int, generator: torch.Generator) -> Tensor:
    """Different places for each image, ``(images, at most count)``."""
    return torch.rand(images, places, generator=generator).argsort(1)[:, :count]


def _sample_map(conv: nn.Conv2d, x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    padding = conv_padding(conv)
    assert padding is not None
    padded = pad_map(x, pads_of(padding, x.shape[-2], x.shape[-1])).permute(0, 2, 3, 1)
    index = _positions(x.shape[0], y.shape[-2] * y.shape[-1], count, generator).to(x.device)
    rows, columns = index // y.shape[-1], index % y.shape[-1]
    image = torch.arange(x.shape[0], device=x.device)[:, None]
    taps = [
        padded[image, rows * conv.stride[0] + i * conv.dilation[0], columns * conv.stride[1] + j * conv.dilation[1]]
        for i in range(conv.kernel_size[0])
        for j in range(conv.kernel_size[1])
    ]
    seen = torch.stack(taps, -1).flatten(0, 1)  # (n, C, taps)
    wanted = y.permute(0, 2, 3, 1)[image, rows, columns].flatten(0, 1)
    groups = conv.groups
    return (
        seen.reshape(len(seen), groups, -1).transpose(0, 1),
        wanted.reshape(len(wanted), groups, -1).transpose(0, 1),
    )


def as_solution(operator: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The operator's weight in the order of a solution, ``(G, inputs, outputs)``."""
    weight = weight_of(operator) if weight is None else weight
    groups, inputs, outputs = shape_of(operator)
    return weight.detach().double().reshape(groups, outputs, inputs).transpose(1, 2)


def assign(operator: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Write a solution into the operator, in its own dtype.

    Raises:
        ValueError: the operator has no bias to take the solution's.
    """
    own = weight_of(operator)
    if not isinstance(operator.bias, nn.Parameter):
        raise ValueError("the operator has no bias")
    with torch.no_grad():
        own.copy_(weight.transpose(1, 2).reshape(own.shape))
        operator.bias.copy_(bias.reshape(-1))
