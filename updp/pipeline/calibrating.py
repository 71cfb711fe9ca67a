"""The stages ``damage`` and ``calibrate``: what each block costs alone; which are pruned, and what they become.

Neither needs labels: what a network's answers are worth is how far they are from the baseline's.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from updp import __version__, processes
from updp.calibrate import (
    Solved,
    SolveSettings,
    Verified,
    latency_part,
    measure_damage,
    network_damage,
    solve_subnet,
    verify,
)
from updp.calibrate.costs import Costs, measure_costs
from updp.calibrate.damage import Keep, most_unknowns, pairs_in, peak_memory, work
from updp.calibrate.memory import trail_bytes
from updp.data import ImageSet, loader
from updp.errors import InputError
from updp.files import read_json, sha256
from updp.pipeline.context import Context, workers_for
from updp.pipeline.directory import Calibration, write_json
from updp.pipeline.distilling import distill
from updp.pipeline.opening import candidates, check_reachable
from updp.subnet import SubnetConfig
from updp.supernet import Supernet

_BATCH = 50
FASTER = torch.channels_last
"""On a CPU, convolutions of maps whose channels are last take half the time or less."""
_SOLVED_ON = 0.8  # of the images; the others only judge
_KEPT = 1 << 30  # bytes of images that are kept in memory, where they are passed through again and again
_ROUNDS = 3  # of looking for networks within a budget of measured time
_COMPARED_ON = 120  # images that candidates are solved on


class Batches:
    """Images, batch by batch: read anew each time, unless they are ``kept`` in memory."""

    def __init__(self, context: Context, images: ImageSet, *, kept: bool = False) -> None:
        self.context, self.images = context, images
        self.kept: list[Tensor] | None = [] if kept else None

    def __len__(self) -> int:
        return math.ceil(len(self.images) / _BATCH)

    @property
    def bytes(self) -> int:
        """Memory that the images take."""
        held = _BATCH if self.kept is None else len(self.images)
        return 4 * math.prod(self.context.spec.input) * held

    def __call__(self) -> Iterator[Tensor]:
        if self.kept:
            yield from self.kept
            return
        batches = []
        for batch, _ in loader(self.images, _BATCH, train=False, workers=workers_for(self.context.spec)):
            batch = batch.to(self.context.accelerator.device, memory_format=FASTER)
            if self.kept is not None:
                batches.append(batch)
            yield batch
        self.kept = batches if self.kept is not None else None


@dataclasses.dataclass(frozen=True)
class Task:
    """What both stages work with: images to solve on, and others that judge."""

    calibration: Calibration
    images: Batches
    few: Batches
    judge: Batches
    augmented: ImageSet
    settings: SolveSettings

    @classmethod
    def of(cls, context: Context) -> Task:
        calibration = context.run.record.calibration
        assert calibration is not None
        images = context.data.any_images(calibration.images, context.seed)
        solved_on = round(_SOLVED_ON * len(images))
        judge = Batches(context, images.part(solved_on, len(images)), kept=True)
        few = Batches(context, images.first(min(_COMPARED_ON, solved_on)), kept=True)
        augmented = context.data.any_images(calibration.images, context.seed, context.spec.schedule.distill)
        settings = SolveSettings(seed=context.seed)
        size = 4 * math.prod(context.spec.input) * solved_on
        solve = Batches(context, images.first(solved_on), kept=size <= _KEPT)
        return cls(calibration, solve, few, judge, augmented.first(solved_on), settings)


def damage(context: Context) -> dict[str, Any]:
    """What each block costs when it alone is pruned: the table that blocks are chosen from."""
    start, task, record = time.perf_counter(), Task.of(context), context.run.record
    supernet = context.supernet(resized=True).to(context.accelerator.device).eval()
    keep = Keep(context.run.path / "damage", _identity(context, task), context.is_main)
    _tell(context, supernet, task)
    costs = _costs(context, supernet, keep)
    check_reachable(context.run, costs)
    supernet.to(memory_format=FASTER)
    with context.watch.task("damage", work(supernet, record.recipe)) as advance:
        table = measure_damage(
            supernet, task.images, task.judge, task.settings, recipe=record.recipe, costs=costs, keep=keep,
            progress=advance,
        )  # fmt: skip
    if context.is_main:
        table.save(keep.folder / "table.json")
    return {
        **table.to_json(), "solved_on": len(task.images.images), "judged_on": len(task.judge.images),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _identity(context: Context, task: Task) -> dict[str, Any]:
    """What the damages depend on; the images are the run's own."""
    return {
        "weights": sha256(context.run.file("baseline", "weights.safetensors")), "torch": torch.__version__,
        "updp": __version__, "settings": dataclasses.asdict(task.settings), "batch": _BATCH,
    }  # fmt: skip


def _tell(context: Context, supernet: Supernet, task: Task) -> None:
    """Memory, and whether the images are few."""
    recipe = context.run.record.recipe
    images = task.images.bytes + task.judge.bytes
    taken = images + peak_memory(supernet, _BATCH, task.settings, recipe)
    taken += trail_bytes(supernet, len(task.images.images))
    context.watch.on_note(f"memory: up to {taken / 1e9:.2g} GB beside the network")
    samples, unknowns = len(task.images.images) * task.settings.positions, most_unknowns(supernet, recipe)
    if samples < unknowns:
        context.watch.on_note(
            f"few images: at most {samples:,} samples for up to {unknowns:,} unknowns; a ridge decides the rest, more "
            "images would help"
        )


def _costs(context: Context, supernet: Supernet, keep: Keep) -> Costs:
    """Measured once: going on after an interruption takes the same costs."""
    file, pairs = keep.folder / "costs.json", pairs_in(supernet, context.run.record.recipe)
    if file.is_file():
        data = read_json(file)
        if data.get("identity") == keep.identity:
            return Costs.from_json(data)
    with context.watch.task("costs", len(supernet.available)) as advance:
        costs = measure_costs(supernet, pairs, advance)
    if context.is_main:
        write_json(file, {"identity": keep.identity, **costs.to_json()})
    return costs


def calibrate(context: Context) -> dict[str, Any]:
    """Choose the blocks, and solve for their operators one behind the other."""
    start, task = time.perf_counter(), Task.of(context)
    supernet = context.supernet(resized=True).to(context.accelerator.device).eval()
    supernet.to(memory_format=FASTER)
    found = _solved_by_the_first(context, supernet, task)
    subnet = SubnetConfig(context.spec.name, found["choices"])
    supernet.reduce(subnet)
    supernet.free_baseline()
    distilled = None  # of a network that is to be trained, training is the better use of the time
    if not task.calibration.finetune:
        processes.share_tensors(supernet.state_dict().values())
        distilled = distill(context, supernet, task.augmented, task.judge)
    context.save(supernet.to(memory_format=torch.contiguous_format), "calibrate")
    if context.is_main:
        subnet.save(context.run.file("calibrate", "subnet.json"))
    if distilled is not None and distilled["taken"]:
        found["damage"] = distilled["after"]["damage"]
    return {**found, "distilled": distilled, "seconds": time.perf_counter() - start}


def _solved_by_the_first(context: Context, supernet: Supernet, task: Task) -> dict[str, Any]:
    """What is chosen, and what came of it; the first process's supernet has the operators.

    Others wait: they would only solve the same equations, and disturb what is timed.
    """
    found: dict[str, Any] | None = None
    if context.is_main:
        with processes.alone():
            subnet, solved, verified = prune_network(context, supernet, task)
            moved = network_damage(supernet, subnet, task.judge)
        found = {
            "choices": dict(subnet.choices), "damage": moved, "damage_solved": moved,
            "candidates": [{"choices": dict(each.subnet.choices), "damage": each.damage} for each in verified],
            "solved": [dataclasses.asdict(each) for each in solved],
        }  # fmt: skip
    result: dict[str, Any] = processes.agreed(found)
    return result


def prune_network(
    context: Context, supernet: Supernet, task: Task
) -> tuple[SubnetConfig, list[Solved], list[Verified]]:
    """Choose blocks, and solve for their operators; the supernet is left at the subnet, with these operators."""
    named = _candidates(context, supernet, task.calibration)
    with context.watch.task("candidates", len(named)) as advance:
        verified = verify(supernet, named, task.few, task.judge, task.settings, advance) if len(named) > 1 else []
    subnet = verified[0].subnet if verified else named[0]
    with context.watch.task("calibrate", len(subnet.pruned)) as advance:
        solved = solve_subnet(supernet, subnet, task.images, task.settings, advance)
    if few := [each.block for each in solved if not each.determined]:
        context.watch.on_note(f"fewer samples than unknowns in {', '.join(few)}: a ridge decides the rest")
    return subnet, solved, verified


def _candidates(context: Context, supernet: Supernet, asked: Calibration) -> list[SubnetConfig]:
    """Sets of blocks that are within the budget; as whole networks, where it is of measured time.

    Raises:
        InputError: none is; the message says how near the best comes.
    """
    named = candidates(context.run, asked.candidates)
    if asked.latency is None:
        return named
    parts: list[float] = []
    for _ in range(_ROUNDS):
        with context.watch.task("latency", len(named)) as advance:
            for subnet in named:
                parts.append(latency_part(supernet, subnet))
                advance(len(parts))
        here = parts[-len(named) :]
        if fitting := [subnet for subnet, part in zip(named, here, strict=True) if part <= asked.latency]:
            return fitting
        # The table promises too much by about so much.
        named = candidates(context.run, asked.candidates, asked.latency * asked.latency / min(here))
    raise InputError(f"--budget latency: got {asked.latency:g}x, but the best of {len(parts)} networks takes "
                     f"{min(parts):.3f}x of the baseline's time; allowed: about that")  # fmt: skip
