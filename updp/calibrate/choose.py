"""Which blocks to prune: the least damage within a budget, a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from updp.calibrate.damage import Damage, DamageTable
from updp.errors import InputError
from updp.subnet import SubnetConfig

Taken: TypeAlias = np.ndarray[tuple[int], np.dtype[np.bool_]]
_FINE = 1e9  # the solver keeps to constraints up to an absolute tolerance


def choose(
    table: DamageTable, *, prune: int | None = None, macs: float | None = None, latency: float | None = None
) -> SubnetConfig:
    """The subnet of least total damage: the first of those that `rank` gives.

    Raises:
        InputError: nothing in the table fits; the message says what would.
    """
    return rank(table, 1, prune=prune, macs=macs, latency=latency)[0]


def rank(
    table: DamageTable,
    count: int,
    *,
    prune: int | None = None,
    macs: float | None = None,
    latency: float | None = None,
) -> list[SubnetConfig]:
    """The ``count`` subnets of least total damage (damages of single blocks roughly add), or all there are.

    Args:
        prune: exactly so many blocks.
        macs: at most this part of the baseline's multiply-accumulates.
        latency: at most this part of the baseline's measured time (what single blocks save adds up, too).

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
    budgets = {what: part for what, part in (("macs", macs), ("latency", latency)) if part is not None}
    for what, part in budgets.items():
        constraints.append(LinearConstraint(_FINE * np.array([_saved(table, what)]), lb=_FINE * (1 - part)))
    found: list[SubnetConfig] = []
    while len(found) < count and (taken := _least(rows, constraints)) is not None:
        found.append(
            SubnetConfig(table.spec, {row.block: row.recipe for row, one in zip(rows, taken, strict=True) if one})
        )
        others = np.where(taken, 1, -1)  # a set differs from this one if it lacks a row of it, or has another
        constraints.append(LinearConstraint(others[None], ub=taken.sum() - 1))
    if not found:
        raise InputError(f"--budget: {_unreachable(table, blocks, budgets, prune)}")
    return found


def _least(
    rows: Sequence[Damage], constraints: Sequence[LinearConstraint]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]] | None:
    """Which rows to take, or None if nothing keeps to the constraints."""
    damages = np.array([row.damage for row in rows])
    exact = {"mip_rel_gap": 0}
    found = milp(damages, constraints=constraints, integrality=np.ones(len(rows)), bounds=Bounds(0, 1), options=exact)
    return None if found.x is None else found.x > 0.5


def _matrix(rows: tuple[Damage, ...], blocks: list[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A row for each block, with ones at its recipes: at most one of them is taken."""
    matrix = np.zeros((len(blocks), len(rows)))
    for column, row in enumerate(rows):
        matrix[blocks.index(row.block), column] = 1
    return matrix


def _saved(table: DamageTable, what: str) -> list[float]:
    """What each row saves, as a part of the baseline's cost."""
    whole = getattr(table, what)
    return [(getattr(row, f"{what}_before") - getattr(row, what)) / whole for row in table.rows]


def _unreachable(table: DamageTable, blocks: Sequence[str], budgets: dict[str, float], prune: int | None) -> str:
    """What could be reached."""
    which = "all that gets cheaper" if prune is None else f"the {prune} blocks that save the most"
    reasons = []
    for what, part in budgets.items():
        rows = list(zip(table.rows, _saved(table, what), strict=True))
        best = sorted((max(saved for row, saved in rows if row.block == block) for block in blocks), reverse=True)
        least = 1 - sum(max(0.0, saved) if prune is None else saved for saved in best[:prune])
        if least > part:
            reasons.append(f"{what}: got {part:g}x, but pruning {which} leaves {least:.3f}x of the baseline's; "
                           f"allowed: at least that")  # fmt: skip
    asked = " with ".join(f"{what} {part:g}x" for what, part in budgets.items())
    return (
        "; ".join(reasons) or f"no choice of blocks keeps to {asked}{'' if prune is None else f' and --prune {prune}'}"
    )
