"""pymoo's genetic algorithm for binary vectors with exactly k ones, none of which is ever asked for twice."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.soo.nonconvex.ga import GA, comp_by_cv_and_fitness
from pymoo.config import Config
from pymoo.core.crossover import Crossover
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.mating import Mating
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.sampling import Sampling
from pymoo.core.termination import NoTermination
from pymoo.operators.selection.tournament import TournamentSelection

# pymoo would print how to compile its optional modules; nothing here calls them.
Config.warnings["not_compiled"] = False
Config.show_compile_hint = False

Vector = NDArray[np.bool_]  # one place per block: pruned or kept
Random = np.random.Generator

POOL = 8  # children per place in a generation, of which the most promising are asked for
NEWCOMERS = 0.125  # the part of a generation that is random
RIDGE = 0.01
PATIENCE = 20  # how often a generation is filled up before it is taken as it is: hardly anything new is left


class RandomVectors(Sampling):
    """Vectors with k ones, all equally likely."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def _do(self, problem: Problem, n_samples: int, *args: Any, random_state: Random, **kwargs: Any) -> Any:
        order = random_state.random((n_samples, problem.n_var)).argsort(axis=1)
        return order < self.k


class Union(Crossover):
    """A child has the ones that its parents share, and fills up from those that only one of them has."""

    def __init__(self) -> None:
        super().__init__(n_parents=2, n_offsprings=1, prob=1.0)

    def _do(self, problem: Problem, X: Any, *args: Any, random_state: Random, **kwargs: Any) -> Any:
        first, second = X.astype(bool)
        k = first.sum(axis=1, keepdims=True)
        # Shared ones come first in this order, then the others in a random one, then what neither parent has.
        preference = first.astype(float) + second + random_state.random(first.shape) * 0.5
        rank = (-preference).argsort(axis=1).argsort(axis=1)
        return (rank < k)[None]


class Swap(Mutation):
    """Prunes a kept block in the place of a pruned one, once or twice; sometimes not at all."""

    def _do(self, problem: Problem, X: Any, *args: Any, random_state: Random, **kwargs: Any) -> Any:
        mutated = X.astype(bool)
        swaps = random_state.choice(3, size=len(mutated), p=(0.3, 0.5, 0.2))
        for done in range(2):
            order = random_state.random(mutated.shape)
            rows = np.flatnonzero(swaps > done)
            pruned, kept = (np.where(mutated == one, order, -1.0).argmax(axis=1)[rows] for one in (True, False))
            mutated[rows, pruned], mutated[rows, kept] = False, True
        return mutated


class OnlyNew(DuplicateElimination):
    """Drops vectors that were asked for before, in any generation."""

    def __init__(self, seen: Container[bytes]) -> None:
        super().__init__()
        self.seen = seen

    def _do(self, pop: Population, other: Population | None, is_duplicate: Any) -> Any:
        known = set() if other is None else {pack(vector) for vector in other.get("X")}
        for i, vector in enumerate(pop.get("X")):
            is_duplicate[i] = pack(vector) in known or pack(vector) in self.seen
            if other is None:
                known.add(pack(vector))
        return is_duplicate


class Breeding(Mating):
    """Offspring: the most promising of many children and of the best vector's neighbours, and some newcomers.

    Promising is what a regression on all vectors told so far says, with a term per block and per pair of blocks: blocks
    mostly add up, and evaluations are dear. Newcomers are random, and go in unseen by it.
    """

    def __init__(self, k: int, ranks: Mapping[bytes, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.newcomers = RandomVectors(k)
        self.ranks = ranks

    def _do(self, problem: Problem, pop: Population, n_offsprings: int, *args: Any, **kwargs: Any) -> Population:
        random: Random = kwargs["random_state"]
        children = super()._do(problem, pop, POOL * n_offsprings, *args, **kwargs).get("X")
        best = pop[pop.get("F")[:, 0].argmin()].X
        pool = np.unique([*children.astype(bool), *neighbours(best)], axis=0)
        pool = pool[[pack(vector) not in self.ranks for vector in pool]]
        newcomers = self.newcomers.do(problem, math.ceil(n_offsprings * NEWCOMERS), random_state=random)
        chosen = predict_ranks(self.ranks, pool).argsort(kind="stable")[: n_offsprings - len(newcomers)]
        return Population.merge(Population.new("X", pool[chosen]), newcomers)


def predict_ranks(ranks: Mapping[bytes, int], vectors: Vector) -> NDArray[np.float64]:
    """Kernel ridge regression of the ranks with first and second powers of the scalar product."""
    known = np.array([np.frombuffer(vector, dtype=bool) for vector in ranks], dtype=float)
    mean = known.mean(axis=0)
    known, asked = known - mean, vectors - mean
    scale = max(float((known**2).sum(axis=1).mean()), 1e-12)

    def kernel(left: NDArray[np.float64]) -> NDArray[np.float64]:
        product = left @ known.T / scale
        return np.asarray(product + 0.5 * product**2)

    target = np.array(list(ranks.values()), dtype=float)
    weights = np.linalg.solve(kernel(known) + RIDGE * np.eye(len(known)), target - target.mean())
    return np.asarray(kernel(asked) @ (weights / max(float(target.std()), 1e-12)))


def neighbours(vector: Vector) -> Iterator[Vector]:
    """The vectors that are one swap away."""
    for i in np.flatnonzero(vector):
        for j in np.flatnonzero(~vector):
            near = vector.copy()
            near[[i, j]] = near[[j, i]]
            yield near


def pack(vector: Vector) -> bytes:
    """A vector as something that can be in a set."""
    return np.asarray(vector, dtype=bool).tobytes()


def make_algorithm(blocks: int, k: int, population: int, seed: int, ranks: Mapping[bytes, int]) -> GA:
    """The algorithm, to be asked for vectors and told their ranks.

    Args:
        ranks: of all vectors told so far (0 is the best); the caller keeps it up to date.
    """
    parts = {"crossover": Union(), "mutation": Swap(), "eliminate_duplicates": OnlyNew(ranks)}
    selection = TournamentSelection(func_comp=comp_by_cv_and_fitness)
    mating = Breeding(k, ranks, selection=selection, n_max_iterations=PATIENCE, **parts)
    algorithm = GA(pop_size=population, sampling=RandomVectors(k), mating=mating, **parts)
    problem = Problem(n_var=blocks, n_obj=1, xl=0, xu=1, vtype=bool)
    algorithm.setup(problem, seed=seed, termination=NoTermination(), verbose=False)
    return algorithm
