"""The stages ``damage`` and ``calibrate``: what each block costs alone; which are pruned, and what they become.

Neither needs labels: what a network's answers are worth is how far they are from the baseline's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from updp.calibrate import Solved, SolveSettings, measure_damage, network_damage, solve_subnet
from updp.data import ImageSet, loader
from updp.pipeline.context import Context, workers_for
from updp.pipeline.directory import Calibration
from updp.pipeline.opening import choice
from updp.subnet import SubnetConfig
from updp.supernet import Supernet

_BATCH = 50
_SOLVED_ON = 0.8  # of the images; the others only judge


class Batches:
    """Images, batch by batch: read anew each time, unless they are ``kept`` in memory."""

    def __init__(self, context: Context, images: ImageSet, *, kept: bool = False) -> None:
        self.context, self.images = context, images
        self.kept: list[Tensor] | None = [] if kept else None

    def __call__(self) -> Iterator[Tensor]:
        if self.kept:
            yield from self.kept
            return
        batches = []
        for batch, _ in loader(self.images, _BATCH, train=False, workers=workers_for(self.context.spec)):
            batch = batch.to(self.context.accelerator.device)
            if self.kept is not None:
                batches.append(batch)
            yield batch
        self.kept = batches if self.kept is not None else None


@dataclasses.dataclass(frozen=True)
class Task:
    """What both stages work with: images to solve on, and others that judge."""

    calibration: Calibration
    images: Batches
    judge: Batches
    settings: SolveSettings

    @classmethod
    def of(cls, context: Context) -> Task:
        calibration = context.run.record.calibration
        assert calibration is not None
        images = context.data.any_images(calibration.images, context.seed)
        solved_on = round(_SOLVED_ON * len(images))
        judge = Batches(context, images.part(solved_on, len(images)), kept=True)
        return cls(calibration, Batches(context, images.first(solved_on)), judge, SolveSettings(seed=context.seed))


def damage(context: Context) -> dict[str, Any]:
    """What each block costs when it alone is pruned: the table that blocks are chosen from."""
    start, task, record = time.perf_counter(), Task.of(context), context.run.record
    supernet = context.supernet(resized=True).to(context.accelerator.device).eval()
    pairs = sum(len(recipes) if record.recipe is None else 1 for recipes in supernet.available.values())
    with context.watch.task("damage", pairs) as advance:
        table = measure_damage(
            supernet, task.images, task.judge, task.settings, recipe=record.recipe, progress=advance
        )  # fmt: skip
    if context.is_main:
        table.save(context.run.file("damage", "table.json"))
    return {
        **table.to_json(), "solved_on": len(task.images.images), "judged_on": len(task.judge.images),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def calibrate(context: Context) -> dict[str, Any]:
    """Choose the blocks, and solve for their operators one behind the other."""
    start, task = time.perf_counter(), Task.of(context)
    supernet = context.supernet(resized=True).to(context.accelerator.device).eval()
    subnet, solved = prune_network(context, supernet, task)
    moved = network_damage(supernet, subnet, task.judge)
    supernet.reduce(subnet)
    supernet.free_baseline()
    context.save(supernet, "calibrate")
    if context.is_main:
        subnet.save(context.run.file("calibrate", "subnet.json"))
    return {
        "choices": dict(subnet.choices), "damage": moved, "solved": [dataclasses.asdict(each) for each in solved],
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def prune_network(context: Context, supernet: Supernet, task: Task) -> tuple[SubnetConfig, list[Solved]]:
    """Choose blocks, and solve for their operators; the supernet is left at the subnet, with these operators."""
    subnet = choice(context.run)
    with context.watch.task("calibrate", len(subnet.pruned)) as advance:
        solved = solve_subnet(supernet, subnet, task.images, task.settings, advance)
    return subnet, solved
