"""Finding the fastest form of every chain, inside the network: where weights and maps are as cold as they will be."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_BYTES = 1 << 30  # of weights that forms on trial may hold at the same time
_SECONDS = 2.0  # of running the network, for each group of chains that is on trial together
_ROUNDS = (7, 50)


class Problem(Protocol):
    """What is computed, but for its numbers; its text is the key of a plan.

    Attributes:
        plain: the form that can always run it.
        since: version of the first plans that speak of such problems; None where it depends on the machine.
    """

    @property
    def plain(self) -> str: ...

    @property
    def since(self) -> int | None: ...

    def forms(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[str]:
        """Names of the forms that can run it here, for a first input of this shape; ``plain`` is one."""
        ...

    def build(self, form: str, operands: Any) -> nn.Module:
        """The module that runs it in a form."""
        ...


class Fused(nn.Module):
    """One part of a network whose form is not settled yet: a chain, an attention or a layer norm.

    Attributes:
        name: of the layer in the network.
        operands: the numbers that belong to the problem.
        input: shape of the first input that was seen last.
    """

    def __init__(self, name: str, problem: Problem, operands: nn.Module) -> None:
        super().__init__()
        self.name, self.problem, self.operands = name, problem, operands
        self.input: tuple[int, ...] = ()
        self.run = self.build(problem.plain)

    @property
    def place(self) -> str:
        """Where its module is: beside the network's own, whose names may be alike."""
        return "fused." + re.sub(r"\W+", "_", self.name)

    def build(self, form: str) -> nn.Module:
        """The module that runs it in a form."""
        return self.problem.build(form, self.operands)

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.run(*inputs)
        return out


class _Trial(nn.Module):
    """Stands in for a chain's form while all of them are tried, and keeps the times."""

    def __init__(self, fused: Fused, forms: Sequence[str]) -> None:
        super().__init__()
        self.forms = [fused.build(form) for form in forms]
        self.times: list[list[float]] = [[] for _ in forms]
        self.turn = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        place = self.turn % len(self.forms)
        start = time.perf_counter()
        out: Tensor = self.forms[place](*inputs)
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
        size = 2 * len(forms) * sum(each.nbytes for each in fused.operands.buffers())
        if group and taken + size > _BYTES:
            yield group
            group, taken = [], 0
        group.append((fused, forms))
        taken += size
    if group:
        yield group
