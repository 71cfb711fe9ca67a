"""Least squares from a stream: the best affine operator from inputs to outputs, in bounded memory.

EAPruning reconstructs a pruned layer as ``W' = lstsq(X', Y)``. ``X'`` of a whole data set does not fit into memory;
its normal equations do, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges to choose from, relative to the mean variance of the inputs."""
_MOST_RESTORED = 2.0

Solution: TypeAlias = tuple[Tensor, Tensor]
"""Weight ``(G, inputs, outputs)`` and bias ``(G, outputs)``."""

_Rated = TypeVar("_Rated", bound="tuple[Any, ...]")


class Equations:
    """Normal equations of ``y = W x + b``, summed up in float64; every group has inputs and outputs of its own.

    Args:
        groups: independent problems (the groups of a convolution).
        inputs: entries of ``x`` in each group.
        outputs: entries of ``y`` in each group.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram = zeros(groups, inputs, inputs)
        self.cross = zeros(groups, inputs, outputs)
        self.square = zeros(groups, outputs)
        self.sums = zeros(groups, inputs), zeros(groups, outputs)
        self.count = 0

    @property
    def bytes(self) -> int:
        """Memory that the equations take, however many samples there are."""
        return sum(t.numel() * t.element_size() for t in (self.gram, self.cross, self.square, *self.sums))

    @property
    def unknowns(self) -> int:
        """Of each output: its weights and its bias."""
        return self.gram.shape[1] + 1

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take samples in: ``x (G, n, inputs)``, ``y (G, n, outputs)``."""
        x, y = x.double(), y.double()
        self.gram += x.transpose(1, 2) @ x
        self.cross += x.transpose(1, 2) @ y
        self.square += y.square().sum(1)
        self.sums[0].add_(x.sum(1))
        self.sums[1].add_(y.sum(1))
        self.count += x.shape[1]

    def merge(self, other: Equations) -> None:
        """Take in the samples of other equations of the same shape."""
        for mine, theirs in ((self.gram, other.gram), (self.cross, other.cross), (self.square, other.square)):
            mine += theirs
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine += theirs
        self.count += other.count

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance of the inputs, of inputs with outputs, and variance of the outputs."""
        mean_x, mean_y = (total / self.count for total in self.sums)
        gram = self.gram / self.count - mean_x[:, :, None] * mean_x[:, None]
        cross = self.cross / self.count - mean_x[:, :, None] * mean_y[:, None]
        return gram, cross, (self.square / self.count - mean_y.square()).clamp_min(0)

    def solve(self, ridge: float, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight ``(G, inputs, outputs)`` and bias ``(G, outputs)``.

        Minimises the mean square error plus ``ridge * mean variance of the inputs * |W - prior|^2``: what the samples
        do not determine stays as the prior has it (zero, if there is none). A ridge of 0 takes the pseudo-inverse.
        """
        gram, cross, _ = self.centred()
        if prior is not None:
            cross = cross - gram @ prior
        weight = solve_positive(gram, cross, ridge) if ridge else torch.linalg.pinv(gram, hermitian=True) @ cross
        if prior is not None:
            weight = weight + prior
        mean_x, mean_y = (total / self.count for total in self.sums)
        return weight, mean_y - (mean_x[:, None] @ weight)[:, 0]

    def solver(self, prior: Tensor) -> Callable[[float], tuple[Solution, Solution]]:
        """What `solve` gives for a ridge, without and with the prior.

        Both come from one factorization, which is most of the work.
        """
        gram, cross, _ = self.centred()
        wanted = torch.cat([cross, cross - gram @ prior], 2)
        mean_x, mean_y = (total / self.count for total in self.sums)

        def solved(ridge: float) -> tuple[Solution, Solution]:
            free, change = solve_positive(gram, wanted, ridge).chunk(2, 2)
            of_prior = change + prior
            return tuple((w, mean_y - (mean_x[:, None] @ w)[:, 0]) for w in (free, of_prior))  # type: ignore[return-value]

        return solved

    def restored(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A solution scaled so that each output varies as much as it should.

        Least squares shrinks what it cannot foretell towards the mean; through several blocks the maps fade. The mean
        stays, at most twice the size is given back.
        """
        gram, _, variance = self.centred()
        own = (weight * (gram @ weight)).sum(1)
        tiny = torch.finfo(torch.float64).tiny
        factor = (variance / own.clamp_min(tiny)).sqrt().clamp(1, _MOST_RESTORED)
        mean_y = self.sums[1] / self.count
        return weight * factor[:, None], (bias - mean_y) * factor + mean_y

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean square error of an operator on these samples, relative to the variance of the outputs."""
        return self.judge()(weight, bias)

    def judge(self) -> Callable[[Tensor, Tensor], float]:
        """`error`, for many operators on the samples as they are now."""
        gram, cross, variance = self.centred()
        mean_x, mean_y = (total / self.count for total in self.sums)

        def error(weight: Tensor, bias: Tensor) -> float:
            offset = (mean_x[:, None] @ weight)[:, 0] + bias - mean_y
            residual = variance - 2 * (weight * cross).sum(1) + (weight * (gram @ weight)).sum(1) + offset.square()
            return float(residual.clamp_min(0).sum() / variance.sum().clamp_min(torch.finfo(torch.float64).tiny))

        return error


def solve_positive(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Solve ``(gram + ridge * mean(diag) * 1) w = cross``; rounding may ask for a larger ridge.

    Raises:
        ValueError: the equations are not finite.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("equations that are not finite have no solution")
    diagonal = gram.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    while True:
        ridged = gram.clone()
        ridged.diagonal(dim1=1, dim2=2).add_(ridge * level[:, None])
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not failed.any():
            return torch.cholesky_solve(cross, factor)
        ridge = max(ridge, 1e-12) * 10


def least(value: Callable[[float], _Rated], ridges: Sequence[float] = RIDGES, start: float | None = None) -> _Rated:
    """The least of the values that ridges have, found downhill from ``start``, or from the middle.

    Of what is held out, the error first falls with the ridge, and then rises: both ends need not be tried.
    """
    values: dict[int, _Rated] = {}

    def at(place: int) -> _Rated:
        if place not in values:
            values[place] = value(ridges[place])
        return values[place]

    here = ridges.index(start) if start in ridges else len(ridges) // 2
    while True:
        near = [place for place in (here, here - 1, here + 1) if 0 <= place < len(ridges)]
        best = min(near, key=at)
        if best == here:
            return at(here)
        here = best
