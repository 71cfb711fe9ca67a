"""Random values for every parameter and statistic of a network, so that no error can hide behind a zero.

timm starts last norms at zero and layer scales at 1e-6: with them, a merge could be wrong and look exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp.kinds import kind_of, scale_parameter
from updp.layers import BatchNorm

_LEAST_VARIANCE = 1e-2  # of a channel, relative to the mean over the channels
_ROUNDING = 1e-12  # of the power: a variance that float32 leaves where nothing varies


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill in place: norm weights 0.5-1.5, layer scales 0.1-1, weights of unit gain, biases and statistics non-zero.

    Fixed masks and index tables (buffers that are not norm statistics) stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()

    def fill(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None and id(tensor) not in done:
            done.add(id(tensor))
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low
            tensor.copy_(values)

    with torch.no_grad():
        for part in module.modules():
            kind = kind_of(part).name
            if isinstance(part, _BatchNorm):
                fill(part.running_mean, -0.5, 0.5)
                fill(part.running_var, 0.5, 1.5)
            if kind in ("batchnorm", "norm", "norm_act"):
                fill(getattr(part, "weight", None), 0.5, 1.5)
                fill(getattr(part, "bias", None), -0.5, 0.5)
            elif kind == "scale":
                fill(scale_parameter(part), 0.1, 1.0)
        for parameter in module.parameters():
            gain = (3.0 / max(parameter[0].numel(), 1)) ** 0.5 if parameter.dim() > 1 else 0.5
            if parameter.dim() == 1 and parameter.numel() and _is_bare_scale(module, parameter):
                fill(parameter, 0.1, 1.0)
            else:
                fill(parameter, -gain, gain)
    return module


def settle(module: nn.Module, run: Callable[[], object]) -> None:
    """Fit the random statistics of every batch norm to what arrives there, channel by channel, in the order of one run.

    Statistics that know nothing of their input let a deep network without layer norms grow from block to block, until
    a softmax only picks the largest: then rounding alone changes the output, and no merge could be told from a wrong
    one. One scale for all channels of a norm is not enough: a channel of little power of its own would leave it as a
    constant, which a ReLU turns to zero, and a wrong weight that reads this channel would change nothing. So every
    channel is centred and scaled by its own mean and variance; the random values say how far it stays off both.
    """

    def fit(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        handles.pop(norm).remove()  # once: fitted statistics are no random factors any more
        if norm.running_mean is None or norm.running_var is None:
            return
        mean, var = _moments(norm, args[0])
        if torch.isfinite(var).all() and var.min() > 0:
            norm.running_mean.mul_(var.sqrt()).add_(mean)
            norm.running_var.mul_(var)

    handles = {part: part.register_forward_pre_hook(fit) for part in module.modules() if isinstance(part, _BatchNorm)}
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles.values():
            handle.remove()


def _moments(norm: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel that arrives at a norm.

    A channel that hardly varies counts as varying by a hundredth of the others' mean, else its rounding would be blown
    up to the size of a signal. Where none varies, as in one pixel of one image, the mean power stands in.
    """
    at = x.dim() - 1 if isinstance(norm, BatchNorm) and norm.layout == "last" else 1
    values = x.movedim(at, 0).flatten(1)
    mean, var, power = values.mean(1), values.var(1, correction=0), values.square().mean()
    if var.mean() <= _ROUNDING * power:
        return mean, power.expand_as(var)
    return mean, var.clamp(min=_LEAST_VARIANCE * var.mean())


def _is_bare_scale(module: nn.Module, parameter: nn.Parameter) -> bool:
    """A layer scale that is a parameter of its block, known by its name."""
    return any(
        own is parameter and name.startswith(("gamma", "ls"))
        for part in module.modules()
        for name, own in part.named_parameters(recurse=False)
    )
