"""Doing the stages of a run, each once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from updp import processes
from updp.errors import InputError, suggest
from updp.pipeline import calibrating, finish, stages
from updp.pipeline.context import Context
from updp.pipeline.directory import RunDirectory
from updp.pipeline.lock import locked
from updp.pipeline.log import logged
from updp.pipeline.program import program
from updp.pipeline.watch import Watch
from updp.report.read import STAGES
from updp.train import USUAL, Every

_WORK: dict[str, Callable[[Context], dict[str, Any]]] = {
    "baseline": stages.baseline,
    "supernet": stages.supernet,
    "search": stages.find,
    "damage": calibrating.damage,
    "calibrate": calibrating.calibrate,
    "finetune": stages.finetune,
    "merge": finish.finish,
}

_ALONE = ("damage", "merge")
"""Stages that the first process does alone while the others wait: what they measure would be disturbed, and others
would only do the same once more."""

_COMMANDS = {"baseline": "train", "supernet": "train", "search": "search", "finetune": "finetune"}  # do one stage alone


def run(
    directory: RunDirectory, wanted: Sequence[str] = STAGES, watch: Watch | None = None, every: Every | None = None
) -> None:
    """Do the wanted stages of a run that are not finished, in their order.

    Args:
        every: how often the state of a training is kept, to go on from if it is stopped; every five minutes if None.

    Raises:
        InputError: a stage that comes before is not finished and not wanted, or the run has no such stage.
            Or another process is at work there.
        UpdpError: the work itself failed. What is finished stays finished.
    """
    watch = watch or Watch()
    order = directory.record.stages
    for stage in wanted:
        if stage not in STAGES:
            raise InputError(f"stage: {suggest(stage, STAGES)}")
    due = [stage for stage in order if stage in wanted]
    if not due:
        why = "has a given subnet" if directory.record.subnet else f"has the stages {', '.join(order)}"
        raise InputError(f"{directory.path}: the run {why}: it needs no {' and no '.join(wanted)}")
    _check_order(directory, order, due)
    if processes.agreed(all(directory.result(stage) is not None for stage in due)):
        _work(directory, due, watch, every or USUAL)
        return
    with locked(directory.path, watch), logged(directory.path, due, watch) as watch:
        _check_unchanged(directory)
        _work(directory, due, watch, every or USUAL)


def _work(directory: RunDirectory, due: Sequence[str], watch: Watch, every: Every) -> None:
    order = directory.record.stages
    context: Context | None = None
    for stage in due:
        result = directory.result(stage)
        fresh = processes.agreed(result is None)
        if fresh or result is None:
            context = context or _opened(directory, watch, every)
            context.watch.on_stage(stage, order.index(stage) + 1, len(order))
            result = _do(context, stage)
        (context.watch if context else watch).on_result(stage, result, fresh=fresh)


def _opened(directory: RunDirectory, watch: Watch, every: Every) -> Context:
    context = Context.of(directory, watch, every)
    if context.is_main:
        directory.sweep()
    return context


def _check_unchanged(directory: RunDirectory) -> None:
    """Between opening a run and locking it, another may have chosen other blocks."""
    if RunDirectory.open(directory.path).record != directory.record:
        raise InputError(f"{directory.path}: was changed by another run in the meantime; do the command again")


def _do(context: Context, stage: str) -> dict[str, Any]:
    """One stage, in all processes; only the first writes."""
    if context.is_main:
        context.run.begin(stage)
    processes.wait()
    if stage not in _ALONE:
        result = _WORK[stage](context)
    elif context.is_main:
        with processes.alone():
            result = _WORK[stage](context)
    if context.is_main:
        context.run.finish(stage, {**result, "processes": processes.count()})
    processes.wait()
    processes.until_seen(context.run.file(stage, "result.json"))
    found = context.run.result(stage)
    assert found is not None
    return found


def _check_order(directory: RunDirectory, order: Sequence[str], due: Sequence[str]) -> None:
    """Every stage before the first that is due must be finished."""
    for stage in order[: order.index(due[0])]:
        if directory.result(stage) is None:
            alone = f"run `{program()} {_COMMANDS.get(stage)} {directory.path}`"
            todo = alone if stage in _COMMANDS else "the command that began the run goes on with it"
            raise InputError(f"{directory.path}: the stage {stage} comes first and is not finished: {todo}")
