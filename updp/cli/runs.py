"""Commands that make and continue runs: ``run``, the stages alone, and ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from updp.cli.console import FIRST, guarded, line, out
from updp.cli.progress import ConsoleWatch
from updp.cli.summary import show_header, show_summary
from updp.errors import InputError, UpdpError, suggest
from updp.pipeline import SEARCHED, STAGES

if TYPE_CHECKING:
    from updp.pipeline import RunDirectory
    from updp.train import Every

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a run.")]
Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A shipped spec (see `updp list`) or a .yaml file.")]
Data = Annotated[str, typer.Option(metavar="D", help="digits, folder:PATH, npz:PATH, or a name of timm's datasets.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The run's directory: new, empty, or this run's.")]
Prune = Annotated[int | None, typer.Option(metavar="K", help="How many blocks to prune.")]
Recipe = Annotated[str | None, typer.Option(metavar="R", help="Prune under this recipe, not each block's first.")]
WEIGHTS = "Trained weights of the network, a file (safetensors or a state dict), or package: those that an installed \
package carries (see `updp list`)"
Weights = Annotated[str | None, typer.Option(metavar="W", help=f"{WEIGHTS}; they take baseline's place.")]
Subnet = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="Which blocks to prune, in place of supernet and search: see `updp list`."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. finetune.epochs=3. Repeatable."),
]
Until = Annotated[str, typer.Option(metavar="STAGE", help=f"Stop after this stage: {', '.join(SEARCHED)}.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Of all that is random; the spec's if left out.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; torch's choice if left out.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu or cuda; auto if left out.")]
Precision = Annotated[str | None, typer.Option(metavar="P", help="no (float32) or bf16; no if left out.")]
SaveEvery = Annotated[
    str | None,
    typer.Option(metavar="TIME|STEPS", help="Keep a training's state so often: 90s, 10m, 2h or 500; 5m if left out."),
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write losses and accuracies for TensorBoard, to DIR/tensorboard.")
]
CALIBRATED = "calibrated"
Init = Annotated[
    str | None,
    typer.Option(
        metavar="calibrated|DIR",
        help="Start the pruned blocks from operators solved for from images: now, or by `updp calibrate` in DIR.",
    ),
]

CONTINUE = "Finished stages are kept. The same command goes on from there:"


@guarded(again=CONTINUE)
def run(
    spec: Spec,
    data: Data,
    out_dir: Out,
    prune: Prune = None,
    recipe: Recipe = None,
    weights: Weights = None,
    subnet: Subnet = None,
    settings: Settings = None,
    until: Until = SEARCHED[-1],
    seed: Seed = None,
    threads: Threads = None,
    device: Device = None,
    precision: Precision = None,
    init: Init = None,
    save_every: SaveEvery = None,
    tensorboard: TensorBoard = False,
) -> None:
    """Train a network, prune K of its blocks, train on, merge, and measure what was gained.

    The stages are baseline, supernet, search, finetune and merge. With a subnet
    there is no supernet and no search; with --init calibrated, damage and
    calibrate take their place. The same command goes on where it was stopped.
    """
    from updp.pipeline import Calibration
    from updp.pipeline.prepare import Request, prepare
    from updp.processes import together

    check_extras(tensorboard)
    calibration = Calibration(finetune=True) if init == CALIBRATED else None
    stages = stages_until(until, STAGES if init else SEARCHED)
    every, watch = how_often(save_every), ConsoleWatch(out)
    changes = tuple(settings or ())
    request = Request(
        spec, data, out_dir, prune, recipe, weights, subnet, changes, seed, threads, device, precision, calibration,
        None if init is None or calibration else Path(init),
    )  # fmt: skip
    with together():
        do(prepare(request, watch), stages, watch, every, tensorboard=tensorboard)


def check_extras(tensorboard: bool) -> None:
    """Before any work: that what an option needs is installed.

    Raises:
        InputError: it is not.
    """
    if tensorboard:
        from updp.pipeline.scalars import check_tensorboard

        check_tensorboard()


def how_often(text: str | None) -> Every | None:
    """How often the state of a training is kept.

    Raises:
        InputError: a text that does not say so.
    """
    from updp.train import Every

    try:
        return None if text is None else Every.parse(text)
    except InputError as error:
        raise InputError(f"--save-every: {error}") from None


def stages_until(last: str, stages: Sequence[str]) -> Sequence[str]:
    """The stages up to the one where a command stops.

    Raises:
        InputError: there is no such stage.
    """
    if last not in stages:
        raise InputError(f"--until: {suggest(last, stages)}")
    return stages[: stages.index(last) + 1]


@guarded(again=CONTINUE)
def train(directory: Directory, save_every: SaveEvery = None, tensorboard: TensorBoard = False) -> None:
    """Do the stages baseline and supernet of a run: all that a search needs.

    `updp run … --until baseline` makes a run that stops early.
    """
    _stage(directory, ("baseline", "supernet"), save_every, tensorboard)


@guarded(again=CONTINUE)
def search(directory: Directory) -> None:
    """Do the stage search of a run: find the blocks that are best pruned."""
    _stage(directory, ("search",))


@guarded(again=CONTINUE)
def finetune(directory: Directory, save_every: SaveEvery = None, tensorboard: TensorBoard = False) -> None:
    """Do the stage finetune of a run: train from the baseline's blocks to the pruned ones."""
    _stage(directory, ("finetune",), save_every, tensorboard)


@guarded()
def report(directory: Directory) -> None:
    """Write the page that shows a run, finished or not.

    It is one file, needs no network, and opens in every browser.
    """
    from updp.report import report

    line(out, str(report(directory)))


@guarded(again=CONTINUE)
def merge_run(directory: Path) -> None:
    """Do the stage merge of a run."""
    _stage(directory, ("merge",))


def _stage(directory: Path, stages: Sequence[str], save_every: str | None = None, tensorboard: bool = False) -> None:
    from updp.pipeline import RunDirectory
    from updp.processes import together

    check_extras(tensorboard)
    every = how_often(save_every)
    with together():
        do(RunDirectory.open(directory), stages, ConsoleWatch(out), every, tensorboard=tensorboard)


def do(
    directory: RunDirectory, stages: Sequence[str], watch: ConsoleWatch, every: Every | None = None,
    *, quiet: bool = False, tensorboard: bool = False,
) -> None:  # fmt: skip
    """Do stages of a run, write its page, and say what it came to."""
    from updp.pipeline.run import run as run_stages
    from updp.pipeline.scalars import with_scalars

    if not quiet:
        show_header(directory)
    with with_scalars(directory.path, watch) if tensorboard else nullcontext(watch) as told:
        run_stages(directory, stages, told, every)
    if FIRST:
        _report(directory, watch)
    if not quiet:
        show_summary(directory)


def _report(directory: RunDirectory, watch: ConsoleWatch) -> None:
    """Bring the page up to date. A run is worth no less without its page."""
    from updp.report import report

    try:
        report(directory.path)
    except UpdpError as error:
        watch.on_note(f"no report: {error}")
