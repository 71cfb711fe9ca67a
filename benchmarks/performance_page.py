"""docs/performance.md from the files that `performance.py` makes: every figure on the page stands in one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
TITLES = {
    "torch": "torch", "deployed": "updp deployed", "compile": "torch.compile", "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO", "ncnn": "ncnn", "openvino-bf16": "OpenVINO bf16",
}  # fmt: skip
PUBLISHED = {
    "resnet34-updp_p6": (1.25, 1), "resnet34-updp_p10": (1.43, 1),
    "mobilenetv2_140-ds_a": (1.75, 2), "mobilenetv2_140-updp_p6": (1.75, 2),
    "mobilenetv2_140-ds_c": (2.16, 2), "mobilenetv2_140-updp_p9": (2.16, 2),
    "mobilenetv2_140-ds_e": (2.50, 2), "mobilenetv2_140-updp_p11": (2.50, 2),
    "convnext_tiny-updp_p3": (1.38, 3), "convnext_tiny-updp_p6": (1.75, 3), "convnext_tiny-updp_p9": (2.04, 3),
    "deit_tiny_patch16_224-updp_p6": (1.26, 4),
}  # fmt: skip
"""Network -> the speed-up that UPDP (arXiv 2401.06426) prints, and in which table."""
NOTHING = "–"


def page(results: Path) -> str:
    """The whole page, in Markdown."""
    parts = {part: _read(results / part) for part in ("runtimes", "papers")}
    layers = {batch: _read(results / "layers" / f"batch{batch}") for batch in (1, 8)}
    every = [result for found in (*parts.values(), *layers.values()) for result in found]
    lines = [
        "# How fast merged networks are", "",
        "<!-- Written by `python benchmarks/performance.py --page`; every figure is from a file of `updp bench` in "
        "benchmarks/results/performance. -->", "",
        "`updp bench` measures all of this, on your machine as well: `updp bench resnet34 --subnet updp_p10`.", "",
    ]  # fmt: skip
    if not every:
        return "\n".join([*lines, "No results yet: `python benchmarks/performance.py`.", ""])
    lines += [*_machines(every), "", *_runtimes(parts["runtimes"]), *_memory(parts["runtimes"])]
    lines += [*_papers(parts["papers"]), *_layers(layers), *_HOW]
    return "\n".join([*lines, ""])


def _read(folder: Path) -> list[Result]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def _machines(results: Sequence[Result]) -> list[str]:
    """On what it was measured: one line for each different machine and set of versions."""
    found = {}
    for result in results:
        env = result["environment"]
        versions = {"updp": env["updp"], "Python": env["python"], **env["packages"], "torch": env["torch"]}
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        key = f"{env['cpu']}, {env['cpus']} CPUs, {', '.join(env['isa'])}"
        found.setdefault(key, {})[told] = len(told)
    return [f"Measured on: {machine}; {max(told, key=lambda text: told[text])}." for machine, told in found.items()]


# --- networks in every runtime ---


def _runtimes(results: Sequence[Result]) -> Iterator[str]:
    if not results:
        return
    yield "## Merged networks in every runtime"
    yield ""
    yield (
        "Milliseconds of a batch, float32 (OpenVINO bf16, in italics, computes something else), median; in brackets, "
        "the unpruned network. *Against the best other*: how many times as long the best of the other float32 "
        "runtimes takes as updp deployed, with the quartiles of the ratio within a round. –: not measured."
    )
    yield ""
    names = [name for name in TITLES if any(_rows(result, name) for result in results)]
    header = ["network", "batch", "threads", *(TITLES[name] for name in names), "against the best other"]
    lines = []
    for result in results:
        for table in result["tables"]:
            cells = [_both(table, name) for name in names]
            lines.append([_name(result), str(table["batch"]), str(table["threads"]), *cells, _best(table)])
    yield from _table(header, lines)
    yield ""
    notes = sorted({
        f"{_name(result)}, {TITLES[row['runtime']]}: {row['status']}, {row['reason']}"
        for result in results for table in result["tables"] for row in table["rows"] if row["reason"]
    })  # fmt: skip
    notes += sorted({f"{TITLES[each['runtime']]}: not installed" for result in results for each in result["missing"]})
    if notes:
        yield from (*(f"- {note}" for note in notes), "")


def _rows(result: Result, runtime: str) -> list[Mapping[str, Any]]:
    return [row for table in result["tables"] for row in table["rows"] if row["runtime"] == runtime]


def _both(table: Mapping[str, Any], runtime: str) -> str:
    found = {row["network"]: row for row in table["rows"] if row["runtime"] == runtime}
    if not found:
        return NOTHING
    merged, unpruned = (_ms(found.get(name)) for name in ("merged", "unpruned"))
    text = f"{merged} ({unpruned})"
    return f"*{text}*" if runtime == "openvino-bf16" else f"**{text}**" if runtime == "deployed" else text


def _ms(row: Mapping[str, Any] | None) -> str:
    if row is None or row["timing"] is None:
        return NOTHING if row is None else str(row["status"])
    value = row["timing"]["median_ms"]
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _best(table: Mapping[str, Any]) -> str:
    for each in table["against"]:
        if (each["runtime"], each["network"]) == ("deployed", "merged"):
            return f"**{each['ratio']:.2f}** ({each['low']:.2f} to {each['high']:.2f}; {TITLES[each['other']]})"
    return NOTHING


def _memory(results: Sequence[Result]) -> Iterator[str]:
    if not results:
        return
    yield "## Memory"
    yield ""
    yield (
        "Megabytes of the merged network: weights, and the maps that are alive at the same time. Weights that are "
        "packed for Winograd are up to four times as large; which are, depends on the batch."
    )
    yield ""
    columns = [(what, name) for what in ("weights", "maps") for name in ("torch", "deployed")]
    lines = []
    for result in results:
        for table in result["tables"]:
            memory = {row["runtime"]: row["memory"] for row in table["rows"] if row["network"] == "merged"}
            if table["threads"] == 1 and memory.get("torch") and memory.get("deployed"):
                cells = [f"{memory[name][what] / 1e6:.1f}" for what, name in columns]
                lines.append([_name(result), str(table["batch"]), *cells])
    yield from _table(["network", "batch", *(f"{what}, {name}" for what, name in columns)], lines)
    yield ""


# --- pruned against unpruned ---


def _papers(results: Sequence[Result]) -> Iterator[str]:
    if not results:
        return
    runtimes = [name for name in TITLES if any(_rows(result, name) for result in results)]
    batches = sorted({table["batch"] for result in results for table in result["tables"]})
    threads = sorted({table["threads"] for result in results for table in result["tables"]})
    yield "## Pruned and merged against unpruned, in the same runtime"
    yield ""
    yield (
        f"How many times as fast the merged network is; {', '.join(map(str, threads))} thread. *Published*: what UPDP "
        "prints, on an AMD MI100 at batch 128 (of ConvNeXt, our quotient of two of its figures). In a cell, batch "
        f"{', '.join(map(str, batches))}."
    )
    yield ""
    lines = []
    for result in results:
        published, table = PUBLISHED.get(result["network"]["name"], (None, None))
        told = NOTHING if published is None else f"{published:.2f} (table {table})"
        macs = result["network"]["macs"]
        cells = [" / ".join(_merging(result, name, batch) for batch in batches) for name in runtimes]
        lines.append([_name(result), told, f"{macs['unpruned'] / macs['merged']:.2f}", *cells])
    yield from _table(["network", "published", "MACs", *(TITLES[name] for name in runtimes)], lines)
    yield ""


def _merging(result: Result, runtime: str, batch: int) -> str:
    for table in result["tables"]:
        for each in table["merging"]:
            if table["batch"] == batch and each["runtime"] == runtime:
                return f"{each['ratio']:.2f}"
    return NOTHING


# --- layers ---


def _layers(found: Mapping[int, Sequence[Result]]) -> Iterator[str]:
    if not any(found.values()):
        return
    yield "## Merged layers, one thread"
    yield ""
    yield (
        "Every different layer by itself, our fastest kernel against the faster of torch's two ways (plain channels "
        "last, oneDNN with packed weights). *3x3*: geometric mean over dense 3x3 convolutions of stride 1. *deployed*: "
        "the lowest ratio to torch where the faster of both is taken, as `updp.deploy` does. *roofline*: GMAC/s of the "
        "fastest matrix product, and the highest part of the limit that a layer reaches (Winograd needs fewer products "
        "than it is counted with)."
    )
    yield ""
    lines = []
    for batch, results in found.items():
        for result in results:
            ratios = [(layer, layer["against_torch"]["ratio"]) for layer in result["layers"] if layer["against_torch"]]
            dense = [ratio for layer, ratio in ratios if _is_3x3(layer["problem"])]
            faster = sum(ratio > 1 for _, ratio in ratios)
            part = max((layer["native"]["of_roofline"] for layer in result["layers"] if layer["native"]), default=0)
            lines.append([
                _name(result), str(batch), f"{faster} of {len(result['layers'])}", _mean(dense),
                f"{min((max(1.0, ratio) for _, ratio in ratios), default=1.0):.2f}",
                f"{result['roofline']['gmacs']:.0f}, {100 * part:.0f} %",
            ])  # fmt: skip
    yield from _table(["network", "batch", "layers faster", "3x3", "deployed", "roofline"], lines)
    yield ""


def _is_3x3(problem: str) -> bool:
    weight, *words = problem.split()
    return weight.endswith("x3x3") and "stride" not in words and "groups" not in words


def _mean(ratios: Sequence[float]) -> str:
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f} ({len(ratios)})" if ratios else NOTHING


# --- all ---

_HOW = [
    "## How it was measured", "",
    "- All runtimes in one process, in turns that begin with another one each round. A turn begins when no thread of "
    "the process computes, with calls that are not timed; then two are. Medians and quartiles.",
    "- Before anything is timed, every runtime's logits are held against torch's: float32 may differ by 1e-4 of the "
    "largest logit, bfloat16 by 0.3. What differs by more is listed as wrong, without a time.",
    "- Every runtime as its own users would use it: torch channels last; torch.compile with frozen weights; ONNX "
    "Runtime and OpenVINO from ONNX, the batch size fixed, all optimizations; ncnn by way of pnnx, in float32, the "
    "images of a batch one by one. Weights are random: how long a network takes does not depend on them.",
    "- updp deployed chooses the form of each layer by measuring, torch's own forms among them.",
]  # fmt: skip


def _name(result: Result) -> str:
    about = result["network"]
    return f"{about['spec']} {about['subnet']}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rules = ["---" if place == 0 else "---:" for place in range(len(header))]
    return [f"| {' | '.join(line)} |" for line in (header, rules, *lines)]
