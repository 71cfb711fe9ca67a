"""The command ``calibrate``: a pretrained network pruned from images without labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from updp.cli.console import duration, err, guarded, line, out, print_json, quantity, table
from updp.cli.networks import Json, Settings, Spec
from updp.cli.progress import ConsoleWatch
from updp.cli.runs import WEIGHTS
from updp.errors import InputError
from updp.pipeline.program import program

if TYPE_CHECKING:
    from updp.pipeline.calibrating import Calibrated


def parse_budget(text: str | None) -> float | None:
    """``macs=0.8x`` as 0.8."""
    if text is None:
        return None
    what, equals, value = text.partition("=")
    try:
        if what.strip() != "macs" or not equals:
            raise ValueError
        return float(value.strip().removesuffix("x"))
    except ValueError:
        raise InputError(f"--budget: got {text!r}, allowed: macs=PARTx, such as macs=0.8x") from None


@guarded(again="A table of damages that is finished is kept. The same command goes on from there:")
def calibrate(
    spec: Spec,
    weights: Annotated[str, typer.Option(metavar="W", help=f"{WEIGHTS}.")],
    data: Annotated[
        str, typer.Option(metavar="IMAGES", help="folder:PATH (no labels needed), npz:PATH, digits, or a timm name.")
    ],
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, or that of this calibration.")],
    prune: Annotated[int | None, typer.Option(metavar="K", help="How many blocks to prune.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="macs=Px", help="At most this part of the operations, e.g. macs=0.8x.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="R", help="Only this recipe; all if left out.")] = None,
    images: Annotated[int, typer.Option(metavar="N", min=10, help="Images to use; a fifth judges.")] = 1000,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what is drawn at random.")] = 0,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads.")] = None,
    json: Json = False,
) -> None:
    """Prune a pretrained network in minutes: no training, no labels.

    Each pruned block becomes the one operator that does best what the block did, by least squares on a few hundred
    images. What each block costs is measured first and kept in DIR, so that another K takes only the solving.
    """
    from updp.pipeline.calibrating import CalibrationRequest
    from updp.pipeline.calibrating import calibrate as work
    from updp.pipeline.prepare import choose_device

    macs = parse_budget(budget)
    choose_device("cpu", threads)
    request = CalibrationRequest(spec, weights, data, out_dir, prune, macs, recipe, images, tuple(settings or ()), seed)
    result = work(request, ConsoleWatch(err))
    if json:
        print_json(result.to_json())
    else:
        _show(result)


def _show(result: Calibrated) -> None:
    from updp.pipeline.calibrating import products

    alone = {(row.block, row.recipe): row.damage for row in result.table.rows}
    shown = table("block", "recipe", ">damage alone", ">error", ">samples", ">unknowns")
    for each in result.solved:
        choice = result.subnet.choice(each.block)
        few = "" if each.determined else " !"
        shown.add_row(
            each.block, choice, f"{alone[each.block, choice]:.3f}", f"{each.error:.3f}", f"{each.samples:,}",
            f"{each.unknowns:,}{few}",
        )  # fmt: skip
    out.print(shown)
    if any(not each.determined for each in result.solved):
        line(out, "! fewer samples than unknowns: more images would help; a ridge decides the rest", style="yellow")
    costs = [(count.macs, count.params, count.depth) for count in (result.before, result.after)]
    (macs, params, depth), (less, fewer, shallower) = costs
    text = f"{quantity(macs)} → {quantity(less)} MACs, {quantity(params)} → {quantity(fewer)} parameters"
    line(out, f"depth {depth} → {shallower}, {text}")
    line(out, f"damage of all together: {result.damage:.3f} nats (mean divergence of the answers on unseen images)")
    line(out, "certificate holds", f": worst error {result.certificate.worst:.0e}, in {duration(result.seconds)}",
         style="green")  # fmt: skip
    for file in products(result):
        line(out, str(file))
    line(out, "Next: ", f"{program()} eval {result.path} --data LABELLED", rest="bold")
