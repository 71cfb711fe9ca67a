"""Which blocks to prune: the least damage within a budget, a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from updp.calibrate.damage import Damage, DamageTable
from updp.errors import InputError
from updp.subnet import SubnetConfig


def choose(table: DamageTable, *, prune: int | None = None, macs: float | None = None) -> SubnetConfig:
    """The subnet of least total damage (damages of single blocks roughly add).

    Args:
        prune: exactly so many blocks.
        macs: at most this part of the baseline's multiply-accumulates.

    Raises:
        InputError: nothing in the table fits; the message says what would.
    """
    rows = table.rows
    blocks = sorted({row.block for row in rows})
    if prune is not None and not 1 <= prune <= len(blocks):
        raise InputError(f"prune: got {prune}, allowed: 1 to {len(blocks)}, the blocks in the table")
    constraints = [LinearConstraint(_matrix(rows, blocks), ub=np.ones(len(blocks)))]
    if prune is not None:
        constraints.append(LinearConstraint(np.ones((1, len(rows))), lb=prune, ub=prune))
    if macs is not None:
        saved = np.array([[row.macs_before - row.macs for row in rows]], dtype=float)
        constraints.append(LinearConstraint(saved, lb=table.macs * (1 - macs)))
    damages = np.array([row.damage for row in rows])
    found = milp(damages, constraints=constraints, integrality=np.ones(len(rows)), bounds=Bounds(0, 1))
    if found.x is None:
        raise InputError(f"macs: {_least(table, blocks)}")
    chosen = [row for row, taken in zip(rows, found.x, strict=True) if taken > 0.5]
    return SubnetConfig(table.spec, {row.block: row.recipe for row in chosen})


def _matrix(rows: tuple[Damage, ...], blocks: list[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A row for each block, with ones at its recipes: at most one of them is taken."""
    matrix = np.zeros((len(blocks), len(rows)))
    for column, row in enumerate(rows):
        matrix[blocks.index(row.block), column] = 1
    return matrix


def _least(table: DamageTable, blocks: list[str]) -> str:
    best: Callable[[str], int] = lambda block: max(  # noqa: E731
        0, *(row.macs_before - row.macs for row in table.rows if row.block == block)
    )
    least = 1 - sum(best(block) for block in blocks) / table.macs
    return f"pruning all that gets cheaper leaves {least:.3f}x of the baseline's; allowed: at least that"
