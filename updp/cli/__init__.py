"""The ``updp`` command. Each command's work is elsewhere; here are options, tables and exit statuses.

0: done; 1: the work itself failed; 2: bad input; 130: interrupted; 143: ended by SIGTERM, as schedulers send it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from updp import __version__
from updp.cli import about, bench, calibration, deploying, networks, runs, status, tables
from updp.cli.modules import with_modules
from updp.errors import UpdpError
from updp.pipeline.program import remember
from updp.spec import list_specs

app = typer.Typer(
    name="updp",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"updp {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make vision networks shallower: prune blocks, train, merge exactly into dense layers.

    Begin with [bold]updp list[/bold] and [bold]updp run --help[/bold].
    """


_RUNS, _NETWORKS, _ABOUT = "Runs", "Specs and saved networks", "What there is"
_COMMANDS: dict[str, dict[str, tuple[Callable[..., None], str]]] = {
    _RUNS: {
        "run": (runs.run, "updp run {spec} --data digits --prune 4 --out runs/first"),
        "train": (runs.train, "updp train runs/first"),
        "search": (runs.search, "updp search runs/first"),
        "finetune": (runs.finetune, "updp finetune runs/first"),
        "calibrate": (
            calibration.calibrate,
            "updp calibrate {spec} --weights W --data folder:IMAGES --prune 4 --out calibrated",
        ),
        "merge": (networks.merge, "updp merge {spec} --subnet subnet.json --out net.safetensors"),
        "status": (status.status, "updp status runs/first"),
        "report": (runs.report, "updp report runs/first"),
    },
    _NETWORKS: {
        "eval": (networks.evaluate, "updp eval runs/first/merge/merged.safetensors --data digits"),
        "check": (networks.check, "updp check {spec} my_network.yaml"),
        "count": (networks.count, "updp count {spec} --subnet runs/first/search/subnet.json"),
        "verify": (networks.verify, "updp verify runs/first/merge/merged.safetensors"),
        "deploy": (deploying.deploy, "updp deploy runs/first/merge/merged.safetensors --threads 1"),
        "export": (networks.export, "updp export runs/first/merge/merged.safetensors --format torch-export"),
        "bench": (bench.bench, "updp bench {spec} --subnet all:full --batch 1,8"),
    },
    _ABOUT: {
        "list": (about.list_specs, "updp list"),
        "tables": (tables.tables, "updp tables depthshrinker --table 2"),
        "info": (about.info, "updp info --json"),
    },
}


_READERS = (runs.report, status.status)  # build no network


def _small_spec() -> str:
    """A shipped spec that trains anywhere, for examples."""
    try:
        names = list_specs()
    except UpdpError:  # an installation without specs: the command itself will say so
        names = []
    return next((name for name in names if name.endswith("_digits")), "SPEC")


def _register() -> None:
    spec = _small_spec()
    for panel, commands in _COMMANDS.items():
        for name, (command, example) in commands.items():
            epilog = f"Example: [bold]{example.format(spec=spec)}[/bold]"
            whole = command if panel == _ABOUT or command in _READERS else with_modules(command)
            app.command(name, rich_help_panel=panel, epilog=epilog)(whole)


_register()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends with `SystemExit`."""
    remember(arguments)
    app(args=None if arguments is None else list(arguments), prog_name="updp")
