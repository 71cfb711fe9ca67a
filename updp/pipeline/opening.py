"""What a calibration is given, checked before anything is written: images, labels to judge by, a budget."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

from torch import nn

from updp.calibrate import Damage, DamageTable, choose, rank
from updp.calibrate.costs import Costs
from updp.calibrate.damage import pairs_in
from updp.data import Data, ImageSet
from updp.errors import InputError
from updp.files import sha256
from updp.pipeline.context import absolute, judges, open_for
from updp.pipeline.directory import Calibration, RunDirectory
from updp.pipeline.program import program
from updp.spec import ArchSpec
from updp.subnet import SubnetConfig
from updp.supernet import Supernet

LEAST_IMAGES = 10


def with_judge(asked: Calibration, spec: ArchSpec, data: Data, model: nn.Module) -> Calibration:
    """The calibration with the labelled data that accuracies are told of: what is asked for, or the images' own labels.

    Args:
        data: the images to calibrate on.
        model: with the network's own classes.

    Raises:
        InputError: the data that is asked for is not there, or has no labels, or none of this network.
    """
    own = absolute(data.source.name)
    if asked.judge is not None and absolute(asked.judge) != own:
        judged = open_for(spec, asked.judge, model)
        judged.val()
        judged.check_classes(int(model.num_classes))  # type: ignore[arg-type]
        return replace(asked, judge=absolute(asked.judge))
    if judges(data) and _fits(data, model):
        return replace(asked, judge=own)
    if asked.judge is not None:
        raise InputError(f"--judge: {asked.judge} has no labelled images apart from those to calibrate on")
    return asked


def _fits(data: Data, model: nn.Module) -> bool:
    """Whether labels are the network's classes; images are calibrated on whatever they are of."""
    try:
        data.check_classes(int(model.num_classes))  # type: ignore[arg-type]
    except InputError:
        return False
    return True


def check_enough(data: Data, asked: Calibration, seed: int) -> ImageSet:
    """The images that a calibration uses.

    Raises:
        InputError: there are too few.
    """
    images = data.any_images(asked.images, seed)
    if len(images) < LEAST_IMAGES:
        raise InputError(f"data {data.source.name!r}: {len(images)} images, allowed: at least {LEAST_IMAGES}")
    return images


def check_prunable(prune: int | None, recipe: str | None, asked: Calibration, supernet: Supernet) -> int | None:
    """How many blocks are pruned, where that is said.

    Raises:
        InputError: no block can be pruned so, or not so many; or neither a number nor a budget is given.
    """
    try:
        blocks = len({block for block, _ in pairs_in(supernet, recipe)})
    except InputError as error:
        raise InputError(f"--recipe: {error}" if supernet.available else str(error)) from None
    if prune is None and asked.finetune:
        raise InputError("--prune: say how many blocks to prune")
    if prune is None and asked.macs is None and asked.latency is None:
        raise InputError("--prune or --budget: say how many blocks to prune, or what the network may cost")
    if prune is not None and not 1 <= prune <= blocks:
        where = f"{supernet.spec.name} has {blocks} prunable blocks{f' under {recipe}' if recipe else ''}"
        raise InputError(f"--prune: got {prune}, allowed: 1 to {blocks} ({where})")
    return prune


def candidates(run: RunDirectory, count: int, latency: float | None = None) -> list[SubnetConfig]:
    """Sets of blocks that a calibration may prune, the best going by what each block costs alone first.

    Args:
        latency: in place of the run's own budget.

    Raises:
        InputError: no choice of blocks keeps to the budget.
    """
    calibration = run.record.calibration
    assert calibration is not None
    table = DamageTable.load(run.file("damage", "table.json"))
    latency = calibration.latency if latency is None else latency
    return rank(table, count, prune=run.record.prune, macs=calibration.macs, latency=latency)


def check_reachable(run: RunDirectory, costs: Costs) -> None:
    """Before anything is solved: that some choice of blocks keeps to the budget.

    Raises:
        InputError: none does; the message says what can be reached.
    """
    calibration = run.record.calibration
    assert calibration is not None
    rows = tuple(
        Damage(**dataclasses.asdict(cost), damage=0.0, error=0.0, samples=1, unknowns=1) for cost in costs.rows
    )
    table = DamageTable(run.record.spec, costs.macs, 0, rows, costs.latency)
    choose(table, prune=run.record.prune, macs=calibration.macs, latency=calibration.latency)


# --- to start from a calibration --------------------------------------------------------------------------------------


def open_init(path: Path, spec: ArchSpec) -> RunDirectory:
    """A calibration to start training from.

    Raises:
        InputError: it is none, not finished, or another network's.
    """
    try:
        run = RunDirectory.open(path)
        finished = run.result("calibrate") is not None
    except InputError as error:
        raise InputError([dataclasses.replace(problem, where="--init") for problem in error.problems]) from None
    if run.record.calibration is None:
        raise InputError(
            f"--init: {path} is a run without calibrated blocks; allowed: what `{program()} calibrate` made"
        )
    if not finished:
        raise InputError(f"--init: {path} is not finished: the command that began it goes on with it")
    if run.record.spec != spec.name:
        raise InputError(f"--init: {path} is of {run.record.spec}, not of {spec.name}")
    if run.record.spec_hash != spec.hash:
        wanted = "the same spec, and the same --set of model, data and input"
        raise InputError(f"--init: {path} is of {spec.name} under other settings; allowed: {wanted}")
    return run


def init_record(path: Path | None) -> dict[str, str] | None:
    """What ``run.json`` says of the calibration that a run starts from."""
    if path is None:
        return None
    return {"directory": str(path.absolute()), "sha256": sha256(path / "calibrate" / "weights.safetensors")}
