"""Random values for every parameter and statistic of a network, so that no error can hide behind a zero.

timm starts last norms at zero and layer scales at 1e-6: with them, a merge could be wrong and look exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp.kinds import kind_of, scale_parameter


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
    """Scale the random statistics of every batch norm to what arrives there, in the order of one run.

    Statistics that know nothing of their input let a deep network without layer norms grow from block to block, until
    a softmax only picks the largest: then rounding alone changes the output, and no merge could be told from a wrong
    one.
    """

    def scale(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        power = args[0].square().mean()
        if norm.running_mean is not None and norm.running_var is not None and torch.isfinite(power) and power > 0:
            norm.running_mean.mul_(power.sqrt())
            norm.running_var.mul_(power)

    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    handles = [norm.register_forward_pre_hook(scale) for norm in norms]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()


def _is_bare_scale(module: nn.Module, parameter: nn.Parameter) -> bool:
    """A layer scale that is a parameter of its block, known by its name."""
    return any(
        own is parameter and name.startswith(("gamma", "ls"))
        for part in module.modules()
        for name, own in part.named_parameters(recurse=False)
    )
