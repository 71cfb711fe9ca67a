"""The command ``tables``: the papers' figures beside ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from updp.cli.console import err, guarded, line, out, print_json, table
from updp.cli.progress import ConsoleWatch

if TYPE_CHECKING:
    from updp.tables import Compared, Comparison, Paper, Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs: all figures, unrounded.")]
PaperName = Annotated[
    str | None, typer.Argument(metavar="[PAPER]", help="A paper, or the path of a .yaml file; all papers if left out.")
]
Only = Annotated[str | None, typer.Option("--table", metavar="T", help="One table of the paper, such as 2.")]

_STYLES = {"equal": "green", "differs": "yellow", "unexplained": "bold red"}
_LEGEND = (
    "MAC: multiply-accumulates; 5 BN: five operations more for each element that a batch norm puts out; so with LN, "
    "layer norms, and act, activations; pool: one for each element that is averaged."
)
_DIGITS = {
    ("macs", "G"): 4,
    ("macs", "M"): 2,
    ("params", "M"): 3,
    ("params", "G"): 6,
    ("bits", ""): 2,
    ("channels", ""): 0,
}


@guarded()
def tables(paper: PaperName = None, only: Only = None, json: Json = False) -> None:
    """Hold the figures that the papers print (operations, parameters) against those of the networks here.

    Every network is built from its spec and subnet, merged, and counted as its paper counts: on shapes alone, nothing
    is downloaded. The exit status is 1 if a figure differs and nothing says why.
    """
    from updp.errors import InputError
    from updp.tables import compare, list_tables, load_tables

    names = list_tables()
    if only is not None and paper is None:
        raise InputError(f"--table: say of which paper; allowed: {', '.join(names)}")
    papers = [load_tables(name) for name in ([paper] if paper else names)]
    if only is not None:
        papers = [papers[0].only(only)]
    rows = sum(len(about.rows) for each in papers for about in each.tables)
    with ConsoleWatch(err).task("tables", rows) as advance:
        found = compare(papers, advance)
    if json:
        print_json(found.to_json())
    else:
        _show(found)
    if not found.ok:
        raise typer.Exit(1)


def _show(found: Comparison) -> None:
    shown = None
    for paper, about, figures in found.tables():
        if paper != shown:
            _show_title(paper, first=shown is None)
            shown = paper
        _show_table(about, figures)
    names = {"unexplained": "different without a reason", "differs": "different for a known reason"}
    parts = [f"{number} {names.get(verdict, verdict)}" for verdict, number in found.counts.items() if number]
    line(out, "\n" + ", ".join(parts), style="green" if found.ok else "bold red")
    out.print(Text(_LEGEND, "dim"))


def _show_title(paper: Paper, *, first: bool) -> None:
    if not first:
        out.print()
    out.print(Text.assemble((paper.title, "bold"), (f"  {paper.venue}, arXiv {paper.arxiv}", "dim")))


def _show_table(about: Table, figures: Sequence[Compared]) -> None:
    out.print()
    line(out, f"table {about.name}" if about.name[0].isdigit() else about.name, f"  {about.title}", rest="dim")
    determined = [figure for figure in figures if figure.count is not None]
    if determined:
        shown = table("network", "", ">published", ">computed", ">input", "~counted", "")
        last = None
        for figure in determined:
            shown.add_row(*_cells(figure, repeated=figure.row is last))
            last = figure.row
        out.print(Padding(shown, (0, 0, 0, 2), expand=False))
    for text in _remarks(figures):
        out.print(Padding(text, (0, 0, 0, 2), expand=False))


def _cells(figure: Compared, *, repeated: bool) -> list[str | Text]:
    from updp.tables.compare import how

    what, unit = figure.figure.what, figure.figure.dialect.unit
    row = figure.row
    assert figure.computed is not None
    computed = f"{figure.computed:.{_DIGITS[what, unit]}f} {unit}".rstrip()
    counted = Text(how(figure.figure.dialect, what, figure.measured), "dim")
    names = ("", what, "") if repeated else (row.name, what, str(row.size))
    verdict = Text(figure.verdict, _STYLES[figure.verdict])
    return [
        Text(names[0]),
        Text(names[1], "dim"),
        _published(figure),
        computed,
        names[2],
        counted,
        verdict,
    ]


def _published(figure: Compared) -> str:
    dialect, published = figure.figure.dialect, figure.figure.published
    if published is None:
        return "illegible"
    about = "~" if figure.figure.approximate else ""
    return f"{about}{Decimal(str(published)):.{max(0, dialect.digits[-1])}f} {dialect.unit}".rstrip()


def _remarks(figures: Sequence[Compared]) -> Iterator[Text]:
    """Below a table: what is known of single figures, then what cannot be determined, by reason."""
    notes: dict[str, list[str]] = {}
    unknown: dict[str, dict[str, list[str]]] = {}
    for figure in figures:
        row = figure.row
        if figure.count is None:
            unknown.setdefault(figure.reason, {}).setdefault(row.name, []).append(_published(figure))
            continue
        for text in (figure.reason, figure.figure.note, row.note):
            if text and row.name not in notes.setdefault(text, []):
                notes[text].append(row.name)
    for text, names in notes.items():
        yield Text.assemble(", ".join(names), (f": {text}", "dim"))
    for text, rows in unknown.items():
        listed = ", ".join(f"{name} ({', '.join(values)})" for name, values in rows.items())
        yield Text.assemble(("not determinable", "yellow"), f": {listed}", (f": {text}", "dim"))
