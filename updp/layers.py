"""The few layers that pruned and merged networks need and torch and timm lack: plain modules without training code."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp.affine import Padding, Pads, Same, pads_of, same_padding

Layout: TypeAlias = Literal["first", "last"]  # channels in dimension 1 (NCHW) or in the last one (NHWC, tokens)


class BatchNorm(_BatchNorm):
    """Batch norm over every dimension but the channels, in either layout.

    Tokens ``(N, L, C)`` are normalised over batch x tokens, class token included (UPDP, "plain BN in a transformer").
    """

    layout: Layout = "first"

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "last" and x.dim() > 2:
            return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return super().forward(x)


class Scale(nn.Module):
    """A per-channel factor ``weight (C,)`` in either layout; shares the parameter that it is given."""

    layout: Layout = "first"

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "last":
            return x * self.weight
        return x * self.weight.reshape(1, -1, *[1] * (x.dim() - 2))


class Pad(nn.Module):
    """Zero padding of a map ``(N, C, H, W)``: four integers (top, bottom, left, right) or SAME, computed per size."""

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return pad_map(x, pads_of(self.padding, x.shape[-2], x.shape[-1]))

    def extra_repr(self) -> str:
        return str(self.padding)


class Negate(nn.Module):
    """``-x``."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


class PaddedConv2d(nn.Conv2d):
    """A convolution with what `nn.Conv2d` cannot say: four paddings or SAME, and a bias per tap (`Affine.taps`).

    ``taps (O, kh, kw)`` adds, for every output, the entries of the taps that lie on the map: any size, SAME included.
    """

    def __init__(self, *args: Any, pads: Padding, tap_bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pads = pads
        size = (self.out_channels, *self.kernel_size)
        self.taps = (
            nn.Parameter(torch.zeros(size, dtype=self.weight.dtype, device=self.weight.device)) if tap_bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        pads = pads_of(self.pads, x.shape[-2], x.shape[-1])
        out: Tensor = self._conv_forward(pad_map(x, pads), self.weight, self.bias)
        if self.taps is not None:
            ones = pad_map(torch.ones_like(x[:1, :1]), pads)
            out = out + F.conv2d(ones, self.taps[:, None], None, self.stride, 0, self.dilation)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pads={self.pads}, tap_bias={self.taps is not None}"


def pad_map(x: Tensor, pads: Pads) -> Tensor:
    """Zero-pad ``(N, C, H, W)`` by (top, bottom, left, right)."""
    top, bottom, left, right = pads
    return F.pad(x, (left, right, top, bottom)) if any(pads) else x


def conv_padding(conv: nn.Conv2d) -> Padding | None:
    """The zero padding of any convolution module, own or timm's; None where it is not zero padding."""
    if conv.padding_mode != "zeros":
        return None
    if isinstance(conv, PaddedConv2d):
        return conv.pads
    kernel, stride, dilation = _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.dilation)
    if type(conv).__name__ in ("Conv2dSame", "Conv2dSameExport"):  # timm's; their `padding` says 0
        return same_padding(kernel, stride, dilation)
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":  # torch's: stride 1 only
        return same_padding(kernel, (1, 1), dilation)
    p = _pair(conv.padding)  # type: ignore[arg-type]
    return (p[0], p[0], p[1], p[1])


def make_conv(
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    *,
    stride: tuple[int, int],
    pads: Padding,
    dilation: tuple[int, int],
    groups: int,
    taps: Tensor | None = None,
) -> nn.Conv2d:
    """A convolution module around given parameters: plain `nn.Conv2d` wherever that can say it."""
    out, per_group, kh, kw = weight.shape
    channels = per_group * groups
    common: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias is not None}
    symmetric = not isinstance(pads, Same) and pads[0] == pads[1] and pads[2] == pads[3]
    if symmetric and taps is None:
        assert not isinstance(pads, Same)
        conv = nn.Conv2d(channels, out, (kh, kw), padding=(pads[0], pads[2]), device="meta", **common)
    else:
        conv = PaddedConv2d(channels, out, (kh, kw), pads=pads, tap_bias=taps is not None, device="meta", **common)
    conv.weight, conv.bias = weight, bias
    if taps is not None:
        conv.taps = nn.Parameter(taps)
    return conv


def _pair(value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    return (int(value[0]), int(value[1]))
