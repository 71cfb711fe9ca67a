"""What a recipe appends, made to pass a solved operator's values on unchanged, to be trained from there.

The operator in front is scaled and shifted into the range where the appended activation is the identity, and the batch
norm takes scale and shift back. (Fitting the activation as well gained nothing on real networks: what a block gives is
nearly linear in what it was given, or not to be had from one activation per channel.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from updp.calibrate.observe import Value
from updp.calibrate.rows import weight_of
from updp.flow import Call, Node, Parallel, ToLayout
from updp.kinds import kind_of
from updp.layers import BatchNorm
from updp.recipe import PrunedFlow

# Activation -> from where to where it is the identity but for a shift of its input, in float32.
_LINEAR = {
    nn.ReLU: (0.0, None),
    nn.ReLU6: (0.0, 6.0),
    nn.GELU: (6.0, None),
    nn.SiLU: (18.0, None),
    nn.Hardswish: (3.0, None),
}
_MARGIN = 0.25  # of the range that the images showed, left on either side for other images


@dataclass
class Range:
    """Per channel: the range, mean and variance of all values that passed."""

    low: Tensor
    high: Tensor
    total: Tensor
    square: Tensor
    count: int = 0

    @classmethod
    def of(cls, like: Value) -> Range:
        """An empty one, for values like these."""
        shape, device = like.into("last").shape[-1:], like.tensor.device
        low = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
        return cls(low, -low, torch.zeros_like(low), torch.zeros_like(low))

    def add(self, value: Value) -> None:
        """Take in a map or tokens."""
        values = value.into("last").flatten(0, -2).double()
        self.low = torch.minimum(self.low, values.amin(0))
        self.high = torch.maximum(self.high, values.amax(0))
        self.total += values.sum(0)
        self.square += values.square().sum(0)
        self.count += len(values)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        return (self.square / self.count - self.mean.square()).clamp_min(0)


def open_appended(flow: PrunedFlow, given: Range) -> bool:
    """Make a flow's appended layers the identity on what the baseline block gives.

    Returns:
        Whether they could be. If not, they are left as they are.
    """
    parts = [flow.part(name) for name in flow.appended]
    norm, activations = parts[-1], parts[:-1]
    if not (isinstance(norm, BatchNorm) and _at_the_end(flow)) or len(activations) > 1:
        return False
    scale, shift = torch.ones_like(given.low), torch.zeros_like(given.low)
    if activations:
        operator, alone = _in_front(flow)
        scale, shift = _into_linear(given, type(activations[0]))
        if operator is None or not (alone or torch.equal(scale, torch.ones_like(scale))):
            return False
        _rescale(operator, scale, shift)
    _invert(norm, given, scale, shift)
    return True


def _at_the_end(flow: PrunedFlow) -> bool:
    calls = [node.name for node in flow.program if isinstance(node, Call)]
    return tuple(calls[-len(flow.appended) :]) == flow.appended


def _in_front(flow: PrunedFlow) -> tuple[nn.Module | None, bool]:
    """The composed operator whose bias shifts what the appended layers see, and whether its weight scales all of it."""
    return _last_operator(flow, [node for node in flow.program if not _is_appended(flow, node)], alone=True)


def _is_appended(flow: PrunedFlow, node: Node) -> bool:
    return isinstance(node, Call) and node.name in flow.appended


def _last_operator(flow: PrunedFlow, nodes: Sequence[Node], alone: bool) -> tuple[nn.Module | None, bool]:
    for node in reversed(nodes):
        if isinstance(node, ToLayout):
            continue
        if isinstance(node, Parallel):
            found = (_last_operator(flow, branch, alone=False) for branch in node.flows)
            return next((pair for pair in found if pair[0] is not None), (None, False))
        if not isinstance(node, Call):
            return None, alone
        if node.name in flow.composed:
            return flow.part(node.name), alone
        if not kind_of(flow.part(node.name)).vanishes:
            return None, alone
    return None, alone


def _into_linear(seen: Range, activation: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """Scale and shift that bring the range into the activation's linear one."""
    start, end = _LINEAR[activation]
    width = (seen.high - seen.low).clamp_min(1e-6)
    low = seen.low - _MARGIN * width
    scale = torch.ones_like(width) if end is None else (end - start) / (width * (1 + 2 * _MARGIN))
    return scale, start - scale * low


def _rescale(operator: nn.Module, scale: Tensor, shift: Tensor) -> None:
    weight, bias, taps = weight_of(operator), operator.bias, getattr(operator, "taps", None)
    assert isinstance(bias, nn.Parameter)
    with torch.no_grad():
        weight.mul_(scale.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1)))
        if taps is not None:
            taps.mul_(scale.to(taps.dtype)[:, None, None])
        bias.copy_(bias.double() * scale + shift)


def _invert(norm: BatchNorm, seen: Range, scale: Tensor, shift: Tensor) -> None:
    """Statistics of what arrives, and the affine that gives back what it was before scale and shift."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = seen.mean * scale + shift, seen.variance * scale.square()
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt() / scale)
        norm.bias.copy_(seen.mean)
