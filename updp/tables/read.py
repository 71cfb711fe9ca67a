"""Files of tables: what a paper prints, how it counts, and how each of its networks is built here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from updp.errors import InputError, Place, Problem, suggest
from updp.frozen import FrozenMap
from updp.spec.files import SUFFIXES, specs_directory
from updp.spec.schema import load_schema, schema_problems, where
from updp.spec.tree import Tree, read_text, read_tree

SEARCHED = ("bits", "channels")
FIGURES = ("macs", "params", *SEARCHED)
UNITS = {"": 0, "M": 6, "G": 9}
SIZE = 224  # of images, where a row says nothing


@dataclass(frozen=True)
class Dialect:
    """How a paper counts one figure.

    Attributes:
        unit: millions (``M``) or thousands of millions (``G``).
        digits: behind the point; several where a figure was rounded again and again.
        rounding: ``round`` or ``truncate``.
        elements: operations per element besides multiply-accumulates: whose element it is -> how many.
        repair: whether what repairs the border of merged convolutions is counted.
        trained: whether blocks that a recipe only reparameterizes are counted as in training, with their norms.
        exclude: patterns of the names of parameters that are left out.
        appended: whether the batch norms that recipes append are counted: as parameters, or their elements.
    """

    unit: str = ""
    digits: tuple[int, ...] = ()
    rounding: str = "round"
    elements: Mapping[str, int] = FrozenMap({})
    repair: bool = True
    trained: bool = False
    exclude: tuple[str, ...] = ()
    appended: bool = True

    def scaled(self, count: Decimal | int) -> Decimal:
        """A count in the dialect's unit, exactly."""
        return Decimal(count).scaleb(-UNITS[self.unit])

    def printed(self, count: Decimal | int) -> Decimal:
        """A count as the paper would print it."""
        value = self.scaled(count)
        mode = ROUND_DOWN if self.rounding == "truncate" else ROUND_HALF_UP
        for digits in self.digits:
            value = value.quantize(Decimal(1).scaleb(-digits), mode)
        return value


@dataclass(frozen=True)
class Figure:
    """One published number, None where it cannot be read. ``differs`` says why ours is another, if it is."""

    what: str
    published: float | None
    dialect: Dialect
    differs: str = ""
    note: str = ""
    approximate: bool = False


@dataclass(frozen=True)
class Row:
    """A network of a table; ``network`` is None where nobody can rebuild it, for the reason in ``unknown``."""

    name: str
    figures: tuple[Figure, ...]
    network: Mapping[str, Any] | None
    size: int
    unknown: str
    note: str
    place: Place

    @property
    def charged(self) -> frozenset[str]:
        """Whose elements are counted."""
        return frozenset(what for figure in self.figures for what in figure.dialect.elements)

    @property
    def trained(self) -> bool:
        """Whether blocks that a recipe only reparameterizes are counted as in training."""
        return any(figure.dialect.trained for figure in self.figures)

    @property
    def searched(self) -> bool:
        """Whether a figure is about the space that a search goes through."""
        return any(figure.what in SEARCHED for figure in self.figures)


@dataclass(frozen=True)
class Table:
    """One table of a paper."""

    name: str
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Paper:
    """All tables of a paper."""

    name: str
    title: str
    arxiv: str
    venue: str
    tables: tuple[Table, ...]

    def only(self, table: str) -> Paper:
        """The paper with one table left.

        Raises:
            InputError: it has no such table.
        """
        names = [own.name for own in self.tables]
        if table not in names:
            raise InputError(f"{self.name}: no such table: {suggest(table, names)}")
        return replace(self, tables=tuple(own for own in self.tables if own.name == table))


def list_tables() -> list[str]:
    """Names of the papers whose tables are shipped, sorted."""
    return sorted(path.stem for path in _directory().glob("*.yaml"))


def load_tables(name_or_path: str | Path) -> Paper:
    """Load a shipped file of tables by its name, or any by its path.

    Raises:
        InputError: with all problems of the file, each with its line and column.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str):
        names = list_tables()
        if name_or_path in names:
            path = next(
                file for file in _directory().iterdir() if file.stem == name_or_path and file.suffix in SUFFIXES
            )
        elif path.suffix not in SUFFIXES and not path.exists():
            raise InputError(f"no such tables: {suggest(name_or_path, names)}, or the path of a .yaml file")
    tree = read_tree(read_text(path), str(path))
    problems = [problem for _, problem in schema_problems(tree, load_schema(_directory()))]
    if not problems:
        problems = list(_row_problems(tree))
    if problems:
        raise InputError(problems)
    top = tree.plain()
    tables = tuple(_table(table, top.get("figures", {})) for table in tree.value["tables"].value)
    return Paper(path.stem, top["title"], top["arxiv"], top["venue"], tables)


def _directory() -> Path:
    return specs_directory() / "tables"


def _row_problems(tree: Tree) -> Iterator[Problem]:
    """What the schema cannot say."""
    tables: list[Tree] = tree.value["tables"].value
    for number, table in enumerate(tables):
        name = table.value["table"]
        if name.value in [other.value["table"].value for other in tables[:number]]:
            yield Problem(name.place, where(["tables", number, "table"]), f"{name.value!r} is there already")
        for index, row in enumerate(table.value["rows"].value):
            path = where(["tables", number, "rows", index])
            keys = set(row.value)
            if len(keys & {"network", "unknown"}) != 1:
                yield Problem(row.place, path, "give `network`, or `unknown`: why there is none")
            if not keys & set(FIGURES):
                yield Problem(row.place, path, f"no figure: give {' or '.join(FIGURES)}")
            for what in (what for what in FIGURES if what in keys):
                settings = _settings(what, row, table, tree.plain().get("figures", {}))
                for key in ("unit", "digits"):
                    if key not in settings:
                        yield Problem(row.value[what].place, f"{path}.{what}", f"its {key!r} is given nowhere")
                if settings["published"] is None and "network" in keys:
                    message = "`published` is null: only for `unknown` networks"
                    yield Problem(row.value[what].place, f"{path}.{what}", message)


def _settings(what: str, row: Tree, table: Tree, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a figure: by the row, else by the table, else by the file."""
    own = row.value[what].plain()
    of_table = table.value["figures"].plain() if "figures" in table.value else {}
    given = own if isinstance(own, dict) else {"published": own}
    plain = {"unit": "", "digits": 0} if what in SEARCHED else {}
    return {**plain, **figures.get(what, {}), **of_table.get(what, {}), **given}


def _table(tree: Tree, figures: Mapping[str, Any]) -> Table:
    rows = []
    for row in tree.value["rows"].value:
        plain = row.plain()
        found = [_figure(what, _settings(what, row, tree, figures)) for what in FIGURES if what in plain]
        network = plain.get("network")
        rows.append(Row(plain["row"], tuple(found), network, plain.get("input", SIZE), plain.get("unknown", ""),
                        plain.get("note", ""), row.place))  # fmt: skip
    return Table(tree.value["table"].value, tree.value["title"].value, tuple(rows))


def _figure(what: str, settings: Mapping[str, Any]) -> Figure:
    known = {field.name for field in fields(Dialect)}
    values = {key: _frozen(value) for key, value in settings.items() if key in known}
    values["digits"] = tuple(values["digits"]) if isinstance(values["digits"], Sequence) else (values["digits"],)
    rest = {key: settings[key] for key in ("differs", "note", "approximate") if key in settings}
    return Figure(what, settings["published"], Dialect(**values), **rest)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return FrozenMap({key: number for key, number in value.items() if number})
    return tuple(value) if isinstance(value, list) else value
