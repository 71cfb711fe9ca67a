"""The command ``bench``: networks in every runtime, merged layers in every form, on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from updp.cli.console import err, error_size, line, out, print_json, quantity, table
from updp.cli.networks import Json
from updp.cli.progress import ConsoleWatch
from updp.errors import InputError
from updp.files import check_writable, json_text, write_text

if TYPE_CHECKING:
    from updp.bench.networks import Case
    from updp.bench.runtimes import Runtime

_RUNTIMES = "torch,deployed,compile,onnxruntime,openvino,openvino-bf16,ncnn"
_BUSY = 0.7  # load from which on times are doubtful
_MOST = 1024  # of images in a batch, and of threads
_TABLE_SECONDS, _LAYER_SECONDS, _FOREVER = 20.0, 1.0, 1e5

Networks = Annotated[
    list[str], typer.Argument(metavar="NETWORK...", help="Saved networks (.safetensors), or specs with random weights.")
]
Subnet = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE|all:R",
        help="What to prune of a spec: see `updp list`; all:R is every block by recipe R. Without it nothing is.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Write results there: JSON and a picture of each network.")
]


def bench(
    networks: Networks,
    subnet: Subnet = None,
    batch: Annotated[str, typer.Option(metavar="N,…", help="Images in a batch.")] = "1",
    threads: Annotated[str, typer.Option(metavar="N,…", help="CPU threads of every runtime.")] = "1",
    runtimes: Annotated[str, typer.Option(metavar="R,…", help="Runtimes to compare.")] = _RUNTIMES,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="Roughly, of timing: of each table (20), or with --layers of each layer (1)."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Time the layers of a network: our kernels, torch, and what is possible.")
    ] = False,
    out_dir: Out = None,
    json: Json = False,
) -> None:
    """Time networks, unpruned and merged, in every runtime that is installed: what is faster on this machine.

    All runtimes take turns in one run, with the same threads; medians and quartiles. Before anything is timed, every
    runtime's output is held against torch's: one that computes something else is listed as wrong, without a time.

    With --layers: every different layer of the merged network by itself, beside the machine's own limits.
    """
    batches, numbers = _numbers("--batch", batch), _numbers("--threads", threads)
    if seconds is not None and not 0 <= seconds < _FOREVER:
        raise InputError(f"--seconds: got {seconds:g}, allowed: a number from 0 up")
    if layers and len(batches) * len(numbers) > 1:
        raise InputError("--layers: one batch size and one number of threads at a time")
    if out_dir is not None:
        _make_folder(out_dir)
    from updp.bench.networks import choose_runtimes, opened

    chosen = choose_runtimes([name.strip() for name in runtimes.split(",")])
    measure = _of_layers(batches[0], numbers[0], seconds) if layers else _of(chosen, batches, numbers, seconds)
    results = []
    with ExitStack() as stack:
        cases = [stack.enter_context(opened(name, subnet)) for name in networks]
        _warn(max(numbers))
        for case in cases:
            results.append(measure(case))
            files = [] if out_dir is None else _written(results[-1], out_dir)
            if not json:
                _show(results[-1], files)
    if json:
        print_json(results)


def _warn(threads: int) -> None:
    """Say what makes times doubtful."""
    from updp.bench.networks import available_cpus

    if threads > (cpus := available_cpus()):
        line(err, f"{threads} threads on {cpus} CPUs: they get in each other's way.", style="yellow")
    if (load := os.getloadavg()[0]) > _BUSY:
        told = f"The machine is busy (load {load:.1f}): times are doubtful, those of several threads worthless."
        line(err, told, style="yellow")


def _of(
    runtimes: list[Runtime], batches: list[int], threads: list[int], seconds: float | None
) -> Callable[[Case], dict[str, Any]]:
    from updp.bench.networks import bench as bench_networks

    allowed = _TABLE_SECONDS if seconds is None else seconds
    return lambda case: bench_networks(case, runtimes, batches, threads, allowed, ConsoleWatch(err))


def _of_layers(batch: int, threads: int, seconds: float | None) -> Callable[[Case], dict[str, Any]]:
    from updp.bench.layers import bench_layers

    allowed = _LAYER_SECONDS if seconds is None else seconds
    return lambda case: bench_layers(case, batch, threads, allowed, ConsoleWatch(err))


def _numbers(option: str, text: str) -> list[int]:
    """``1,8`` as [1, 8], each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= _MOST for part in parts):
        raise InputError(f"{option}: got {text!r}, allowed: numbers from 1 to {_MOST} with commas between, such as 1,8")
    return list(dict.fromkeys(map(int, parts)))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot make {folder}: {error.strerror or error}") from None
    check_writable(folder / "result.json")


def _written(result: Mapping[str, Any], folder: Path) -> list[Path]:
    from updp.bench.page import picture

    suffix = ".layers" if result["kind"] == "layers" else ""
    files = [folder / f"{result['network']['name']}{suffix}.{ending}" for ending in ("json", "svg")]
    for file, text in zip(files, (json_text(result), picture(result)), strict=True):
        write_text(file, text)
    return files


# --- what is shown ---


def _show(result: Mapping[str, Any], files: Sequence[Path]) -> None:
    _show_title(result)
    if result["kind"] == "layers":
        _show_layers(result)
    else:
        for each in result["tables"]:
            _show_table(each)
        _show_missing(result)
    env = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in _versions(env).items())
    line(out, f"{env['cpu']}, {env['cpus']} CPUs, {', '.join(env['isa'])}; load {env['load']}", style="dim")
    line(out, versions, style="dim")
    for file in files:
        line(out, str(file))
    line(out, "")


def _show_title(result: Mapping[str, Any]) -> None:
    about = result["network"]
    name = about["spec"] if about["subnet"] is None else f"{about['spec']}, {about['subnet']}"
    size = "x".join(map(str, about["input"]))
    macs = " → ".join(f"{quantity(each, 4)} MACs" for each in about["macs"].values())
    weights = "random weights" if about["weights"] == "random" else about["weights"]
    out.print(Text.assemble((name, "bold"), (f"  {size}, {macs}, {weights}", "dim")))


def _versions(env: Mapping[str, Any]) -> dict[str, str]:
    return {"updp": env["updp"], "python": env["python"], "torch": env["torch"]} | {
        name: version for name, version in env["packages"].items() if name != "torch"
    }


def _show_table(found: Mapping[str, Any]) -> None:
    """One batch size and number of threads: runtimes one below the other, those of other precision last."""
    names = list(dict.fromkeys(row["network"] for row in found["rows"]))
    best = {name: _fastest(found, name) for name in names}
    plural = "s" if found["threads"] > 1 else ""
    rounds = max((row["timing"]["runs"] for row in found["rows"] if row["timing"]), default=0)
    line(out, f"\nbatch {found['batch']}, {found['threads']} thread{plural}", f"  {rounds} runs each", rest="dim")
    times = [title for name in names for title in (f">{name}", "")]
    merging = [">merging"] if len(names) > 1 else []
    shown = table("runtime", *times, *merging, ">best other", ">error")
    by_runtime: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in found["rows"]:
        by_runtime.setdefault(row["runtime"], {})[row["network"]] = row
    ordered = sorted(by_runtime, key=lambda name: _precision(by_runtime[name]) != "float32")
    for runtime in ordered:
        rows = by_runtime[runtime]
        cells: list[str | Text] = [_name(runtime, rows)]
        for name in names:
            cells += _time(rows[name], fastest=best[name] == runtime)
        if merging:
            cells.append(_factor(found["merging"], runtime))
        errors = [row["error"] for row in rows.values() if row["error"] is not None]
        against = [each for each in found["against"] if each["network"] == names[-1]]
        cells += [_factor(against, runtime), error_size(max(errors, default=None))]
        shown.add_row(*cells)
    out.print(Padding(shown, (0, 0, 0, 2), expand=False))
    for row in found["rows"]:
        if row["reason"]:
            text = f"{row['runtime']}, {row['network']}: {row['reason']}"
            line(out, "  ", text, rest="red" if row["status"] == "wrong" else "yellow")


def _precision(rows: Mapping[str, Mapping[str, Any]]) -> str:
    return str(next(iter(rows.values()))["precision"])


def _name(runtime: str, rows: Mapping[str, Mapping[str, Any]]) -> Text:
    other = "" if _precision(rows) == "float32" else f"  {_precision(rows)}"
    return Text.assemble((runtime, "bold" if runtime == "deployed" else ""), (other, "dim"))


def _fastest(found: Mapping[str, Any], network: str) -> str | None:
    """Of float32."""
    timed = [(row["timing"]["median_ms"], row["runtime"]) for row in found["rows"]
             if row["network"] == network and row["timing"] and row["precision"] == "float32"]  # fmt: skip
    return min(timed)[1] if timed else None


def _time(row: Mapping[str, Any], *, fastest: bool) -> list[str | Text]:
    """The median, and the quartiles beside it."""
    if row["timing"] is None:
        return [Text(row["status"], "red" if row["status"] == "wrong" else "yellow"), ""]
    from updp.report.words import milliseconds

    low, high = (milliseconds(row["timing"][key]).removesuffix(" ms") for key in ("low_ms", "high_ms"))
    median = Text(milliseconds(row["timing"]["median_ms"]), "bold green" if fastest else "")
    return [median, Text(f"{low}-{high}", "dim")]


def _factor(found: Sequence[Mapping[str, Any]], runtime: str) -> str:
    ratio = next((each["ratio"] for each in found if each["runtime"] == runtime), None)
    return "–" if ratio is None else f"{ratio:.2f}x"


def _show_missing(result: Mapping[str, Any]) -> None:
    for each in result["missing"]:
        line(out, f"  {each['runtime']}", f"  missing: {each['packages']} ({each['install']})", style="yellow")
    line(out, "\nmerging: how much faster the merged network is in the same runtime. best other: how much faster this "
         "runtime is than the best other one of float32, on the last network. error: the largest difference from "
         "torch, of the largest logit.", style="dim")  # fmt: skip


def _show_layers(result: Mapping[str, Any]) -> None:
    """Every different layer: the best of torch, the best of ours, and what this machine could do."""
    limit, plural = result["roofline"], "s" if result["threads"] > 1 else ""
    line(out, f"\nbatch {result['batch']}, {result['threads']} thread{plural}",
         f"  roofline: {limit['gmacs']:.0f} GMAC/s, {limit['gbytes']:.0f} GB/s from memory", rest="dim")  # fmt: skip
    shown = table("layer", "input", ">times", ">torch", ">updp", "", ">of roofline", ">against torch")
    for layer in result["layers"]:
        native, ratio = layer["native"], layer["against_torch"]
        best = layer["torch"] if native is None or (ratio and ratio["ratio"] < 1) else native
        part = "–" if best is None else f"{100 * best['of_roofline']:.0f} %"
        factor = Text("–" if ratio is None else f"{ratio['ratio']:.2f}x")
        factor.stylize("" if ratio is None else "green" if ratio["ratio"] >= 1 else "yellow")
        form = Text("" if native is None else native["form"], "dim")
        shown.add_row(layer["problem"], layer["input"], str(layer["count"]), _speed(layer["torch"]), _speed(native),
                      form, part, factor)  # fmt: skip
    out.print(Padding(shown, (0, 0, 0, 2), expand=False))
    for layer in result["layers"]:
        for row in layer["forms"]:
            if row["reason"]:
                text = f"{layer['problem']} on {layer['input']}, {row['form']}: {row['reason']}"
                line(out, "  ", text, rest="red" if row["status"] == "wrong" else "yellow")
    line(out, "\ntorch, updp: GMAC/s of the fastest form of each. of roofline: of the faster of both; Winograd's "
         "algorithms need fewer products than they are counted with, and may be above 100 %.", style="dim")  # fmt: skip


def _speed(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None else f"{row['gmacs']:.1f}"
