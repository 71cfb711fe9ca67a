"""What a calibration's page says of single blocks: what each costs alone, and how well its operators were solved for.

Keys that are read; all may be missing:

- ``damage/result.json``: ``macs, latency, solved_on, judged_on, rows [{block, recipe, damage, error, macs``,
  ``macs_before, latency, latency_before, samples, unknowns}]``; latencies are seconds, damages nats.
- ``calibrate/result.json``: ``damage, choices {block: recipe}``,
  ``solved [{block, operator, samples, unknowns, ridge, error_before, error}]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from updp.report import words
from updp.report.charts import Measured, RowChart, row_chart
from updp.report.read import Record, Run

CHOSEN, OTHER = "b", "a"


@dataclass(frozen=True)
class TableRow:
    """A row of a table: its head, its cells, and whether it is one of those that were chosen."""

    head: str
    cells: list[str]
    chosen: bool | None


DAMAGE_COLUMNS = (
    "block", "", "recipe", "damage", "error", "samples", "unknowns", "MACs before", "after", "latency before", "after",
)  # fmt: skip
SOLVED_COLUMNS = ("block", "", "operator", "error before", "after", "samples", "unknowns", "ridge")


def damage_chart(run: Run) -> RowChart | None:
    """What each block costs alone, a mark for each recipe."""
    chosen = _choices(run)
    blocks: dict[str, list[Record]] = {}
    for row in run.stage("damage").records("rows"):
        if row.number("damage") is not None:
            blocks.setdefault(row.text("block") or "?", []).append(row)

    def marks(block: str, rows: Iterable[Record]) -> list[Measured]:
        return [
            Measured(
                CHOSEN if chosen.get(block) == row.text("recipe") else OTHER, row.text("recipe") or "?",
                row.number("damage") or 0.0,
            )
            for row in rows
        ]  # fmt: skip

    shown = (
        (block, chosen.get(block, ""), " · ".join(words.nats(row.number("damage")) for row in rows), marks(block, rows))
        for block, rows in blocks.items()
    )
    return row_chart("Damage of each block alone", "nats", shown, bars=False, log=True)


def damage_table(run: Run) -> list[TableRow]:
    """Every pair of block and recipe with its costs, in the order of the blocks."""
    chosen, rows = _choices(run), run.stage("damage").records("rows")
    return [_damage_row(row, chosen) for row in rows]


def _damage_row(row: Record, chosen: dict[str, str]) -> TableRow:
    block, recipe = row.text("block") or "?", row.text("recipe") or "?"
    times = [None if seconds is None else 1e3 * seconds for seconds in map(row.number, ("latency_before", "latency"))]
    cells = [
        recipe, words.nats(row.number("damage")), words.decimal(row.number("error")), *_counts(row),
        *(words.quantity(row.number(name)) for name in ("macs_before", "macs")), *map(words.milliseconds, times),
    ]  # fmt: skip
    return TableRow(block, cells, chosen.get(block) == recipe if chosen else None)


def error_chart(run: Run) -> RowChart | None:
    """How far each operator is from what it should give, as merging makes it and solved."""
    rows = []
    for each in run.stage("calibrate").records("solved"):
        before, after = each.number("error_before"), each.number("error")
        marks = [Measured(OTHER, "as merging gives it", before)] if before is not None else []
        marks += [Measured(CHOSEN, "solved", after)] if after is not None else []
        value = " → ".join(words.decimal(number) for number in (before, after))
        rows.append((each.text("block") or "?", each.text("operator") or "", value, marks))
    return row_chart("Error of each operator", "of the variance", rows, bars=False, log=True)


def solved_table(run: Run) -> list[TableRow]:
    """Every operator that was solved for."""
    rows = []
    for each in run.stage("calibrate").records("solved"):
        ridge = each.number("ridge")
        cells = [
            each.text("operator") or "?", *(words.decimal(each.number(name)) for name in ("error_before", "error")),
            *_counts(each), "as merged" if ridge is None else f"{ridge:g}",
        ]  # fmt: skip
        rows.append(TableRow(each.text("block") or "?", cells, None))
    return rows


def _counts(row: Record) -> list[str]:
    """Samples and unknowns; a mark where the samples are the fewer."""
    samples, unknowns = row.number("samples"), row.number("unknowns")
    few = samples is not None and unknowns is not None and samples <= unknowns
    return [f"{words.whole(samples)}{' !' if few else ''}", words.whole(unknowns)]


def few_samples(run: Run) -> bool:
    """Whether any operator had fewer samples than unknowns."""
    return any(row.cells[-2].endswith("!") or row.cells[3].endswith("!") for row in solved_table(run))


def facts(run: Run) -> list[tuple[str, str]]:
    """What the calibration came to."""
    damage, calibrate = run.stage("damage"), run.stage("calibrate")
    chosen = _choices(run)
    alone = [
        row.number("damage") or 0.0
        for row in damage.records("rows")
        if chosen.get(row.text("block") or "") == row.text("recipe")
    ]
    solved = calibrate.number("damage_solved")
    compared = len(calibrate.records("candidates"))
    pairs = [
        ("damage of all together", words.nats(calibrate.number("damage"), unit=True)),
        ("before distillation", words.nats(None if solved == calibrate.number("damage") else solved, unit=True)),
        ("sum of what they cost alone", words.nats(sum(alone), unit=True) if alone else words.NOTHING),
        ("sets of blocks compared", words.whole(compared or None)),
        ("images solved on", words.whole(damage.number("solved_on"))),
        ("images that judge", words.whole(damage.number("judged_on"))),
    ]
    return [(name, value) for name, value in pairs if value != words.NOTHING]


def _choices(run: Run) -> dict[str, str]:
    """Block -> recipe of the chosen ones."""
    choices = run.stage("calibrate").record("choices")
    return {name: recipe for name in choices.data if (recipe := choices.text(name)) is not None}
