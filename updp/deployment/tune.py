"""Finding the fastest form of every chain, inside the network: where weights and maps are as cold as they will be."""

from __future__ import annotations

import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from updp.deployment.forms import Operands, Problem, build, forms_for
from updp.deployment.plan import Plan, planned

_BYTES = 1 << 30  # of weights that forms on trial may hold at the same time
_SECONDS = 2.0  # of running the network, for each group of chains that is on trial together
_ROUNDS = (7, 50)


class Slot(nn.Module):
    """A place in a network whose form is not settled yet.

    Attributes:
        name: for people and plans.
        problem: what is computed there.
        input: shape of the input that was seen last.
        run: the form that it has for the time being.
    """

    input: tuple[int, ...] = ()
    run: nn.Module

    def __init__(self, name: str, problem: Problem | str) -> None:
        super().__init__()
        self.name, self.problem = name, problem

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out: Tensor = self.run(x, residual)
        return out

    @property
    def place(self) -> str:
        """Where its module is: beside the network's own, whose names may be alike."""
        return f"fused.{self.name.replace('.', '_')}"

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What a form of it holds, roughly."""

    @abstractmethod
    def forms(self, dtype: torch.dtype, device: torch.device) -> list[str]:
        """Names of those that can run it here; the first one always can."""

    def planned(self, plan: Plan) -> str | None:
        """The form that a plan says.

        Raises:
            InputError: the plan is of another network.
        """
        return planned(plan, self.name, self.problem).form

    @abstractmethod
    def build(self, form: str) -> nn.Module:
        """The module that runs it in a form."""


class Fused(Slot):
    """One chain; ``name`` is that of the convolution or linear layer in the network."""

    problem: Problem

    def __init__(self, name: str, problem: Problem, operands: Operands) -> None:
        super().__init__(name, problem)
        self.operands = operands
        self.run = self.build("torch")

    @property
    def nbytes(self) -> int:
        return 2 * self.operands.weight.nbytes

    def forms(self, dtype: torch.dtype, device: torch.device) -> list[str]:
        return forms_for(self.problem, self.input, dtype, device)

    def build(self, form: str) -> nn.Module:
        return build(form, self.problem, self.operands)


class _Trial(nn.Module):
    """Stands in for a slot's form while all of them are tried, and keeps the times."""

    def __init__(self, slot: Slot, forms: Sequence[str]) -> None:
        super().__init__()
        self.forms = [slot.build(form) for form in forms]
        self.times: list[list[float]] = [[] for _ in forms]
        self.turn = 0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        place = self.turn % len(self.forms)
        start = time.perf_counter()
        out: Tensor = self.forms[place](x, residual)
        self.times[place].append(time.perf_counter() - start)
        return out


def tune(
    slots: Sequence[tuple[Slot, Sequence[str]]],
    run: Callable[[], object],
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, float]]:
    """Median milliseconds of every form of each slot.

    All slots change their form from one pass through the network to the next, so that each form meets what the one
    before it and its own weights leave in the caches. A pass is one `run` of the network.

    Args:
        slots: those that are to be tuned, with the forms that each can take; they are left as they were.
        run: runs the network once.
        progress: called with how many slots are done.
    """
    done = 0
    for group in _groups(slots):
        trials = [_Trial(slot, forms) for slot, forms in group]
        before = [slot.run for slot, _ in group]
        for (slot, _), trial in zip(group, trials, strict=True):
            slot.run = trial
        try:
            _take_turns(trials, run)
        finally:
            for (slot, _), own in zip(group, before, strict=True):
                slot.run = own
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


def _groups(slots: Sequence[tuple[Slot, Sequence[str]]]) -> Iterator[list[tuple[Slot, Sequence[str]]]]:
    """Slots whose forms fit into memory together; a packed weight takes up to four times as much as the weight."""
    group: list[tuple[Slot, Sequence[str]]] = []
    taken = 0
    for slot, forms in slots:
        size = len(forms) * slot.nbytes
        if group and taken + size > _BYTES:
            yield group
            group, taken = [], 0
        group.append((slot, forms))
        taken += size
    if group:
        yield group
