"""The command ``calibrate``: a pretrained network pruned from images without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from updp.cli.console import FIRST, err, guarded, out, print_json
from updp.cli.networks import Json, Settings, Spec
from updp.cli.progress import ConsoleWatch
from updp.cli.runs import CONTINUE, WEIGHTS, SaveEvery, TensorBoard, check_extras, do, how_often, stages_until
from updp.errors import InputError


def parse_budget(text: str | None) -> dict[str, float]:
    """``macs=0.8x`` as ``{"macs": 0.8}``; several stand behind each other with commas."""
    budget: dict[str, float] = {}
    for part in [] if text is None else text.split(","):
        what, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            if what not in ("macs", "latency") or not equals or what in budget:
                raise ValueError
            budget[what] = float(value.removesuffix("x"))
        except ValueError:
            allowed = "allowed: macs=PARTx or latency=PARTx, such as latency=0.6x"
            raise InputError(f"--budget: got {text!r}, {allowed}") from None
        if not 0 < budget[what] < 1:
            raise InputError(f"--budget {what}: got {budget[what]:g}, allowed: a part of the baseline's, such as 0.8x")
    return budget


Images: TypeAlias = Annotated[
    str, typer.Option(metavar="IMAGES", help="folder:PATH (no labels needed), npz:PATH, digits, or a timm name.")
]
Budget: TypeAlias = Annotated[
    str | None, typer.Option(metavar="B", help="At most this part of the baseline's cost: macs=0.8x, latency=0.6x.")
]
Until: TypeAlias = Annotated[
    str, typer.Option(metavar="STAGE", help="Stop after this stage: baseline, damage, calibrate, merge.")
]
Candidates: TypeAlias = Annotated[
    int, typer.Option(metavar="N", min=1, help="Sets of blocks to compare; 1: the table alone decides.")
]
Judge: TypeAlias = Annotated[
    str | None, typer.Option(metavar="D", help="Data with labels, only to tell accuracies of.")
]
Precision: TypeAlias = Annotated[
    str | None, typer.Option(metavar="P", help="Of distillation: no (float32), or bf16: faster where the CPU has it.")
]


@guarded(again=CONTINUE)
def calibrate(
    spec: Spec,
    weights: Annotated[str, typer.Option(metavar="W", help=f"{WEIGHTS}.")],
    data: Images,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, or that of this calibration.")],
    prune: Annotated[int | None, typer.Option(metavar="K", help="How many blocks to prune.")] = None,
    budget: Budget = None,
    recipe: Annotated[str | None, typer.Option(metavar="R", help="Only this recipe; all if left out.")] = None,
    images: Annotated[int, typer.Option(metavar="N", min=10, help="Images to use; a fifth judges.")] = 1000,
    candidates: Candidates = 8,
    judge: Judge = None,
    settings: Settings = None,
    until: Until = "merge",
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of what is drawn at random.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads.")] = None,
    precision: Precision = None,
    save_every: SaveEvery = None,
    tensorboard: TensorBoard = False,
    json: Json = False,
) -> None:
    """Prune a pretrained network in minutes: no training, no labels.

    Each pruned block becomes the one operator that does best what the block
    did, by least squares on a few hundred images; then all weights are
    distilled for some steps. What each block costs is measured first and kept
    in DIR: another K or budget takes only the rest.
    """
    from updp.pipeline import Calibration
    from updp.pipeline.prepare import Request, prepare
    from updp.processes import together

    check_extras(tensorboard)
    cost = parse_budget(budget)
    stages = stages_until(until, ("baseline", "damage", "calibrate", "merge"))
    asked = Calibration(images, cost.get("macs"), cost.get("latency"), candidates, judge)
    every, watch = how_often(save_every), ConsoleWatch(err if json else out)
    request = Request(
        spec, data, out_dir, prune, recipe, weights, None, tuple(settings or ()), seed, threads, "cpu", precision, asked
    )
    with together():
        directory = prepare(request, watch)
        do(directory, stages, watch, every, quiet=json, tensorboard=tensorboard)
    if json and FIRST:
        print_json({stage: directory.result(stage) for stage in stages})
