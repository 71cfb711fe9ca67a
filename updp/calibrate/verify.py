"""Choosing by the true network: sets of blocks that the table puts first are solved on few images, and judged.

Damages of single blocks only roughly add: neighbours that are pruned together cost more than each alone. Which set is
best, only a solved network tells. (Networks put together from operators that were solved each alone do not: they find
other sets best than solving one behind the other does.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from updp.calibrate.blocks import Solutions, SolveSettings, solve_subnet
from updp.calibrate.damage import divergence, network_answers
from updp.calibrate.trail import Images
from updp.measure import compare
from updp.merging import assemble, merge_blocks
from updp.subnet import SubnetConfig
from updp.supernet import Supernet


@dataclass(frozen=True)
class Verified:
    """A set of blocks, and how far its network's answers move when it is solved on few images."""

    subnet: SubnetConfig
    damage: float


def verify(
    supernet: Supernet,
    candidates: Sequence[SubnetConfig],
    images: Images,
    judge: Images,
    settings: SolveSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Verified]:
    """Solve and judge each candidate; blocks whose predecessors are pruned alike are solved once.

    Args:
        candidates: sets of blocks, such as `updp.calibrate.rank` gives.
        images: to solve on; few are enough to compare by.
        judge: others.
        progress: called with how many candidates are done.

    Returns:
        The candidates, the one of least damage first.
    """
    solutions = Solutions(supernet)
    baseline = list(network_answers(supernet, supernet.all_keep(), judge))
    found = []
    for done, subnet in enumerate(candidates, 1):
        solve_subnet(supernet, subnet, images, settings, solutions=solutions)
        found.append(Verified(subnet, divergence(baseline, network_answers(supernet, subnet, judge))))
        if progress is not None:
            progress(done)
    return sorted(found, key=lambda each: each.damage)


def latency_part(supernet: Supernet, subnet: SubnetConfig, seconds: float = 4.0) -> float:
    """Time that a subnet's merged network takes, as a part of the baseline's; in turns, at batch 1.

    What single blocks save adds up only roughly: how fast a block is depends on its neighbours.
    """
    device = next(supernet.parameters()).device
    x = torch.randn(1, *supernet.spec.input, device=device)
    functions: dict[str, Callable[[], object]] = {}
    for name, config in (("baseline", supernet.all_keep()), ("merged", subnet)):
        supernet.set_subnet(config)
        network = assemble(supernet, merge_blocks(supernet)).to(memory_format=torch.contiguous_format)
        functions[name] = functools.partial(network, x)
    supernet.set_subnet(supernet.all_keep())
    times = compare(functions, seconds, device)
    return times["merged"].median_ms / times["baseline"].median_ms
