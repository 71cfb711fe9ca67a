"""What a calibration is given, checked before anything is written: images, labels to judge by, a budget."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from updp.calibrate import DamageTable, choose
from updp.data import Data, ImageSet
from updp.errors import InputError
from updp.pipeline.context import absolute, judges, open_for
from updp.pipeline.directory import Calibration, RunDirectory
from updp.spec import ArchSpec
from updp.subnet import SubnetConfig

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


def check_budget(asked: Calibration | None) -> None:
    """A run that says no number of blocks must have a budget.

    Raises:
        InputError: it has none, or one that is no part of the baseline's cost.
    """
    if asked is None:
        raise InputError("--prune: say how many blocks to prune, or give a --subnet")
    if asked.macs is None and asked.latency is None:
        raise InputError("--prune or --budget: say how many blocks to prune, or what the network may cost")


def choice(run: RunDirectory) -> SubnetConfig:
    """The blocks that a calibration prunes, going by what each costs alone.

    Raises:
        InputError: no choice of blocks keeps to the budget.
    """
    calibration = run.record.calibration
    assert calibration is not None
    table = DamageTable.load(run.file("damage", "table.json"))
    return choose(table, prune=run.record.prune, macs=calibration.macs)
