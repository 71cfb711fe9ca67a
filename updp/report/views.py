"""What each section of the page says, taken from a run. A section without its data is None or empty.

Keys that the page reads; all may be missing:

- ``run.json``: ``spec, spec_hash, data, num_classes, prune, recipe, settings [text], seed, threads, device``,
  ``precision, weights {file}, subnet, calibration {images, macs, latency, judge, finetune}, init {directory}``,
  ``environment {name: value}`` and, in order of execution, ``blocks [{name, structure, recipes [text]}]``.
- ``baseline/result.json``: ``top1, seconds, history [{epoch, train_loss, top1}]``.
- ``supernet/result.json``: ``top1_keep, top1_pruned, seconds, history [{epoch, loss_keep, loss_random, loss_pruned}]``.
- ``search/result.json``: ``best {top1}, candidates_scored, block_evaluations {shared, unshared}, unshared_because``,
  ``exhaustive, seconds, history [{generation, best, mean}]``; ``search/subnet.json`` beside it.
- ``finetune/result.json``: as ``baseline``, with ``blend`` in its history.
- ``merge/result.json``: ``top1_unmerged, top1, seconds``,
  ``certificate {ok, ops [{block, steps, op, error, ring, interior, bound, ok}], blocks {name: error}, logits``,
  ``float32}``,
  ``certificate_random`` of the same form, ``before`` and ``after {macs, params, depth, blocks [{name, depth}]}``,
  ``latency {environment, rows [ROW]}``, ``block_latency [{block, choice, before ROW, after ROW}]``, where
  ROW is ``{name, median_ms, low_ms, high_ms}``; ``training {batch_size, rows [ROW with memory]}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from updp.report import words
from updp.report.figures import BASELINE, MERGED, network_latency
from updp.report.network import op_name
from updp.report.progress import read_progress
from updp.report.read import Record, Run
from updp.spec import ArchSpec

_SETTINGS = (
    "spec", "spec_hash", "data", "num_classes", "prune", "recipe", "seed", "threads", "device", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A headline figure: what it was, what it became ("" if not known yet), and the change."""

    label: str
    before: str
    after: str
    change: str
    exact: str
    note: str = "baseline so far"


@dataclass(frozen=True)
class StageRow:
    """A stage in the list of stages."""

    name: str
    finished: bool
    note: str


@dataclass(frozen=True)
class OpRow:
    """A merged operator in the certificate: its relative errors, whole, ring, interior, and the bound."""

    block: str
    op: str
    errors: list[str]
    ok: bool | None


@dataclass(frozen=True)
class CertificateView:
    """The certificate; ``facts`` are (name, largest error: on the run's weights, and on random ones)."""

    ok: bool | None
    random: bool
    facts: list[tuple[str, list[str]]]
    rows: list[OpRow]


def summary(run: Run) -> str:
    """How many of the blocks are pruned, as far as that is known."""
    total = len(run.about.records("blocks"))
    count = len(run.subnet.pruned) if run.subnet else run.about.number("prune")
    if count is None:
        return "pruned blocks not chosen yet"
    of = f" of {total}" if total else ""
    return f"{count:g}{of} blocks {'pruned' if run.subnet else 'to be pruned'}"


def tiles(run: Run) -> list[Tile]:
    """The headline figures that the run has so far."""
    merge, latency = run.stage("merge"), network_latency(run)
    final = merge.number("top1")
    final = run.stage("finetune").number("top1") if final is None else final
    before, after = merge.record("before"), merge.record("after")
    slow, fast = (latency.get(name, Record()).number("median_ms") for name in (BASELINE, MERGED))
    figures = (
        _tile("Top-1 accuracy", run.stage("baseline").number("top1"), final, words.percent, words.points),
        _tile("Depth in layers", before.number("depth"), after.number("depth"), words.quantity, words.relative),
        _tile("MACs", before.number("macs"), after.number("macs"), words.quantity, words.relative),
        _tile("Parameters", before.number("params"), after.number("params"), words.quantity, words.relative),
        _tile("Latency, median", slow, fast, words.milliseconds, words.speedup),
    )
    damage = run.stage("calibrate").number("damage")
    lost = Tile("Damage of the answers", words.nats(damage), "", "", f"{damage} nats", "nats on unseen images")
    return [*([] if damage is None else [lost]), *(tile for tile in figures if tile is not None)]


def _tile(
    label: str,
    before: float | None,
    after: float | None,
    show: Callable[[float | None], str],
    change: Callable[[float, float], str],
) -> Tile | None:
    if before is None and after is None:
        return None
    exact = " → ".join(f"{value:.12g}" for value in (before, after) if value is not None)
    if before is None or after is None:
        return Tile(label, show(after if before is None else before), "", "", exact)
    return Tile(label, show(before), show(after), change(before, after), exact)


def stage_rows(run: Run) -> list[StageRow]:
    """The run's stages in order."""
    rows = []
    for name in run.listed:
        result = run.stage(name)
        outcome = {
            "baseline": _outcome(("top-1", result.number("top1"))),
            "supernet": _outcome(("kept", result.number("top1_keep")), ("pruned", result.number("top1_pruned"))),
            "search": _outcome(("best", result.record("best").number("top1"))),
            "damage": f"{len(result.records('rows'))} pairs of block and recipe",
            "calibrate": f"damage {words.nats(result.number('damage'), unit=True)}",
            "finetune": _outcome(("top-1", result.number("top1"))),
            "merge": _outcome(("top-1", result.number("top1"))),
        }[name]
        if name in run.stages:
            note = " · ".join(part for part in (words.duration(result.number("seconds")), outcome) if part)
        else:
            note = "left out: the subnet was given" if name in run.left_out else _in_work(run, name)
        rows.append(StageRow(name, name in run.stages, note))
    return rows


def _in_work(run: Run, stage: str) -> str:
    """How far a stage that is not finished was when the page was written."""
    progress = read_progress(run.directory)
    if progress.stage != stage:
        return "not finished"
    epoch = [] if progress.epoch is None else [f"epoch {progress.epoch:g}"]
    part = [] if progress.part is None else [f"{progress.part:.0%} of {progress.title or stage}"]
    best = max(progress.top1s.values(), default=None)
    top1 = [] if best is None else [f"best top-1 {words.percent(best)}"]
    return ", ".join(["begun", *epoch, *part, *top1])


def _outcome(*figures: tuple[str, float | None]) -> str:
    return ", ".join(f"{label} {words.percent(value)}" for label, value in figures if value is not None)


def certificate(run: Run) -> CertificateView | None:
    """The certificate of the merge; None before it."""
    found = run.stage("merge").record("certificate")
    if not found:
        return None
    rows = [
        OpRow(
            op.text("block") or "?",
            op_name(op),
            [words.scientific(op.number(key)) for key in ("error", "ring", "interior", "bound")],
            op.flag("ok"),
        )
        for op in found.records("ops")
    ]
    random = run.stage("merge").record("certificate_random")
    facts = [(name, _worst(found, random, pick)) for name, pick in _WORST]
    ok = False if random.flag("ok") is False else found.flag("ok")  # both must hold
    return CertificateView(ok, bool(random), facts, rows)


def _op_errors(found: Record) -> list[float | None]:
    return [op.number(key) for op in found.records("ops") for key in ("error", "ring", "interior")]


def _block_errors(found: Record) -> list[float | None]:
    blocks = found.record("blocks")
    return [blocks.number(name) for name in blocks.data]


_WORST: tuple[tuple[str, Callable[[Record], list[float | None]]], ...] = (
    ("worst operator, float64", _op_errors),
    ("worst block, float64", _block_errors),
    ("logits, float64", lambda found: [found.number("logits")]),
    ("logits, float32", lambda found: [found.number("float32")]),
)


def _worst(given: Record, random: Record, pick: Callable[[Record], list[float | None]]) -> list[str]:
    """The largest error on the run's weights, and on random weights if there is such a certificate."""
    both = [pick(found) for found in (given, random) if found]
    return [words.scientific(max((e for e in errors if e is not None), default=None)) for errors in both]


def search_facts(run: Run) -> list[tuple[str, str]]:
    """What the search cost: candidates, and how much the shared prefixes saved."""
    result = run.stage("search")
    counts = result.record("block_evaluations")
    shared, unshared = counts.number("shared"), counts.number("unshared")
    candidates, best = result.number("candidates_scored"), result.record("best").number("top1")
    facts = [
        ("best on held-out training images", words.percent(best) if best is not None else None),
        ("candidates scored", f"{candidates:g}" if candidates is not None else None),
        ("block evaluations without sharing", f"{unshared:.0f}" if unshared is not None else None),
        ("block evaluations, prefixes shared", f"{shared:.0f}" if shared is not None else None),
        ("shared over unshared", f"{shared / unshared:.2f}" if shared is not None and unshared else None),
        ("not shared because", result.text("unshared_because")),
        ("all subnets were scored", "yes" if result.flag("exhaustive") else None),
    ]
    return [(name, value) for name, value in facts if value is not None]


def settings(run: Run) -> list[tuple[str, str]]:
    """How the run was started."""
    pairs = [(name.replace("_", " "), words.plain(run.about.data.get(name))) for name in _SETTINGS]
    given = [(f"given {name}", words.plain(value)) for name, value in _given(run).items()]
    budget = {name: value for name, value in run.about.record("calibration").data.items() if value is not None}
    given += [(f"calibration {name}", words.plain(value)) for name, value in budget.items() if name != "finetune"]
    return [*pairs, *given, ("settings changed", ", ".join(run.about.texts("settings")) or "none")]


def _given(run: Run) -> dict[str, str]:
    """What the user brought along."""
    given = {"weights": run.about.record("weights").text("file")}
    given["calibration"] = run.about.record("init").text("directory")
    given["subnet"] = "yes" if run.about.record("subnet") else None
    return {name: value for name, value in given.items() if value is not None}


def environment(run: Run) -> list[tuple[str, str]]:
    """Device and versions: those of the latency measurement over those of the run."""
    both = {**run.about.record("environment").data, **run.stage("merge").record("latency").record("environment").data}
    return [(name.replace("_", " "), words.plain(value)) for name, value in both.items()]


def schedule(spec: ArchSpec | None) -> list[tuple[str, list[str]]]:
    """(name, [baseline, supernet, finetune]) of every training setting, as the run used it."""
    if spec is None:
        return []
    columns = (spec.schedule.baseline, spec.schedule.supernet, spec.schedule.finetune)
    names = [field.name for field in dataclasses.fields(columns[0])]
    return [(name.replace("_", " "), [words.plain(getattr(column, name)) for column in columns]) for name in names]


def search_and_blend(spec: ArchSpec | None) -> list[tuple[str, str]]:
    """The settings of the search and of the blend."""
    if spec is None:
        return []
    parts = (("search", spec.schedule.search), ("blend", spec.schedule.blend))
    return [
        (f"{part} {field.name.replace('_', ' ')}", words.plain(getattr(values, field.name)))
        for part, values in parts
        for field in dataclasses.fields(values)
    ]
