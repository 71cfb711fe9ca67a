"""Commands on a spec or a saved network: ``check``, ``count``, ``eval``, ``merge``, ``verify``, ``export``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from updp.cli.console import err, guarded, line, out, percent, print_json, quantity, show_error, table
from updp.cli.progress import ConsoleWatch
from updp.cli.runs import WEIGHTS, merge_run
from updp.errors import CertificateError, InputError, UpdpError
from updp.pipeline.program import program

if TYPE_CHECKING:
    from updp.artefact import Verification
    from updp.conformance import CheckReport
    from updp.oracle import Count

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Spec = Annotated[
    str, typer.Argument(metavar="SPEC", help="A shipped spec (see `updp list`) or the path of a .yaml file.")
]
Size = Annotated[str | None, typer.Option(metavar="S", help="Image size, 224 or 192x256; the spec's own if left out.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the spec, e.g. model.pad_type=same."),
]
Weights = Annotated[str | None, typer.Option(metavar="W", help=f"{WEIGHTS}.")]
Subnet = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="A shipped subnet (see `updp list`) or a file; without it all is kept."),
]
Network = Annotated[Path, typer.Argument(metavar="PATH", help="A network saved by updp (.safetensors).")]


def parse_size(text: str | None, channels: int) -> tuple[int, int, int] | None:
    """``224`` or ``192x256`` as (channels, height, width)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and 0 < int(part) <= 8192 for part in parts):
        raise InputError(f"--size: got {text!r}, allowed: a number such as 224, or HEIGHTxWIDTH such as 192x256")
    return channels, int(parts[0]), int(parts[-1])


@guarded()
def evaluate(
    network: Annotated[str, typer.Argument(metavar="PATH|SPEC", help="A saved network (.safetensors), or a spec.")],
    data: Annotated[
        str, typer.Option(metavar="D", help="digits, folder:PATH, npz:PATH, or a name of timm's datasets.")
    ],
    weights: Weights = None,
    settings: Settings = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads.")] = None,
    json: Json = False,
) -> None:
    """Score a network on the validation images of a data set.

    Images are prepared as timm says for the network; --set data.mean, data.std, data.interpolation and data.crop_pct
    change that, --set model.pad_type=same and the like change the network.
    """
    from updp.pipeline.prepare import choose_device
    from updp.pipeline.single import judge

    found = judge(network, data, weights, settings or [], choose_device(device, threads), ConsoleWatch(err))
    score, about = found.score, found.data.describe()
    if json:
        print_json({"network": network, "weights": found.weights, **dataclasses.asdict(score), "data": about})
        return
    shown = table("network", "weights", ">top-1", ">top-5", ">loss", ">images")
    values = (percent(score.top1), percent(score.top5), f"{score.loss:.4f}", f"{score.images:,}")
    shown.add_row(network, found.weights, *values)
    out.print(shown)
    size = "x".join(map(str, about["input"][1:]))
    mean, std = (", ".join(f"{value:.4g}" for value in about[key]) for key in ("mean", "std"))
    prepared = f"{size}, {about['interpolation']}, crop {about['crop_pct']:g}, mean {mean}, std {std}"
    line(out, f"{about['name']}: {prepared}", style="dim")
    if found.weights == "random":
        line(err, "The weights are random: give trained ones with --weights.", style="yellow")


@guarded()
def merge(
    target: Annotated[str, typer.Argument(metavar="DIR|SPEC", help="The directory of a run, or a spec.")],
    subnet: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Which blocks to prune (with a spec): see `updp list`.")
    ] = None,
    weights: Weights = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", metavar="NET.safetensors", help="Where to (with a spec).")
    ] = None,
    settings: Settings = None,
) -> None:
    """Do the stage merge of a run; or merge a spec's network as a subnet says, without training.

    A subnet file: {"version": 1, "spec": "SPEC", "choices": {"BLOCK": "RECIPE", …}}; other blocks are kept.
    """
    if Path(target).is_dir():
        if subnet or weights or out_path or settings:
            raise InputError(f"{target} is a run, which knows its subnet, weights and settings; allowed: no options")
        merge_run(Path(target))
        return
    if subnet is None or out_path is None:
        missing = " and ".join(name for name, value in (("--subnet", subnet), ("--out", out_path)) if value is None)
        raise InputError(f"merging a spec needs {missing}; merging a run needs its directory, which {target} is not")
    from updp.pipeline.single import merge_spec, products

    with ConsoleWatch(err).task("merge", None):
        merged = merge_spec(target, subnet, weights, out_path, settings or [])
    if weights is None:
        line(
            out, "The weights are random (no --weights): good for checks and latency, not for accuracy.", style="yellow"
        )
    found = merged.certificate
    line(out, "certificate holds", f": {len(found.ops)} merged operators, worst error {found.worst:.0e}", style="green")
    for file in products(merged):
        line(out, str(file))
    line(out, "Next: ", f"{program()} verify {out_path}", rest="bold")


@guarded()
def count(
    spec: Spec,
    subnet: Subnet = None,
    bn_weight: Annotated[int, typer.Option(min=0, metavar="N", help="Operations to count per output element of each \
batch norm that is left; papers use 0, 1, 2 or 5.")] = 0,
    size: Size = None,
    settings: Settings = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Count multiply-accumulates, parameters and depth of a network, merged where a subnet prunes it."""
    from updp.pipeline.settings import resolve
    from updp.spec import load_spec
    from updp.subnet import SubnetConfig, find_subnet

    arch = resolve(load_spec(spec), settings or [])
    file = None if subnet is None else find_subnet(subnet, arch.name)
    config = None if file is None else SubnetConfig.load(file)
    given = parse_size(size, arch.input[0])
    from updp import oracle, supernet  # slow to import: bad input is answered before

    if config is None:
        result = oracle.count_subnet(arch, size=given, bn_weight=bn_weight)
    else:
        network = supernet.build_supernet(arch, resized=True, size=given or arch.input)
        config.check(arch.name, network.recipes, file)
        network.set_subnet(config)
        result = oracle.count_supernet(network, given, bn_weight=bn_weight)
    if json:
        print_json(result.to_json())
    else:
        _show_count(arch.name, result)


def _show_count(name: str, result: Count) -> None:
    shown = table("block", "choice", ">MACs", ">params", ">depth")
    for block in result.blocks:
        style = None if block.choice == "keep" else "green"
        shown.add_row(
            block.name,
            block.choice,
            quantity(block.macs),
            quantity(block.params),
            str(block.depth),
            style=style,
        )
    shown.add_section()
    shown.add_row(name, "", quantity(result.macs, 5), quantity(result.params, 4), str(result.depth), style="bold")
    out.print(shown)
    if result.repair_macs:
        repair = f"of these {quantity(result.repair_macs)} repair the border; DepthShrinker's figures leave that out"
        line(out, repair, style="dim")


@guarded()
def check(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC...", help="Shipped specs or .yaml files.")],
    size: Size = None,
    json: Json = False,
) -> None:
    """Check specs: the file, that each structure computes what the network computes, and every merge.

    At the spec's own size and at an odd one where the network takes it; --size checks one size only.
    """
    from updp.conformance import check_spec, odd_size
    from updp.spec import load_spec

    reports, failed = [], []
    watch = ConsoleWatch(err)
    with watch.task("check", len(specs)) as advance:
        for number, name in enumerate(specs, 1):
            try:
                spec = load_spec(name)
                given = parse_size(size, spec.input[0])
                reports.append(check_spec(spec, size=given))
                if given is None and (odd := odd_size(spec)) is not None:
                    reports.append(check_spec(spec, size=odd))
            except UpdpError as error:
                failed.append((name, error))
            advance(number)
    if json:
        errors = [{"spec": name, "error": str(problem)} for name, problem in failed]
        print_json({"ok": not failed, "specs": [report.to_json() for report in reports], "failed": errors})
    elif reports:
        _show_checks(reports)
    for _, problem in failed:
        show_error(problem)
    if failed:
        raise typer.Exit(max(problem.exit_status for _, problem in failed))


def _show_checks(reports: Sequence[CheckReport]) -> None:
    """A row for each recipe of each spec, summed over its blocks."""
    shown = table("spec", ">input", "recipe", ">blocks", ">depth", ">MACs", ">worst error", "")
    for report in reports:
        for recipe in dict.fromkeys(row.recipe for row in report.recipes):
            rows = [row for row in report.recipes if row.recipe == recipe]
            depth, macs = (
                [sum(getattr(row, what)[i] * row.blocks for row in rows) for i in (0, 1)] for what in ("depth", "macs")
            )
            cost = Text(f"{quantity(macs[0])} → {quantity(macs[1])}", "yellow" if macs[1] > macs[0] else "")
            shown.add_row(
                report.spec, "x".join(map(str, report.input[1:])), recipe, str(sum(row.blocks for row in rows)),
                f"{depth[0]} → {depth[1]}", cost, f"{max(row.worst for row in rows):.0e}", Text("exact", "green"),
            )  # fmt: skip
    out.print(shown)
    structures = max(report.conformance for report in reports)
    line(out, f"structures equal the networks' own blocks (largest difference {structures:.0e})", style="dim")
    if any(row.dearer for report in reports for row in report.recipes):
        line(
            out,
            "yellow: merged blocks cost more multiply-accumulates than they had; depth is what is saved",
            style="dim",
        )


@guarded()
def verify(
    path: Network,
    without_source: Annotated[
        bool, typer.Option("--without-source", help="Do without NAME.source.safetensors: check spec and subnet alone.")
    ] = False,
    json: Json = False,
) -> None:
    """Prove again that a merged network equals what it was merged from: NAME.source.safetensors, beside it."""
    from updp import artefact

    with ConsoleWatch(err).task("verify", None):
        result = artefact.verify(path, without_source=without_source)
    if json:
        print_json(result.to_json())
    else:
        _show_verification(path, result)
    if not result.ok:
        raise CertificateError(f"{path}: not the network that it was merged from")


def _show_verification(path: Path, result: Verification) -> None:
    from updp.certificate import BOUND

    shown = table("certificate", ">worst operator", ">logits", ">bound", "")
    for title, found in (("random weights", result.random), ("its own weights", result.given)):
        if found is not None:
            verdict = "[green]holds[/]" if found.ok else "[red]FAILS[/]"
            alone = f" (rounding alone: {found.rounding:.0e})" if found.logits_bound > BOUND else ""
            shown.add_row(title, f"{found.worst:.1e}", f"{found.logits:.1e}{alone}", f"{BOUND:.0e}", verdict)
    if result.stored is not None:
        verdict = "[green]holds[/]" if result.stored <= (result.stored_bound or 0) else "[red]FAILS[/]"
        shown.add_row("saved tensors", f"{result.stored:.1e}", "", f"{result.stored_bound:.1e}", verdict)
    line(out, str(path), style="bold")
    out.print(shown)
    if result.reason:
        line(out, result.reason, style="yellow")
    for found in (result.random, result.given):
        for failure in [] if found is None else found.failures()[:10]:
            line(out, f"  {failure}", style="red")


@guarded()
def export(
    path: Network,
    format: Annotated[str, typer.Option("--format", help="onnx or torch-export.")] = "onnx",
    out_path: Annotated[Path | None, typer.Option("--out", help="Where to; beside PATH if left out.")] = None,
) -> None:
    """Write a merged network for other runtimes: no custom operators, any batch size."""
    from updp.exporting import export

    with ConsoleWatch(err).task("export", None):
        written = export(path, format=format, out=out_path)  # type: ignore[arg-type]  # it checks the name itself
    line(out, str(written.path))
    if written.error is not None:
        line(out, f"checked at batch 1 and 3: largest relative difference {written.error:.0e}", style="dim")
    if written.note:
        line(out, written.note, style="yellow")
