"""A depthwise convolution and the pointwise operator behind it, solved together.

Both are one dense convolution whose weight is, for every channel in between, a filter times a vector. So the second
moments of the dense convolution's inputs and outputs hold all that either problem needs: they are streamed once, in
bounded memory, and least squares then alternate between the two without another look at an image. Given the filters,
the pointwise operator is a problem of its own; given that, the filters are one, coupled over channels: its normal
equations are the moments weighted by how alike the channels' vectors are. Both are solved exactly (conjugate gradients
took longer for the same error), so no step ever makes the fit worse.

Fitting the filters alone to what the baseline's larger ones gave gained nothing over cutting those out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from updp.affine import NO_PADS
from updp.calibrate.equations import Equations, solve_positive
from updp.calibrate.observe import Key, Value, observe
from updp.calibrate.rows import weight_of, windows
from updp.composing import affine_of
from updp.flow import Call, Node, Nodes, ToLayout, children
from updp.kinds import kind_of
from updp.layers import conv_padding
from updp.recipe import PrunedFlow

RIDGES = (1e-5, 1e-3, 1e-1)
"""Ridges that race over the first sweeps, relative to the mean variance of the inputs."""
_RACE = 2
_SWEEPS = 20
_LEAST_GAIN = 2e-3  # the sweep that lowers the error on what was held out by less, relatively, is the last


@dataclass(frozen=True)
class Pair:
    """A depthwise convolution of the flow's own, and the composed operator that takes what it gives.

    Attributes:
        filters, operator: the names of the two.
        steps: both and what is between them: norms and scales.
    """

    filters: str
    operator: str
    steps: Nodes


def pairs_of(flow: PrunedFlow) -> list[Pair]:
    """The pairs of a flow. A convolution that the baseline uses too is in none: it must stay."""
    return list(_pairs(flow, flow.program))


def _pairs(flow: PrunedFlow, nodes: Nodes) -> Iterator[Pair]:
    steps: list[Node] = []  # from a depthwise convolution on
    for node in nodes:
        for inner in children(node):
            yield from _pairs(flow, inner)
        if isinstance(node, ToLayout):
            continue
        part = flow.part(node.name) if isinstance(node, Call) else None
        if isinstance(node, Call) and node.name in flow.composed:
            if isinstance(first := next(iter(steps), None), Call) and part is not None and _is_pointwise(part):
                yield Pair(first.name, node.name, (*steps, node))
            steps = []
        elif isinstance(node, Call) and part is not None and _is_depthwise(part) and flow.owns(node.name):
            steps = [node]
        elif part is not None and steps and (kind_of(part).is_diagonal or kind_of(part).vanishes):
            steps.append(node)
        else:
            steps = []


def _is_depthwise(part: nn.Module) -> bool:
    if not isinstance(part, nn.Conv2d) or kind_of(part).name != "conv":
        return False
    return 1 < part.groups == part.in_channels == part.out_channels


def _is_pointwise(part: nn.Module) -> bool:
    if isinstance(part, nn.Conv2d):
        plain = conv_padding(part) == NO_PADS and part.groups == 1
        return plain and part.kernel_size == part.stride == (1, 1)
    return isinstance(part, nn.Linear)


def shape_of_pair(parts: Mapping[str, nn.Module], pair: Pair) -> tuple[int, int, int]:
    """The shape of the pair's `Equations`: those of the dense convolution that the pair is."""
    filters, operator = weight_of(parts[pair.filters]), weight_of(parts[pair.operator])
    return 1, filters.numel(), operator.shape[0]


def behind(equations: Equations, filters: Tensor) -> Equations:
    """The equations of the pointwise operator behind given filters ``(C, taps)``."""
    channels, taps = filters.shape
    outputs = equations.cross.shape[2]
    reduced = Equations(1, channels, outputs, filters.device)
    half = (filters[:, None] @ equations.gram.reshape(channels, taps, -1)).reshape(channels, channels, taps)
    reduced.gram[0] = (half * filters).sum(2)
    reduced.cross[0] = (equations.cross.reshape(channels, taps, outputs) * filters[:, :, None]).sum(1)
    reduced.square += equations.square
    reduced.sums[0][0] = (equations.sums[0].reshape(channels, taps) * filters).sum(1)
    reduced.sums[1].add_(equations.sums[1])
    reduced.count = equations.count
    return reduced


class Alternation:
    """Filters ``(C, taps)`` of norm 1, and the pointwise ``weight (C, O)`` and ``bias (O,)`` that are best behind them.

    Args:
        equations: of the dense convolution: one group, ``C * taps`` inputs, channel by channel.
        filters: to start from, ``(C, taps)``.
        ridge: on the entries of the dense convolution, relative to the mean variance of its inputs. So it does not
            matter how a channel's size is shared out between filter and vector.
    """

    def __init__(self, equations: Equations, filters: Tensor, ridge: float) -> None:
        self.equations = equations
        self.mean = equations.sums[0][0] / equations.count
        diagonal = equations.gram[0].diagonal() / equations.count - self.mean.square()
        self.level = ridge * float(diagonal.mean())
        self._stride = 1.0
        self._fit_operator(_normalised(filters.double()))

    def _fit_operator(self, filters: Tensor) -> None:
        reduced = behind(self.equations, filters)
        reduced.gram[0].diagonal().add_(self.level * reduced.count * filters.square().sum(1))
        weight, bias = reduced.solve(0.0)
        self.filters, self.weight, self.bias = filters, weight[0], bias[0]
        self.objective = reduced.error(weight, bias)
        """Mean square error with the ridge's share, relative to the variance of the outputs."""

    def error(self, equations: Equations) -> float:
        """Of filters and operator on these samples."""
        return behind(equations, self.filters).error(self.weight[None], self.bias[None])

    def sweep(self) -> None:
        """Better filters, then the operator that is best behind them; and further that way, where that is better."""
        before = self.filters
        self._fit_operator(self._better_filters())
        found = self.filters, self.weight, self.bias, self.objective
        turned = (found[0] * before).sum(1, keepdim=True).sign()
        self._fit_operator(_normalised(found[0] + self._stride * (found[0] - turned * before)))
        if self.objective < found[3]:
            self._stride *= 1.5
        else:
            self.filters, self.weight, self.bias, self.objective = found
            self._stride = max(1.0, self._stride / 4)

    def _better_filters(self) -> Tensor:
        """The best filters before the operator: least squares coupled over channels."""
        equations, count = self.equations, self.equations.count
        channels, taps = self.filters.shape
        shared = self.weight @ self.weight.T
        system = equations.gram[0] / count
        system.addr_(self.mean, self.mean, alpha=-1)
        system.diagonal().add_(self.level)
        system.reshape(channels, taps, channels, taps).mul_(shared[:, None, :, None])
        cross = equations.cross[0] / count - self.mean[:, None] * (equations.sums[1][0] / count)
        target = (cross.reshape(channels, taps, -1) * self.weight[:, None]).sum(2)
        found = solve_positive(system[None], target.reshape(1, -1, 1), 1e-14)
        return _normalised(found.reshape(channels, taps))


def _normalised(filters: Tensor) -> Tensor:
    size: Tensor = filters.norm(dim=1, keepdim=True)
    return filters / size.clamp_min(torch.finfo(filters.dtype).tiny)


class PairProblem:
    """A pair under solution: second moments of what its dense convolution sees, to fit and held out."""

    def __init__(self, flow: PrunedFlow, pair: Pair) -> None:
        parts = flow.named_parts
        conv = parts[pair.filters]
        assert isinstance(conv, nn.Conv2d)
        self.flow, self.pair, self.conv, self.name = flow, pair, conv, pair.filters
        shape, device = shape_of_pair(parts, pair), conv.weight.device
        self.fit, self.held_out = Equations(*shape, device), Equations(*shape, device)

    def observe(
        self, x: Tensor, reference: Mapping[Key, Value], parts: int, positions: int, generator: torch.Generator
    ) -> None:
        """Take in a batch of the block's inputs; all but the first ``parts`` images are held out."""
        seen = observe(self.flow, self.pair.filters, x, reference).input
        wanted = observe(self.flow, self.pair.operator, x, reference).wanted
        if kind_of(self.flow.part(self.pair.operator)).layout == "last":
            wanted = wanted.permute(0, 3, 1, 2)
        for equations, where in ((self.fit, slice(0, parts)), (self.held_out, slice(parts, len(x)))):
            if len(seen[where]):
                inputs, outputs = windows(self.conv, seen[where], wanted[where], positions, generator)
                equations.add(inputs[:, :-1].flatten(1)[None], outputs[None])

    def solve(self) -> tuple[float, float, float]:
        """Write better filters into the flow; the operator behind them is left to be solved for as any other.

        Returns:
            The ridge (infinite where the filters stay), and the error before and after, on what was held out.
        """
        judge = self.held_out if self.held_out.count else self.fit
        before = self._error_before(judge)
        start = self.conv.weight.detach().double().flatten(1)
        racing = {ridge: Alternation(self.fit, start, ridge) for ridge in RIDGES}
        plain = min(racing[ridge].error(judge) for ridge in RIDGES)
        for _ in range(_RACE):
            for alternation in racing.values():
                alternation.sweep()
        ridge, best = min(racing.items(), key=lambda item: item[1].error(judge))
        filters, error = _go_on(best, judge)
        if error >= min(before, plain):
            return float("inf"), before, before
        with torch.no_grad():
            size = start.norm(dim=1, keepdim=True)
            self.conv.weight.copy_((filters * size).reshape(self.conv.weight.shape))
        return ridge, before, error

    def _error_before(self, judge: Equations) -> float:
        """Of the pair as merging alone gives it."""
        whole = affine_of(self.pair.steps, self.flow.named_parts, self.conv.in_channels)
        bias = whole.weight.new_zeros(whole.out_channels) if whole.bias is None else whole.bias
        return judge.error(whole.weight.flatten(1).T[None], bias[None])


def _go_on(alternation: Alternation, judge: Equations) -> tuple[Tensor, float]:
    """Sweep until that helps no more on what was held out; the best filters and their error."""
    filters, error = alternation.filters, alternation.error(judge)
    for _ in range(_SWEEPS - _RACE):
        alternation.sweep()
        now, before = alternation.error(judge), error
        if now < error:
            filters, error = alternation.filters, now
        if now > before * (1 - _LEAST_GAIN):
            break
    return filters, error
