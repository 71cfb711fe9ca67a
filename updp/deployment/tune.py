"""Finding the fastest form of every chain, inside the network: where weights and maps are as cold as they will be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from updp.deployment.forms import Operands, Problem, build

_BYTES = 1 << 30  # of weights that forms on trial may hold at the same time
_SECONDS = 2.0  # of running the network, for each group of chains that is on trial together
_ROUNDS = (7, 50)


class Fused(nn.Module):
    """One chain of a network whose form is not settled yet.

    Attributes:
        name: of the convolution or linear layer in the network.
        input: shape of the input that was seen last.
    """

    def __init__(self, name: str, problem: Problem, operands: Operands) -> None:
        super().__init__()
        self.name, self.problem, self.operands = name, problem, operands
        self.input: tuple[int, ...] = ()
        self.run: nn.Module = build("torch", problem, operands)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out: Tensor = self.run(x, residual)
        return out


class _Trial(nn.Module):
    """Stands in for a chain's form while all of them are tried, and keeps the times."""

    def __init__(self, fused: Fused, forms: Sequence[str]) -> None:
        super().__init__()
        self.forms = [build(form, fused.problem, fused.operands) for form in forms]
        self.times: list[list[float]] = [[] for _ in forms]
        self.turn = 0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        place = self.turn % len(self.forms)
        start = time.perf_counter()
        out: Tensor = self.forms[place](x, residual)
        self.times[place].append(time.perf_counter() - start)
        return out


def tune(
    chains: Sequence[tuple[Fused, Sequence[str]]],
    run: Callable[[], object],
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, float]]:
    """Median milliseconds of every form of each chain.

    All chains change their form from one pass through the network to the next, so that each form meets what the
    chain before it and its own weights leave in the caches. A pass is one `run` of the network.

    Args:
        chains: those that are to be tuned, with the forms that each can take; they are left as they were.
        run: runs the network once.
        progress: called with how many chains are done.
    """
    done = 0
    for group in _groups(chains):
        trials = [_Trial(fused, forms) for fused, forms in group]
        before = [fused.run for fused, _ in group]
        for (fused, _), trial in zip(group, trials, strict=True):
            fused.run = trial
        try:
            _take_turns(trials, run)
        finally:
            for (fused, _), own in zip(group, before, strict=True):
                fused.run = own
        done += len(group)
        if progress is not None:
            progress(done)
        for (_, forms), trial in zip(group, trials, strict=True):
            medians = (round(1e3 * statistics.median(times), 6) for times in trial.times)
            yield dict(zip(forms, medians, strict=True))


def _take_turns(trials: Sequence[_Trial], run: Callable[[], object]) -> None:
    turns = max(len(trial.forms) for trial in trials)

    def round_() -> None:
        for turn in range(turns):
            for trial in trials:
                trial.turn = turn
            run()

    round_()  # what is packed or loaded on first use
    for trial in trials:
        trial.times = [[] for _ in trial.forms]
    start = time.perf_counter()
    round_()
    rounds = round(_SECONDS / max(time.perf_counter() - start, 1e-9))
    for _ in range(min(max(rounds, _ROUNDS[0]), _ROUNDS[1]) - 1):
        round_()


def _groups(chains: Sequence[tuple[Fused, Sequence[str]]]) -> Iterator[list[tuple[Fused, Sequence[str]]]]:
    """Chains whose forms fit into memory together; a packed weight takes up to four times as much as the weight."""
    group: list[tuple[Fused, Sequence[str]]] = []
    taken = 0
    for fused, forms in chains:
        size = 2 * len(forms) * fused.operands.weight.nbytes
        if group and taken + size > _BYTES:
            yield group
            group, taken = [], 0
        group.append((fused, forms))
        taken += size
    if group:
        yield group
