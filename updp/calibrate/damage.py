"""What each block costs when it alone is pruned: the table that blocks are chosen from."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from updp.calibrate.blocks import Solved, SolveSettings, solve_blocks
from updp.calibrate.costs import Costs, Pair, measure_costs
from updp.calibrate.kept import Found, flow_of, load_group, save_group
from updp.calibrate.memory import equation_bytes, peak_bytes
from updp.calibrate.rows import shape_of
from updp.calibrate.trail import Images
from updp.errors import InputError, Place, Problem, suggest
from updp.files import read_json, write_text
from updp.structure import evaluating
from updp.subnet import SubnetConfig
from updp.supernet import Supernet

VERSION = 2
MEMORY = 2 << 30
"""Bytes that the normal equations of blocks solved at the same time may take."""
_TOGETHER = 6  # pairs solved at the same time: more share more passes, but an interruption costs more
_UNITS = 100  # of progress, for each pair
_JUDGING = 25  # of these, about so many are spent on seeing what became of the network's answers
_PASSES = 2  # that solving takes over the images, at least


@dataclass(frozen=True)
class Damage:
    """One block under one recipe, solved and merged, all other blocks kept.

    Attributes:
        damage: how far the network's answers move: mean Kullback-Leibler divergence from the baseline's, in nats.
        error: mean square error of the block's worst operator on held-out positions, relative to the variance.
        macs, macs_before: multiply-accumulates of the block, merged and as it was.
        latency, latency_before: seconds at batch 1, measured in turns.
        samples, unknowns: of the operator that has the fewest samples for its unknowns.
    """

    block: str
    recipe: str
    damage: float
    error: float
    macs: int
    macs_before: int
    latency: float = 0.0
    latency_before: float = 0.0
    samples: int = 0
    unknowns: int = 0


@dataclass(frozen=True)
class DamageTable:
    """Every block under every recipe, and the whole network's cost.

    Attributes:
        macs, latency: of the whole baseline; seconds.
        images: that the damage was judged on.
        environment: what the latencies depend on.
    """

    spec: str
    macs: int
    images: int
    rows: tuple[Damage, ...]
    latency: float = 0.0
    environment: Mapping[str, Any] = field(default_factory=dict)

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
            if data["version"] != VERSION:
                raise ValueError(f"version: got {data['version']!r}, allowed: {VERSION}")
            rows = tuple(Damage(**row) for row in data["rows"])
            whole = str(data["spec"]), int(data["macs"]), int(data["images"]), rows
            return cls(*whole, float(data["latency"]), dict(data["environment"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError([Problem(Place(str(path)), "", f"not a table of damages: {error}")]) from None


@dataclass(frozen=True)
class Keep:
    """Where what is found is kept, and what it depends on: of another identity, nothing is taken up again."""

    folder: Path
    identity: Mapping[str, Any]
    writes: bool = True


def pairs_in(supernet: Supernet, recipe: str | None = None) -> list[Pair]:
    """All pairs of a block and a recipe that prunes it, or those of one recipe.

    Raises:
        InputError: there is none.
    """
    found = [(b, r) for b, recipes in supernet.available.items() for r in recipes if recipe in (None, r)]
    if not found and not supernet.available:
        raise InputError(f"{supernet.spec.name} has no block that a recipe prunes")
    if not found:
        known = [each for recipes in supernet.available.values() for each in recipes]
        raise InputError(suggest(str(recipe), known))
    return found


def work(supernet: Supernet, recipe: str | None = None) -> int:
    """Units of progress that `measure_damage` counts."""
    return _UNITS * len(pairs_in(supernet, recipe))


def measure_damage(
    supernet: Supernet,
    images: Images,
    judge: Images,
    settings: SolveSettings | None = None,
    *,
    recipe: str | None = None,
    costs: Costs | None = None,
    keep: Keep | None = None,
    progress: Callable[[int], None] | None = None,
) -> DamageTable:
    """Solve every block alone, and see what the network's answers become.

    The supernet's flows are left as they were solved.

    Args:
        images: to solve on.
        judge: others, on which the damage is measured; no labels are needed.
        recipe: the only one to try; all of each block when left out.
        costs: of the pairs, if they are known.
        keep: write down what is found, and take up what was found before.
        progress: called with how much is done, of `work`.
    """
    pairs = pairs_in(supernet, recipe)
    costs = costs or measure_costs(supernet, pairs)
    answers = list(network_answers(supernet, supernet.all_keep(), judge))
    found: dict[Pair, Found] = {}
    for number, group in enumerate(groups(supernet, pairs)):
        some = None if keep is None else load_group(keep.folder, number, supernet, group, keep.identity)
        if some is None:
            tell = _Share(progress, _UNITS * len(found), _UNITS * len(group))
            some = _measure(supernet, group, images, judge, answers, settings, tell)
            if keep is not None and keep.writes:
                save_group(keep.folder, number, supernet, some, keep.identity)
        found |= some
        if progress is not None:
            progress(_UNITS * len(found))
    supernet.set_subnet(supernet.all_keep())
    rows = tuple(Damage(**asdict(cost), **asdict(found[cost.block, cost.recipe])) for cost in costs.rows)
    judged_on = sum(len(each) for each in answers)
    return DamageTable(supernet.spec.name, costs.macs, judged_on, rows, costs.latency, costs.times.environment)


@dataclass
class _Share:
    """A share of the progress, told as it is used up."""

    progress: Callable[[int], None] | None
    start: int
    size: int

    def tell(self, part: float) -> None:
        if self.progress is not None:
            self.progress(self.start + round(self.size * min(part, 1.0)))

    def watched(self, images: Images) -> Images:
        """The images, telling with each batch how much of solving is done; how often they are asked for, none knows."""
        length = max(operator.length_hint(images, 1), 1)
        done = 0

        def again() -> Iterator[Tensor]:
            nonlocal done
            for batch in images():
                yield batch
                done += 1
                self.tell(min(done / (length * _PASSES), 0.98) * (1 - _JUDGING / _UNITS))

        return again


def _measure(
    supernet: Supernet,
    group: Sequence[Pair],
    images: Images,
    judge: Images,
    answers: Sequence[Tensor],
    settings: SolveSettings | None,
    share: _Share,
) -> dict[Pair, Found]:
    """Solve blocks together, each in the network that is otherwise the baseline; judge one after the other."""
    operators: dict[str, list[Solved]] = {block: [] for block, _ in group}
    for each in solve_blocks(supernet, dict(group), supernet.all_keep(), share.watched(images), settings):
        operators[each.block].append(each)
    found = {}
    for number, (block, recipe) in enumerate(group, 1):
        pruned = network_answers(supernet, SubnetConfig(supernet.spec.name, {block: recipe}), judge)
        moved, solved = divergence(answers, pruned), operators[block]
        worst = max(each.error for each in solved)
        least = min(solved, key=lambda each: each.samples / each.unknowns)
        found[block, recipe] = Found(moved, worst, least.samples, least.unknowns)
        share.tell(1 - _JUDGING / _UNITS * (1 - number / len(group)))
    return found


def groups(supernet: Supernet, pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs to solve together: each block once, and no more memory for equations than allowed."""
    done: list[list[Pair]] = []
    taken = 0
    for block, recipe in sorted(pairs, key=lambda pair: list(supernet.available[pair[0]]).index(pair[1])):
        size = equation_bytes(flow_of(supernet, (block, recipe)))
        full = not done or len(done[-1]) == _TOGETHER or block in dict(done[-1]) or taken + size > MEMORY
        if full:
            done.append([])
            taken = 0
        done[-1].append((block, recipe))
        taken += size
    return done


def peak_memory(supernet: Supernet, batch: int, settings: SolveSettings, recipe: str | None = None) -> int:
    """Bytes that `measure_damage` takes at most, beside the network and the images: see `peak_bytes`."""
    grouped = groups(supernet, pairs_in(supernet, recipe))
    return max(peak_bytes(supernet, dict(group), batch, settings) for group in grouped)


def most_unknowns(supernet: Supernet, recipe: str | None = None) -> int:
    """Unknowns of an output, of the operator that has the most."""
    flows = [flow_of(supernet, pair) for pair in pairs_in(supernet, recipe)]
    return max(shape_of(flow.part(name))[1] + 1 for flow in flows for name in flow.composed)


@torch.no_grad()
def network_answers(supernet: Supernet, subnet: SubnetConfig, images: Images) -> Iterator[Tensor]:
    """Log probabilities ``(N, classes)`` of a subnet's network, batch by batch."""
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
    baseline = list(network_answers(supernet, supernet.all_keep(), judge))
    return divergence(baseline, network_answers(supernet, subnet, judge))
