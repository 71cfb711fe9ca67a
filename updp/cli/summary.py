"""What a run is, in its first lines, and what it came to, in a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from updp.cli.console import error_size, line, out, percent, quantity, table
from updp.pipeline.program import program

if TYPE_CHECKING:
    from updp.pipeline import RunDirectory, RunRecord

_NEXT = {
    "baseline": "train",
    "supernet": "train",
    "search": "search",
    "finetune": "finetune",
    "merge": "merge",
}


def show_header(run: RunDirectory) -> None:
    """Two lines: what is pruned, on what."""
    record = run.record
    given = ", ".join(name for name in ("weights", "subnet") if getattr(record, name))
    recipe = f" under {record.recipe}" if record.recipe else ""
    what = f" on {record.data}: prune {how_much(record)}{recipe}"
    line(out, record.spec, what, style="bold")
    parts = [record.device, f"{record.threads} threads", f"seed {record.seed}"]
    parts += ["bf16"] if record.precision == "bf16" else []
    parts += [f"given {given}"] if given else []
    parts += [f"from the calibration in {record.init['directory']}"] if record.init else []
    line(out, " · ".join([*parts, str(run.path)]), style="dim")
    if record.settings:
        line(out, "set " + " ".join(record.settings), style="dim")


def how_much(record: RunRecord) -> str:
    """``4 of 17 blocks``, and within which budget."""
    calibration = record.calibration
    budgets = {name: getattr(calibration, name, None) for name in ("macs", "latency")}
    within = " and ".join(f"{part:g}x of the {name}" for name, part in budgets.items() if part is not None)
    blocks = f"{record.prune} of {len(record.blocks)} blocks" if record.prune is not None else ""
    return " to ".join(part for part in (blocks, within) if part)


def show_summary(run: RunDirectory) -> None:
    """The table of a finished run, its products, and what to do next."""
    done = {stage: run.result(stage) for stage in run.record.stages}
    merged = done["merge"]
    if merged is None:
        missing = next(stage for stage, result in done.items() if result is None)
        if missing in _NEXT:
            line(out, "\nNext: ", f"{program()} {_NEXT[missing]} {run.path}", rest="bold")
        return
    out.print()
    out.print(Group(_networks(run, done, merged), Text(), *_verdicts(merged)))
    out.print()
    _show_products(run, merged)


def _networks(run: RunDirectory, done: Mapping[str, Any], merged: Mapping[str, Any]) -> Any:
    """Baseline, pruned and merged network, side by side."""
    before, after = merged["before"], merged["after"]
    latency = {row["name"]: row for row in merged["latency"]["rows"]}
    baseline = (done.get("baseline") or {}).get("top1")
    damage = (done.get("calibrate") or {}).get("damage")
    unlabelled = merged["top1"] is None and damage is not None
    worth = [percent(top1) for top1 in (baseline, merged["top1_unmerged"], merged["top1"])]
    if unlabelled:
        worth = ["", "", f"{damage:.3f} nats"]
    title = ">damage, no labels" if unlabelled else ">top-1"
    shown = table("", title, ">depth", ">MACs", ">params", ">latency, batch 1", ">spread")
    shown.add_row("baseline", worth[0], *_cost(before), *_time(latency["baseline"]))
    if not unlabelled:
        shown.add_row("pruned", worth[1], "", "", "", "", "")
    shown.add_row("merged", worth[2], *_cost(after), *_time(latency["merged"]), style="bold")
    gain = latency["baseline"]["median_ms"] / latency["merged"]["median_ms"]
    lost = None if baseline is None or merged["top1"] is None else f"{merged['top1'] - baseline:+.2f}"
    ratios = [f"x{after[key] / before[key]:.2f}" for key in ("macs", "params")]
    depth = f"{after['depth'] - before['depth']:+d}"
    shown.add_row("", lost, depth, *ratios, f"{gain:.2f}x faster", "", style="green" if gain > 1 else "yellow")
    return shown


def _cost(count: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(count["depth"]), quantity(count["macs"]), quantity(count["params"])


def _time(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['median_ms']:.3g} ms", f"{row['low_ms']:.3g} to {row['high_ms']:.3g}"


def _verdicts(merged: Mapping[str, Any]) -> list[Text]:
    certificate = merged["certificate"]
    worst, logits, float32 = (error_size(certificate[key]) for key in ("worst", "logits", "float32"))
    holds = ("certificate holds", "green") if certificate["ok"] else ("certificate FAILS", "red")
    where = merged["latency"]["environment"]
    machine = f"{where['cpu']}, {where['device']}, {where['threads']} threads, torch {where['torch']}"
    proof = f"worst of {len(certificate['ops'])} merged operators {worst}, logits {logits}"
    if not certificate["ops"]:
        proof = f"each pruned block was one operator already, logits {logits}"
    return [
        Text.assemble(holds, f": {proof} (allowed 1e-9); in float32 {float32}"),
        Text(f"measured in turns, spread as quartiles: {machine}", "dim"),
    ]


def _show_products(run: RunDirectory, merged: Mapping[str, Any]) -> None:
    notes = {
        "merged.safetensors": "the merged network",
        "merged.source.safetensors": "what it was merged from",
        "merged.onnx": "the merged network for other runtimes",
    }
    shown = table("", "")
    shown.show_header = False
    for file in merged.get("files", ()):
        shown.add_row(str(run.path / file), Text(notes.get(Path(file).name, ""), "dim"))
    if (run.path / "report.html").is_file():
        shown.add_row(str(run.path / "report.html"), Text("all of this, with pictures", "dim"))
    out.print(shown)
    network = run.path / "merge" / "merged.safetensors"
    judge = "verify {}" if merged["top1"] is not None else "eval {} --data LABELLED"
    line(out, "\nNext: ", f"{program()} {judge.format(network)}", rest="bold")
    line(out, "In Python: ", f'network = updp.load("{network}")', rest="bold")
