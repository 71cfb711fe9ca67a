"""Solving the operators of pruned blocks, block after block, on the pruned network's own inputs.

Every pruned block is solved on what the already pruned network gives it against what the baseline's block gave, so that
it makes up for the errors before it. Nothing is ever held of all images: each pass streams them again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp.calibrate.alternating import PairProblem, pairs_of
from updp.calibrate.appended import Range, open_appended
from updp.calibrate.equations import Equations, least
from updp.calibrate.norms import NormProblem, norms_of
from updp.calibrate.observe import Key, Value, observe, record, reference_of
from updp.calibrate.rows import as_solution, assign, sample, shape_of
from updp.calibrate.trail import Entrance, Images, Trail, inputs_of
from updp.errors import InputError
from updp.recipe import PrunedFlow, prune
from updp.structure import evaluating
from updp.subnet import KEEP, SubnetConfig
from updp.supernet import Supernet, estimating


@dataclass(frozen=True)
class SolveSettings:
    """How blocks are solved.

    Attributes:
        positions: samples of each image and operator, of maps and of tokens.
        held_out: part of each batch that chooses the ridge and tells the error.
        restore: give each output back the variance that least squares takes from it.
        seed: of the positions.
    """

    positions: int = 64
    held_out: float = 0.2
    restore: bool = True
    seed: int = 0

    def fitting(self, images: int) -> int:
        """How many images of a batch are to fit; the others, at least one of two, are held out."""
        return max(1, min(images - 1, round(images * (1 - self.held_out))))


@dataclass(frozen=True)
class Solved:
    """One operator and how well it stands for its steps.

    Attributes:
        error_before, error: mean square error on held-out positions, relative to the variance of what is wanted,
            of the operator as merging alone gives it and of the solved one.
        ridge: infinite where the operator stays as merging gives it.
        determined: whether there were more samples than unknowns of an output; the ridge decides the rest.
    """

    block: str
    operator: str
    samples: int
    unknowns: int
    ridge: float
    error_before: float
    error: float

    @property
    def determined(self) -> bool:
        return self.samples > self.unknowns


class Solutions:
    """What blocks of one supernet were solved to on the same images, by the choices up to and with each block."""

    def __init__(self, supernet: Supernet) -> None:
        self.entrance = Entrance(supernet)
        self.baseline = Trail(self.entrance, again=True)
        self.ridges: dict[tuple[str, str], float] = {}  # of an operator: near that of the same one in another subnet
        self.found: dict[tuple[tuple[str, str], ...], tuple[dict[str, Tensor], list[Solved]]] = {}


def solve_subnet(
    supernet: Supernet,
    subnet: SubnetConfig,
    images: Images,
    settings: SolveSettings | None = None,
    progress: Callable[[int], None] | None = None,
    solutions: Solutions | None = None,
) -> list[Solved]:
    """Solve every pruned block of a subnet, in order of execution; the supernet is left at that subnet.

    Args:
        supernet: of a spec whose recipes compose at the start; its baseline has trained weights.
        progress: called with how many blocks are done.
        solutions: what was found for other subnets on the same images; taken up again where it is the same, and
            added to.

    Raises:
        InputError: no images, or the maps of a block are not finite.
    """
    solved: list[Solved] = []
    before: dict[str, str] = {}
    solutions = solutions or Solutions(supernet)
    trails = solutions.baseline, Trail(solutions.entrance)
    for name, block in supernet.blocks.items():
        if (choice := subnet.choice(name)) != KEEP:
            config = SubnetConfig(supernet.spec.name, before)
            before[name] = choice
            if (known := solutions.found.get(tuple(before.items()))) is None:
                stream = _Stream(supernet, {name: choice}, config, images, trails, solutions.ridges)
                found = _solve(stream, settings)
                solutions.found[tuple(before.items())] = copy.deepcopy(block.choices[choice].state_dict()), found
            else:
                state, found = known
                block.choices[choice].load_state_dict(state)
            solved += found
            if progress is not None:
                progress(len(before))
    supernet.set_subnet(subnet)
    return solved


def solve_blocks(
    supernet: Supernet,
    choices: Mapping[str, str],
    before: SubnetConfig,
    images: Images,
    settings: SolveSettings | None = None,
) -> list[Solved]:
    """Solve blocks independently of each other, in one network: that in which ``before`` is pruned."""
    return _solve(_Stream(supernet, choices, before, images), settings)


def _solve(stream: _Stream, settings: SolveSettings | None) -> list[Solved]:
    settings = settings or SolveSettings()
    with evaluating(stream.supernet), torch.no_grad():
        _estimate_norms(stream, stream.flows)
        solved = []
        turns = max(len(flow.composed) for flow in stream.flows.values())
        for turn in range(turns):
            solved += _solve_norms(stream, turn, settings)
            solved += _solve_filters(stream, turn, settings)
            solved += _solve_operators(stream, turn, settings)
        solved += _solve_norms(stream, turns, settings)
    return solved


class _Stream:
    """Batch by batch and block by block: a block's input in the pruned network, and its baseline's values.

    With trails (of the baseline and of the pruned network), there is one block, and no block before it is run again.
    """

    def __init__(
        self,
        supernet: Supernet,
        choices: Mapping[str, str],
        before: SubnetConfig,
        images: Images,
        trails: tuple[Trail, Trail] | None = None,
        ridges: dict[tuple[str, str], float] | None = None,
    ) -> None:
        self.supernet, self.before, self.images = supernet, before, images
        self.trails = trails
        self.ridges = {} if ridges is None else ridges
        self.flows: dict[str, PrunedFlow] = {}
        for name, recipe in choices.items():
            flow = supernet.blocks[name].choices[recipe]
            assert isinstance(flow, PrunedFlow)
            # Whatever it was solved to before: what is compared is the operator as merging gives it.
            fresh = prune(supernet.bound[name], supernet.spec.recipes[recipe])
            flow.load_state_dict(fresh.state_dict())
            self.flows[name] = flow
        self.references = {name: reference_of(supernet.bound[name]) for name in choices}

    def inputs(self) -> Iterator[tuple[str, Tensor]]:
        """What the pruned network gives the blocks."""
        for number, batch in self._batches():
            yield from self._pruned(number, batch).items()

    def pairs(self) -> Iterator[tuple[str, Tensor, dict[Key, Value]]]:
        """Blocks' inputs with their baselines' values."""
        for number, batch in self._batches():
            baseline = self._baseline(number, batch)
            pruned = self._pruned(number, batch) if self.before.choices else baseline
            for name, x in pruned.items():
                yield name, x, record(self.references[name], baseline[name])

    def _batches(self) -> Iterator[tuple[int, Tensor]]:
        number = -1
        for number, batch in enumerate(self.images()):
            yield number, batch
        if number < 0:
            raise InputError("no images to calibrate on")

    def _baseline(self, number: int, batch: Tensor) -> dict[str, Tensor]:
        return self._caught(self.supernet.all_keep(), number, batch, self.trails and self.trails[0])

    def _pruned(self, number: int, batch: Tensor) -> dict[str, Tensor]:
        return self._caught(self.before, number, batch, self.trails and self.trails[1])

    def _caught(self, subnet: SubnetConfig, number: int, batch: Tensor, trail: Trail | None) -> dict[str, Tensor]:
        self.supernet.set_subnet(subnet)
        if trail is None:
            return inputs_of(self.supernet, list(self.flows), batch)
        (name,) = self.flows
        return {name: trail.input_of(name, number, batch)}


def _estimate_norms(stream: _Stream, blocks: Collection[str]) -> None:
    """Statistics of the norms that these blocks' flows own, but for those appended, which come last."""
    norms = []
    for flow in (stream.flows[name] for name in blocks):
        appended = {id(flow.part(name)) for name in flow.appended}
        norms += [norm for norm in flow.norms() if isinstance(norm, _BatchNorm) and id(norm) not in appended]
    if norms:
        with estimating(norms):
            for name, x in stream.inputs():
                if name in blocks:
                    stream.flows[name](x)


def _solve_norms(stream: _Stream, turn: int, settings: SolveSettings) -> list[Solved]:
    """Fit the norms that stand for other steps before the operators whose turn it is, one after the other."""
    names = {block: norms_of(flow, turn) for block, flow in stream.flows.items()}
    solved = []
    for place in range(max(map(len, names.values()))):
        here = {block: found[place] for block, found in names.items() if place < len(found)}
        problems = {block: NormProblem(stream.flows[block], name) for block, name in here.items()}
        solved += _solve_parts(stream, problems, settings)
    return solved


def _solve_filters(stream: _Stream, turn: int, settings: SolveSettings) -> list[Solved]:
    """Solve the depthwise convolutions before the operators whose turn it is, together with those."""
    problems: dict[str, PairProblem] = {}
    for name, flow in stream.flows.items():
        for pair in pairs_of(flow):
            if pair.operator in list(flow.composed)[turn : turn + 1]:
                problems[name] = PairProblem(flow, pair)
    return _solve_parts(stream, problems, settings)


def _solve_parts(
    stream: _Stream, problems: Mapping[str, NormProblem | PairProblem], settings: SolveSettings
) -> list[Solved]:
    """Solve what stands before an operator, one part of each block; norms behind them see something else then."""
    if not problems:
        return []
    generator = torch.Generator().manual_seed(settings.seed)
    for name, x, reference in stream.pairs():
        if (problem := problems.get(name)) is not None:
            check_finite(name, x, *(value.tensor for value in reference.values()))
            problem.observe(x, reference, settings.fitting(len(x)), settings.positions, generator)
    solved = []
    for name, problem in problems.items():
        samples, unknowns = problem.fit.count + problem.held_out.count, problem.fit.unknowns
        solved.append(Solved(name, problem.name, samples, unknowns, *problem.solve()))
    _estimate_norms(stream, problems)
    return solved


def check_finite(block: str, *values: Tensor) -> None:
    """Refuse to solve for what is not a number.

    Raises:
        InputError: one of the values is not.
    """
    if not all(torch.isfinite(value).all() for value in values):
        raise InputError(f"block {block}: the network's values are not finite; check weights and images")


@dataclass
class _Problem:
    """One operator under solution."""

    block: str
    operator: str
    part: nn.Module
    fit: Equations
    held_out: Equations
    given: Range | None = None  # what the baseline block gives

    @classmethod
    def of(cls, block: str, operator: str, flow: PrunedFlow) -> _Problem:
        part = flow.part(operator)
        device = next(part.parameters()).device
        return cls(block, operator, part, Equations(*shape_of(part), device), Equations(*shape_of(part), device))

    def add(self, x: Tensor, wanted: Tensor, settings: SolveSettings, generator: torch.Generator) -> None:
        """Take in a batch; its last images are held out."""
        check_finite(self.block, x, wanted)
        parts = settings.fitting(len(x))
        for equations, where in ((self.fit, slice(0, parts)), (self.held_out, slice(parts, len(x)))):
            if where.start < where.stop:
                equations.add(*sample(self.part, x[where], wanted[where], settings.positions, generator))

    def solve(self, settings: SolveSettings, guess: float | None = None) -> Solved:
        """Take the ridge and the prior (none, or the merged weight) that do best on what was held out; then use all.

        With few samples the operator as merging gives it may be best: it then stays.
        """
        error_of = (self.held_out if self.held_out.count else self.fit).judge()
        merged, bias = as_solution(self.part), self.part.bias
        assert isinstance(bias, Tensor)
        before = error_of(merged, bias.detach().double().reshape(len(merged), -1))
        error, ridge, with_prior = _least_error(self.fit, error_of, merged, guess)
        del error_of  # it holds matrices
        self.fit.merge(self.held_out)
        if error < before:
            found = self.fit.solve(ridge, merged if with_prior else None)
            assign(self.part, *(self.fit.restored(*found) if settings.restore else found))
        else:
            ridge, error = math.inf, before
        return Solved(self.block, self.operator, self.fit.count, self.fit.unknowns, ridge, before, error)


def _least_error(
    fit: Equations, error_of: Callable[[Tensor, Tensor], float], merged: Tensor, guess: float | None
) -> tuple[float, float, bool]:
    """The least error, the ridge that gives it, and whether what is merged is its prior."""
    solved = fit.solver(merged)

    def rated(ridge: float) -> tuple[float, float, bool]:
        free, of_merged = solved(ridge)
        return min((error_of(*free), ridge, False), (error_of(*of_merged), ridge, True))

    return least(rated, start=guess)


def _solve_operators(stream: _Stream, turn: int, settings: SolveSettings) -> list[Solved]:
    """Solve one operator of each block, the one whose turn it is."""
    problems = {
        name: _Problem.of(name, list(flow.composed)[turn], flow)
        for name, flow in stream.flows.items()
        if turn < len(flow.composed)
    }
    generator = torch.Generator().manual_seed(settings.seed)
    for name, x, reference in stream.pairs():
        if (problem := problems.get(name)) is not None:
            seen = observe(stream.flows[name], problem.operator, x, reference)
            problem.add(seen.input, seen.wanted, settings, generator)
            given = list(reference.values())[-1]
            problem.given = problem.given or Range.of(given)
            problem.given.add(given)
    solved = []
    for name, problem in problems.items():
        key = name, problem.operator
        solved.append(problem.solve(settings, stream.ridges.get(key)))
        stream.ridges[key] = solved[-1].ridge
        flow = stream.flows[name]
        if flow.appended and turn == len(flow.composed) - 1:
            assert problem.given is not None
            open_appended(flow, problem.given)
    return solved
