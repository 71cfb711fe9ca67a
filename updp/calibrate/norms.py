"""A batch norm in the place of another step, fitted to what that step gave: a scale and a shift for each channel.

As the recipe makes it, such a norm keeps the weight of a norm that divided by something else, image by image. Where an
operator that is solved for comes next, nothing is lost by that; in front of an attention, a third to two thirds of the
variance are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from updp.calibrate.equations import Equations
from updp.calibrate.observe import Key, Value, observe
from updp.calibrate.rows import sample
from updp.flow import Call, Nodes, ToLayout, children
from updp.kinds import kind_of
from updp.layers import BatchNorm
from updp.recipe import PrunedFlow

_RIDGE = 1e-6


def norms_of(flow: PrunedFlow, turn: int) -> list[str]:
    """Batch norms that stand for another step, behind ``turn`` composed operators, in order of execution.

    None that has but norms and scales between itself and a composed operator: that makes up for all of them.
    """
    return [name for at, name in _norms(flow) if at == turn]


def _norms(flow: PrunedFlow) -> Iterator[tuple[int, str]]:
    composed = 0
    waiting: list[tuple[int, str]] = []  # until something comes that no operator makes up for
    for node in _calls(flow.program):
        if node is None:
            yield from waiting
            waiting = []
            continue
        part = flow.part(node.name)
        if node.name in flow.composed:
            composed += 1
            waiting = []
            continue
        kind = kind_of(part)
        if isinstance(part, BatchNorm) and node.name in flow.recipe.replace:
            waiting.append((composed, node.name))
        elif not (kind.is_diagonal or kind.vanishes):
            yield from waiting
            waiting = []
    yield from waiting


def _calls(nodes: Nodes) -> Iterator[Call | None]:
    """Steps in order of execution; None where a flow begins or ends: there values meet others."""
    for node in nodes:
        if isinstance(node, Call):
            yield node
        elif not isinstance(node, ToLayout):
            for flow in children(node):
                yield None
                yield from _calls(flow)
                yield None


class NormProblem:
    """One norm under solution."""

    def __init__(self, flow: PrunedFlow, name: str) -> None:
        norm = flow.part(name)
        assert isinstance(norm, BatchNorm)
        self.flow, self.name, self.norm = flow, name, norm
        shape, device = (norm.num_features, 1, 1), norm.weight.device
        self.fit, self.held_out = Equations(*shape, device), Equations(*shape, device)

    def observe(
        self, x: Tensor, reference: Mapping[Key, Value], parts: int, positions: int, generator: torch.Generator
    ) -> None:
        """Take in a batch of the block's inputs; all but the first ``parts`` images are held out."""
        seen = observe(self.flow, self.name, x, reference)
        values = [Value(each, self.norm.layout).into("last") for each in (seen.input, seen.wanted)]
        for equations, where in ((self.fit, slice(0, parts)), (self.held_out, slice(parts, len(x)))):
            if len(x[where]):
                given, wanted = sample(self.norm, values[0][where], values[1][where], positions, generator)
                equations.add(given[0].T[..., None], wanted[0].T[..., None])

    def solve(self) -> tuple[float, float, float]:
        """Write the scale and the shift into the norm, if they are better than those it has.

        Returns:
            The ridge (infinite where the norm stays), and the error before and after, on what was held out.
        """
        judge = self.held_out if self.held_out.count else self.fit
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        mean, deviation = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
        scale = norm.weight.detach().double() / deviation
        before = judge.error(scale[:, None, None], (norm.bias.detach().double() - mean * scale)[:, None])
        error = judge.error(*self.fit.solve(_RIDGE))
        if error >= before:
            return float("inf"), before, before
        self.fit.merge(self.held_out)
        weight, bias = self.fit.solve(_RIDGE)
        with torch.no_grad():
            norm.weight.copy_(weight[:, 0, 0] * deviation)
            norm.bias.copy_(bias[:, 0] + weight[:, 0, 0] * mean)
        return _RIDGE, before, error
