"""Search for the k blocks whose pruning costs the least accuracy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from updp.errors import InputError
from updp.oracle import Score
from updp.search.cache import Oracle
from updp.search.operators import Vector, make_algorithm, pack
from updp.search.tree import count_block_evaluations
from updp.spec import SearchSettings
from updp.subnet import SubnetConfig


@dataclass(frozen=True)
class Generation:
    """One generation: the best subnet so far (top-1 in percent, and its loss), the mean top-1 of the new ones.

    ``evaluations`` counts the subnets scored so far, those of this generation included.
    """

    generation: int
    best: float
    loss: float
    mean: float
    evaluations: int


@dataclass(frozen=True)
class SearchResult:
    """The best subnet found.

    ``block_evaluations`` sums up `count_block_evaluations` over the generations. Nothing here depends on what a cache
    knew before.
    """

    best: SubnetConfig
    score: Score
    history: tuple[Generation, ...]
    evaluations: int
    block_evaluations: dict[str, int]
    exhaustive: bool


def search(
    oracle: Oracle,
    blocks: Mapping[str, str],
    k: int,
    settings: SearchSettings,
    seed: int,
    *,
    spec: str,
    on_generation: Callable[[Generation], None] | None = None,
    exhaustive: bool | None = None,
) -> SearchResult:
    """Find the best subnet with exactly ``k`` pruned blocks: highest top-1, ties broken by the lower loss.

    The genetic algorithm scores ``population * generations`` subnets, each once. Where shared prefixes
    make all no dearer than these, all are scored: the optimum. The same seed and scores give the same search.

    Args:
        blocks: the prunable blocks in order of execution, with the recipe that each is pruned by.
        spec: the spec's name, for the subnets.
        on_generation: called after every generation.
        exhaustive: score all subnets, or never; None decides as said above.

    Raises:
        InputError: ``k`` is not between 0 and the number of prunable blocks.
    """
    if not 0 <= k <= len(blocks):
        allowed = f"{spec} has {len(blocks)} prunable blocks (allowed: 0 to {len(blocks)})"
        raise InputError(f"cannot prune {k} blocks: {allowed}")
    exhaustive = _affordable(len(blocks), k, settings) if exhaustive is None else exhaustive
    run = _Run(oracle, blocks, spec, on_generation)
    if exhaustive or k in (0, len(blocks)):
        for vectors in _batches(len(blocks), k, settings.population):
            run.score(vectors)
    else:
        _evolve(run, k, settings, seed)
    best = max(run.scores, key=lambda vector: (_merit(run.scores[vector]), vector))
    config = run.config(np.frombuffer(best, dtype=bool))
    return SearchResult(
        config, run.scores[best], tuple(run.history), len(run.scores), run.block_evaluations, exhaustive
    )


def planned_evaluations(blocks: int, k: int, settings: SearchSettings) -> int:
    """How many subnets `search` will score at most, for a progress bar; ``exhaustive`` left to it."""
    subnets = math.comb(blocks, k)
    return subnets if _affordable(blocks, k, settings) else min(subnets, settings.population * settings.generations)


class _Run:
    """What a search has scored so far, and the ranks of it: equal scores have equal ranks, 0 is the best."""

    def __init__(
        self,
        oracle: Oracle,
        blocks: Mapping[str, str],
        spec: str,
        on_generation: Callable[[Generation], None] | None,
    ) -> None:
        self.blocks = dict(blocks)
        self.scores: dict[bytes, Score] = {}
        self.ranks: dict[bytes, int] = {}
        self.history: list[Generation] = []
        self.block_evaluations = {"shared": 0, "unshared": 0}
        self._oracle = oracle
        self._spec = spec
        self._on_generation = on_generation

    def config(self, vector: Vector) -> SubnetConfig:
        chosen = itertools.compress(self.blocks.items(), vector)
        return SubnetConfig(self._spec, dict(chosen))

    def score(self, vectors: Sequence[Vector]) -> None:
        configs = [self.config(vector) for vector in vectors]
        scores = self._oracle.score(configs)
        self.scores.update(zip(map(pack, vectors), scores, strict=True))
        merits = {vector: _merit(score) for vector, score in self.scores.items()}
        rank = {merit: i for i, merit in enumerate(sorted(set(merits.values()), reverse=True))}
        self.ranks.update((vector, rank[merit]) for vector, merit in merits.items())
        shared, unshared = count_block_evaluations(configs, list(self.blocks))
        self.block_evaluations["shared"] += shared
        self.block_evaluations["unshared"] += unshared
        best = max(self.scores.values(), key=_merit)
        mean = sum(score.top1 for score in scores) / len(scores)
        self.history.append(Generation(len(self.history), best.top1, best.loss, mean, len(self.scores)))
        if self._on_generation is not None:
            self._on_generation(self.history[-1])


def _evolve(run: _Run, k: int, settings: SearchSettings, seed: int) -> None:
    """Score generations until the budget is used up, or nothing new is left.

    pymoo has one number per individual: its rank among all scored so far, which is exact for ties, and is set anew for
    the whole population after every generation.
    """
    blocks = len(run.blocks)
    budget = min(settings.population * settings.generations, math.comb(blocks, k))
    algorithm = make_algorithm(blocks, k, settings.population, seed, run.ranks)
    while len(run.scores) < budget:
        offspring = algorithm.ask()
        if offspring is None or len(offspring) == 0:
            return
        offspring = offspring[: budget - len(run.scores)]
        run.score(list(offspring.get("X")))
        for individual in (*(algorithm.pop if algorithm.pop is not None else ()), *offspring):
            individual.F = np.array([run.ranks[pack(individual.X)]], dtype=float)
        algorithm.tell(infills=offspring)


def _merit(score: Score) -> tuple[float, float]:
    """Larger is better; a loss that is not a number is the worst."""
    return score.top1, -math.inf if math.isnan(score.loss) else -score.loss


def _batches(blocks: int, k: int, size: int) -> Iterator[list[Vector]]:
    """All vectors with k ones, neighbours in the tree of prefixes together."""
    vectors = (np.isin(np.arange(blocks), ones) for ones in itertools.combinations(range(blocks), k))
    return iter(lambda: list(itertools.islice(vectors, max(size, 1))), [])


def _affordable(blocks: int, k: int, settings: SearchSettings) -> bool:
    """Whether all subnets take no more block evaluations than the budget's number of subnets without sharing."""
    budget = settings.population * settings.generations
    if math.comb(blocks, k) <= budget:
        return True
    if math.comb(blocks, k) > budget * blocks:  # the last blocks alone are too many
        return False
    cost = 0
    for batch in _batches(blocks, k, settings.population):
        cost += len({pack(vector[:length]) for vector in batch for length in range(1, blocks + 1)})
    return cost <= budget * blocks
