"""Batch norms in several processes: statistics over the images of all of them.

The gradients of a batch norm are those of its whole batch only if its statistics are. torch's SyncBatchNorm does not
run on CPUs and takes the place of modules; here modules stay what they are, and what they call is answered otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from updp import processes


def statistics_of_all() -> AbstractContextManager[Any]:
    """Inside, norms in training mode take their statistics over all processes; with one process, nothing changes."""
    return _Together() if processes.count() > 1 else nullcontext()


class _Together(TorchFunctionMode):
    """Answers every call of `torch.nn.functional.batch_norm` that takes statistics from its input."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, whose running statistics see all processes too."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    out, count, mean, var = _Normalise.apply(input, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp_min(1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    shape = _per_channel(input)
    if weight is not None:
        out = out * weight.reshape(shape)
    if bias is not None:
        out = out + bias.reshape(shape)
    return out.to(input.dtype)  # type: ignore[no-any-return]


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps)`` per channel, with mean and variance over all processes, in float32 or more.

    Each process sends its own mean and its squares about that mean; they are put together as if they had been one
    batch, which loses nothing where the mean is large (the difference of two large sums would).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        others = [i for i in range(x.dim()) if i != 1]
        own = wide.new_tensor([x.numel() // x.shape[1]])
        mean = wide.mean(others)
        squares = (wide - mean.reshape(_per_channel(x))).square().sum(others)
        counts, means, squares_of_all = _gather(own, mean, squares)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = (squares_of_all + counts * (means - mean).square()).sum(0) / count
        scale = (var + eps).rsqrt().reshape(_per_channel(x))
        out = (wide - mean.reshape(_per_channel(x))) * scale
        ctx.save_for_backward(out, scale, count)
        ctx.others = others
        ctx.mark_non_differentiable(count, mean, var)
        return out, count, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out, scale, count = ctx.saved_tensors
        grad = grads[0]
        sums = torch.stack([grad.sum(ctx.others), (grad * out).sum(ctx.others)])
        dist.all_reduce(sums)
        sums /= count
        mean, along = (each.reshape(scale.shape) for each in sums)
        return (grad - mean - out * along) * scale, None


def _gather(count: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts ``(P, 1)``, means ``(P, C)`` and squares ``(P, C)`` of all processes, the same in all."""
    own = torch.cat([count, mean, squares])
    parts = [torch.empty_like(own) for _ in range(processes.count())]
    dist.all_gather(parts, own)
    rows = torch.stack(parts)
    channels = len(mean)
    return rows[:, :1], rows[:, 1 : 1 + channels], rows[:, 1 + channels :]


def _per_channel(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.dim() - 2)]
