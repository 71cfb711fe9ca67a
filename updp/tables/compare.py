"""Published beside computed, and whether they are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from math import log2
from typing import Any

from updp.errors import InputError, Problem
from updp.tables.measure import Measured, measure
from updp.tables.read import SEARCHED, Dialect, Figure, Paper, Row, Table

EQUAL, EXPLAINED, UNEXPLAINED, UNKNOWN = "equal", "differs", "unexplained", "not determinable"
VERDICTS = (EQUAL, EXPLAINED, UNEXPLAINED, UNKNOWN)

_SHORT = {"batchnorm": "BN", "layernorm": "LN", "activation": "act"}  # others are short


@dataclass(frozen=True)
class Compared:
    """One published figure beside ours.

    Attributes:
        count: multiply-accumulates and what the dialect adds, parameters, or bits and channels of a search space; None
            where nothing can be computed.
        printed: ``count`` as the paper would print it.
        verdict: one of `VERDICTS`.
        reason: why the figures differ, or why there is none to compare.
        measured: what was counted, before the dialect.
    """

    paper: Paper
    table: Table
    row: Row
    figure: Figure
    count: Decimal | int | None
    printed: Decimal | None
    verdict: str
    reason: str
    measured: Measured | None = field(repr=False)

    @property
    def computed(self) -> Decimal | None:
        """The count in the unit of the published figure, all digits."""
        return None if self.count is None else self.figure.dialect.scaled(self.count)

    def to_json(self) -> dict[str, Any]:
        figure, dialect = self.figure, self.figure.dialect
        counted = {**asdict(dialect), "elements": dict(dialect.elements)}
        facts = {} if self.measured is None else _facts(figure.what, self.measured)
        return {
            "figure": figure.what, "published": figure.published, "approximate": figure.approximate,
            "unit": dialect.unit,
            "computed": None if self.computed is None else float(self.computed),
            "printed": None if self.printed is None else float(self.printed), "count": _plain(self.count),
            "verdict": self.verdict, "reason": self.reason, "note": figure.note,
            "counted": {**counted, "text": how(dialect, figure.what, self.measured)}, "measured": facts,
        }  # fmt: skip


def _plain(count: Decimal | int | None) -> float | int | None:
    return float(count) if isinstance(count, Decimal) else count


def _facts(what: str, measured: Measured) -> dict[str, Any]:
    """What was counted before the dialect had its say."""
    if what == "params":
        return {"all": sum(measured.params.values()), "appended": measured.appended}
    if what in SEARCHED:
        return {"genes": len(measured.genes), "channels": measured.channels}
    return {
        "macs": measured.macs, "repair_macs": measured.repair_macs, "elements": dict(measured.elements),
        "appended_elements": measured.appended_elements, "trained": list(measured.trained),
    }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """All figures of some papers."""

    figures: tuple[Compared, ...]

    @property
    def ok(self) -> bool:
        """Every difference is explained."""
        return not self.counts[UNEXPLAINED]

    @property
    def counts(self) -> dict[str, int]:
        """How many figures there are of each verdict."""
        found = Counter(figure.verdict for figure in self.figures)
        return {verdict: found[verdict] for verdict in VERDICTS}

    def tables(self) -> Iterator[tuple[Paper, Table, list[Compared]]]:
        """The figures of one table after the other."""
        groups: dict[tuple[str, str], list[Compared]] = {}
        for figure in self.figures:
            groups.setdefault((figure.paper.name, figure.table.name), []).append(figure)
        for group in groups.values():
            yield group[0].paper, group[0].table, group

    def to_json(self) -> dict[str, Any]:
        papers: dict[str, dict[str, Any]] = {}
        for paper, table, figures in self.tables():
            about = {"paper": paper.name, "title": paper.title, "arxiv": paper.arxiv, "venue": paper.venue}
            entry = papers.setdefault(paper.name, {**about, "tables": []})
            entry["tables"].append({"table": table.name, "title": table.title, "rows": list(_rows(figures))})
        return {"ok": self.ok, "counts": self.counts, "papers": list(papers.values())}


def _rows(figures: Sequence[Compared]) -> Iterator[dict[str, Any]]:
    rows: dict[int, list[Compared]] = {}
    for figure in figures:
        rows.setdefault(id(figure.row), []).append(figure)
    for group in rows.values():
        row = group[0].row
        yield {"row": row.name, "network": row.network, "input": row.size, "note": row.note,
               "figures": [figure.to_json() for figure in group]}  # fmt: skip


def compare(papers: Sequence[Paper], progress: Callable[[int], None] | None = None) -> Comparison:
    """Build every network of these papers' tables that can be built, and hold its figures against the published ones.

    Args:
        progress: called with how many rows are done.

    Raises:
        InputError: a network cannot be built as its row says.
    """
    places = [(paper, table, row) for paper in papers for table in paper.tables for row in table.rows]
    done: dict[str, Measured] = {}
    found: list[Compared] = []
    for number, (paper, table, row) in enumerate(places, 1):
        measured = None
        if row.network is not None:
            key = repr((row.network, row.size, sorted(row.charged), row.trained, row.searched))
            measured = done[key] if key in done else done.setdefault(key, measure(row))
        found += [_judge(paper, table, row, figure, measured) for figure in row.figures]
        if progress is not None:
            progress(number)
    return Comparison(tuple(found))


def _judge(paper: Paper, table: Table, row: Row, figure: Figure, measured: Measured | None) -> Compared:
    if measured is None:
        return Compared(paper, table, row, figure, None, None, UNKNOWN, row.unknown, None)
    count = _count(row, figure, measured)
    printed = figure.dialect.printed(count)
    same = printed == Decimal(str(figure.published))
    verdict, reason = (EQUAL, "") if same else (EXPLAINED, figure.differs) if figure.differs else (UNEXPLAINED, "")
    if same and figure.differs:
        verdict, reason = UNEXPLAINED, f"it is said to differ ({figure.differs}), but does not"
    return Compared(paper, table, row, figure, count, printed, verdict, reason, measured)


def _count(row: Row, figure: Figure, measured: Measured) -> Decimal | int:
    dialect = figure.dialect
    if figure.what == "macs":
        products = measured.macs - (0 if dialect.repair else measured.repair_macs)
        norms = measured.appended_elements if dialect.appended else 0
        elements = {what: number + (norms if what == "batchnorm" else 0) for what, number in measured.elements.items()}
        return products + sum(number * elements[what] for what, number in dialect.elements.items())
    if figure.what == "bits":
        return Decimal(str(sum(map(log2, measured.genes))))
    if figure.what == "channels":
        return measured.channels
    out = {name for pattern in dialect.exclude for name in _matching(row, pattern, measured.params)}
    left = sum(number for name, number in measured.params.items() if name not in out)
    return left if dialect.appended else left - measured.appended


def _matching(row: Row, pattern: str, params: Mapping[str, int]) -> list[str]:
    names = [name for name in params if fnmatchcase(name, pattern)]
    if not names:
        raise InputError([Problem(row.place, row.name, f"params: exclude: no parameter matches {pattern!r}")])
    return names


def how(dialect: Dialect, what: str, measured: Measured | None = None) -> str:
    """How a figure is counted, in a few words."""
    if what in SEARCHED:
        return "log2 of every width that can be chosen" if what == "bits" else "into layers, without the first"
    digits = ", then ".join(map(str, dialect.digits))
    rounded = "truncated" if dialect.rounding == "truncate" else "rounded"
    if len(dialect.digits) > 1:
        rounded += f" to {digits} digits"
    elif dialect.digits and dialect.digits[0] < 0:
        rounded += f" to {10 ** -dialect.digits[0]}"
    if what == "macs":
        names = {key: _SHORT.get(key, key) for key in dialect.elements}
        charged = [f"{number} {names[key]}" if number > 1 else names[key] for key, number in dialect.elements.items()]
        return ", ".join([" + ".join(["MAC", *charged]), *_conventions(dialect, measured), rounded])
    parts = [f"without {' '.join(dialect.exclude)}"] if dialect.exclude else ["all"]
    if measured is not None and measured.appended:
        parts.append(f"{'with' if dialect.appended else 'without'} appended norms")
    return ", ".join([*parts, rounded])


def _conventions(dialect: Dialect, measured: Measured | None) -> Iterator[str]:
    """What the operations of this network leave out or take in, where it has any of it."""
    if measured is None:
        return
    if measured.appended_elements and "batchnorm" in dialect.elements:
        yield f"{'with' if dialect.appended else 'without'} appended norms"
    if measured.trained:
        yield f"{', '.join(measured.trained)} as trained"
    if measured.repair_macs:
        yield f"{'with' if dialect.repair else 'without'} border repair"
