"""What the engine knows about a module: its kind, the layout it needs, and its affine form in eval mode.

One table. A kind is read off the module, never off an architecture: adding one means adding a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import timm.layers as timm_layers
from timm.layers.conv2d_same import Conv2dSameExport
from timm.layers.norm import LayerNormExp2d
from timm.layers.norm_act import BatchNormAct2d, LayerNormAct2d, LayerNormAct2dFp32
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp import affine
from updp.affine import Affine
from updp.layers import BatchNorm, Layout, Negate, Pad, PaddedConv2d, Scale, conv_padding

KindName: TypeAlias = Literal[
    "conv", "linear", "batchnorm", "norm", "norm_act", "activation",
    "scale", "drop", "identity", "pad", "negate", "opaque",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """``layout`` None: works in either. ``affine(module, channels)`` gives the eval-mode operator in float64."""

    name: KindName
    layout: Layout | None = None
    affine: Callable[[nn.Module, int], Affine] | None = None

    @property
    def is_operator(self) -> bool:
        """Counts in depth: a convolution or a linear layer."""
        return self.name in ("conv", "linear")

    @property
    def is_diagonal(self) -> bool:
        """A per-channel scale and shift, to be fused into a neighbour."""
        return self.name in ("batchnorm", "scale", "negate")

    @property
    def vanishes(self) -> bool:
        """Computes nothing in eval mode."""
        return self.name in ("drop", "identity")


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


def _conv(module: nn.Module, channels: int) -> Affine:
    assert isinstance(module, nn.Conv2d)
    padding = conv_padding(module)
    assert padding is not None
    taps = getattr(module, "taps", None)
    stride, dilation = module.stride, module.dilation
    return Affine(
        module.weight.detach().double(), _double(module.bias), (stride[0], stride[1]), padding,
        (dilation[0], dilation[1]), module.groups, _double(taps),
    )  # fmt: skip


def _linear(module: nn.Module, channels: int) -> Affine:
    assert isinstance(module, nn.Linear)
    return Affine(module.weight.detach().double()[:, :, None, None], _double(module.bias))


def _batchnorm(module: nn.Module, channels: int) -> Affine:
    assert isinstance(module, _BatchNorm)
    mean, var = _double(module.running_mean), _double(module.running_var)
    assert mean is not None and var is not None
    return affine.batchnorm(mean, var, _double(module.weight), _double(module.bias), module.eps)


def scale_parameter(module: nn.Module) -> nn.Parameter:
    """The factor of a layer scale, whatever its module calls it."""
    value = module.weight if isinstance(module, Scale) else module.gamma
    assert isinstance(value, nn.Parameter)
    return value


def out_channels_of(module: nn.Module) -> int | None:
    """Output channels of a module that says so."""
    for attribute in ("out_channels", "out_features", "num_features"):
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    return None


def _scale(module: nn.Module, channels: int) -> Affine:
    return affine.diagonal(scale_parameter(module).detach().double())


def _identity(module: nn.Module, channels: int) -> Affine:
    return affine.identity(channels)


def _pad(module: nn.Module, channels: int) -> Affine:
    assert isinstance(module, Pad)
    return affine.pad(channels, module.padding)


def _negate(module: nn.Module, channels: int) -> Affine:
    return affine.negate(channels)


_CONVS = (nn.Conv2d, PaddedConv2d, timm_layers.Conv2dSame, Conv2dSameExport)
_LINEARS = (nn.Linear, timm_layers.Linear)
_BATCHNORMS = (_BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, BatchNorm, nn.SyncBatchNorm)
_NORMS_FIRST = (
    nn.GroupNorm, timm_layers.LayerNorm2d, timm_layers.LayerNorm2dFp32, LayerNormExp2d,
    timm_layers.RmsNorm2d, timm_layers.SimpleNorm2d, LayerNormAct2d, LayerNormAct2dFp32,
)  # fmt: skip
_NORMS_LAST = (nn.LayerNorm, timm_layers.RmsNorm, timm_layers.SimpleNorm)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.ELU,
    nn.LeakyReLU, nn.PReLU, nn.Softplus, timm_layers.activations.GELU, timm_layers.activations.GELUTanh,
    timm_layers.activations.QuickGELU, timm_layers.activations.Swish, timm_layers.activations.Mish,
    timm_layers.activations.HardSwish, timm_layers.activations.HardMish, timm_layers.activations.Sigmoid,
    timm_layers.activations.Tanh, timm_layers.activations.HardSigmoid,
)  # fmt: skip
_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, timm_layers.DropPath, timm_layers.DropBlock2d)


TABLE: tuple[tuple[Kind, tuple[type[nn.Module], ...]], ...] = (
    (Kind("conv", "first", _conv), _CONVS),
    (Kind("linear", "last", _linear), _LINEARS),
    (Kind("batchnorm", "first", _batchnorm), _BATCHNORMS),
    (Kind("norm", "first"), _NORMS_FIRST),
    (Kind("norm", "last"), _NORMS_LAST),
    (Kind("norm_act", "first"), (BatchNormAct2d,)),
    (Kind("activation"), _ACTIVATIONS),
    (Kind("scale", None, _scale), (Scale,)),
    (Kind("scale", "last", _scale), (timm_layers.LayerScale,)),
    (Kind("scale", "first", _scale), (timm_layers.LayerScale2d,)),
    (Kind("drop", None, _identity), _DROPS),
    (Kind("identity", None, _identity), (nn.Identity,)),
    (Kind("pad", "first", _pad), (Pad,)),
    (Kind("negate", None, _negate), (Negate,)),
)
"""Every kind but ``opaque``, with the classes that are of it. Subclasses of the first three may be something else."""


def kind_of(module: nn.Module) -> Kind:
    """The kind of a module; unknown modules and containers are opaque: run as they are, never merged."""
    if isinstance(module, nn.Conv2d):
        plain = _computes_as(module, _CONVS) and conv_padding(module) is not None
        return Kind("conv", "first", _conv) if plain else Kind("opaque", "first")
    if isinstance(module, nn.Linear):
        return Kind("linear", "last", _linear) if _computes_as(module, _LINEARS) else Kind("opaque", "last")
    if isinstance(module, _BatchNorm):
        return _batchnorm_kind(module)
    return next((kind for kind, classes in TABLE if isinstance(module, classes)), Kind("opaque"))


def _computes_as(module: nn.Module, known: tuple[type[nn.Module], ...]) -> bool:
    """Whether the forward pass is one of these classes': a subclass may standardise its weight or add an activation."""
    return any(type(module).forward is cls.forward for cls in known)


def _batchnorm_kind(module: _BatchNorm) -> Kind:
    if isinstance(module, BatchNormAct2d):
        return Kind("norm_act", "first")
    layout: Layout | None = None if isinstance(module, BatchNorm) else "first"  # ours works in either
    fixed = module.running_mean is not None and _computes_as(module, _BATCHNORMS)
    return Kind("batchnorm", layout, _batchnorm) if fixed else Kind("norm", layout)
