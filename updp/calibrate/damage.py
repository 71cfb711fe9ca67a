"""What each block costs when it alone is pruned: the table that blocks are chosen from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from updp.calibrate.blocks import Images, SolveSettings, solve_blocks
from updp.calibrate.equations import Equations
from updp.calibrate.rows import shape_of
from updp.errors import InputError, Place, Problem
from updp.files import read_json, write_text
from updp.oracle import count_supernet
from updp.recipe import PrunedFlow
from updp.structure import evaluating
from updp.subnet import SubnetConfig
from updp.supernet import Supernet

VERSION = 1
MEMORY = 2 << 30
"""Bytes that the normal equations of blocks solved at the same time may take."""


@dataclass(frozen=True)
class Damage:
    """One block under one recipe, solved and merged, all other blocks kept.

    Attributes:
        damage: how far the network's answers move: mean Kullback-Leibler divergence from the baseline's, in nats.
        error: mean square error of the block's worst operator on held-out positions, relative to the variance.
        macs, macs_before: multiply-accumulates of the block, merged and as it was.
    """

    block: str
    recipe: str
    damage: float
    error: float
    macs: int
    macs_before: int


@dataclass(frozen=True)
class DamageTable:
    """Every block under every recipe, and the whole network's multiply-accumulates."""

    spec: str
    macs: int
    images: int
    rows: tuple[Damage, ...]

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> DamageTable:
        """Read a saved table.

        Raises:
            InputError: it is not one.
        """
        data = read_json(path)
        try:
            rows = tuple(Damage(**row) for row in data["rows"])
            if data["version"] != VERSION:
                raise KeyError("version")
            return cls(str(data["spec"]), int(data["macs"]), int(data["images"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError([Problem(Place(str(path)), "", f"not a table of damages: {error}")]) from None


def measure_damage(
    supernet: Supernet,
    images: Images,
    judge: Images,
    settings: SolveSettings | None = None,
    *,
    recipe: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> DamageTable:
    """Solve every block alone, and see what the network's answers become.

    Args:
        images: to solve on.
        judge: others, on which the damage is measured; no labels are needed.
        recipe: the only one to try; all of each block when left out.
        progress: called with how many pairs of block and recipe are done.
    """
    pairs = [(b, r) for b, recipes in supernet.available.items() for r in recipes if recipe in (None, r)]
    if not pairs:
        raise InputError(f"no block of {supernet.spec.name} has the recipe {recipe!r}")
    keep = supernet.all_keep()
    errors: dict[tuple[str, str], float] = {}
    for choices in _together(supernet, pairs):
        for solved in solve_blocks(supernet, choices, keep, images, settings):
            key = (solved.block, choices[solved.block])
            errors[key] = max(errors.get(key, 0.0), solved.error)
    answers = list(_answers(supernet, keep, judge))
    costs = _costs(supernet, pairs)
    rows = []
    for number, (block, name) in enumerate(pairs, 1):
        damage = divergence(answers, _answers(supernet, SubnetConfig(supernet.spec.name, {block: name}), judge))
        rows.append(Damage(block, name, damage, errors[block, name], costs[block, name], costs[block, ""]))
        if progress is not None:
            progress(number)
    supernet.set_subnet(keep)
    return DamageTable(supernet.spec.name, costs["", ""], sum(len(a) for a in answers), tuple(rows))


def _together(supernet: Supernet, pairs: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """Pairs in groups: each block once, and no more memory for equations than allowed."""
    group: dict[str, str] = {}
    taken = 0
    for block, recipe in sorted(pairs, key=lambda pair: list(supernet.available[pair[0]]).index(pair[1])):
        size = _equation_bytes(supernet, block, recipe)
        if group and (block in group or taken + size > MEMORY):
            yield group
            group, taken = {}, 0
        group[block] = recipe
        taken += size
    if group:
        yield group


def _equation_bytes(supernet: Supernet, block: str, recipe: str) -> int:
    flow = supernet.blocks[block].choices[recipe]
    assert isinstance(flow, PrunedFlow)
    sizes = [Equations(*shape_of(flow.part(name)), torch.device("meta")).bytes for name in flow.composed]
    return 2 * max(sizes, default=0)  # to fit, and held out


@torch.no_grad()
def _answers(supernet: Supernet, subnet: SubnetConfig, images: Images) -> Iterator[Tensor]:
    """Log probabilities, batch by batch."""
    supernet.set_subnet(subnet)
    with evaluating(supernet):
        for batch in images():
            yield supernet(batch).double().log_softmax(-1)


def divergence(baseline: Iterable[Tensor], pruned: Iterable[Tensor]) -> float:
    """Mean Kullback-Leibler divergence of two streams of log probabilities ``(N, classes)``, in nats."""
    total, count = 0.0, 0
    for p, q in zip(baseline, pruned, strict=True):
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return total / max(count, 1)


def network_damage(supernet: Supernet, subnet: SubnetConfig, judge: Images) -> float:
    """How far a subnet's answers are from the baseline's."""
    baseline = list(_answers(supernet, supernet.all_keep(), judge))
    return divergence(baseline, _answers(supernet, subnet, judge))


def _costs(supernet: Supernet, pairs: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
    """Multiply-accumulates of each block under each recipe; ``""`` stands for the baseline, and for the network."""
    costs: dict[tuple[str, str], int] = {}
    supernet.set_subnet(supernet.all_keep())
    kept = count_supernet(supernet)
    costs["", ""] = kept.macs
    costs |= {(row.name, ""): row.macs for row in kept.blocks}
    for recipe in dict.fromkeys(name for _, name in pairs):
        blocks = {block: recipe for block, name in pairs if name == recipe}
        supernet.set_subnet(SubnetConfig(supernet.spec.name, blocks))
        costs |= {(row.name, recipe): row.macs for row in count_supernet(supernet).blocks if row.name in blocks}
    return costs
