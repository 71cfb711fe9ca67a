"""Where specs are and how one is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from updp.errors import Problem, SpecError, UpdpError, suggest
from updp.frozen import FrozenMap
from updp.spec import build, include
from updp.spec.check import cross_problems
from updp.spec.language import ArchSpec
from updp.spec.schema import load_schema, schema_problems, without
from updp.spec.settings import DEFAULT_SCHEDULE
from updp.spec.tree import Tree, read_text, read_tree

SUFFIXES = (".yaml", ".yml")


def specs_directory() -> Path:
    """The directory of the shipped specs: inside the installed package, or beside it in a checkout.

    Raises:
        UpdpError: if the installation has lost them.
    """
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "specs", package.parent / "specs"):
        if (directory / "schema.json").is_file():
            return directory
    raise UpdpError(f"the specs are missing from this installation (looked in {package} and beside it)")


def list_specs() -> list[str]:
    """Names of the shipped specs, sorted: the files in the specs directory itself, without suffix."""
    return sorted(path.stem for path in specs_directory().iterdir() if path.suffix in SUFFIXES and path.is_file())


def load_spec(name_or_path: str | Path) -> ArchSpec:
    """Load a shipped spec by its name, or any spec by its path, with what it includes.

    Raises:
        SpecError: with all problems of the file and of those that it includes, each with its line and column.
    """
    path, name = _find(name_or_path)
    text = read_text(path)
    tree = read_tree(text, str(path))
    whole = include.expand(tree, path, specs_directory())
    return _make(whole, text if whole is tree else None, str(path), name)


def _find(name_or_path: str | Path) -> tuple[Path, str]:
    path = Path(name_or_path)
    if isinstance(name_or_path, str):
        names = list_specs()
        if name_or_path in names:
            shipped = (specs_directory() / f"{name_or_path}{suffix}" for suffix in SUFFIXES)
            return next(file for file in shipped if file.is_file()), name_or_path
        if path.suffix not in SUFFIXES and not path.exists():
            hint = "" if len(path.parts) == 1 else ", or the path of a .yaml file"
            raise SpecError(f"no such spec: {suggest(name_or_path, names)}{hint}")
    return path, path.stem


def parse_spec(text: str, *, file: str, name: str) -> ArchSpec:
    """Make a spec from its text alone, which includes nothing; ``file`` is only used in messages.

    Raises:
        SpecError: with all problems of the text.
    """
    tree = read_tree(text, file)
    include.refuse(tree)
    return _make(tree, text, file, name)


def _make(tree: Tree, text: str | None, file: str, name: str) -> ArchSpec:
    """Check a whole tree and make a spec of it; one that was put together (text None) is written out first."""
    schema = load_schema(specs_directory())
    found = schema_problems(tree, schema)
    problems = [problem for _, problem in found]
    if isinstance(tree.value, dict):
        damaged = [path for path, _ in found]
        problems += cross_problems(tree, without(tree, damaged), damaged)
    if problems:
        raise SpecError(sorted(problems, key=lambda problem: _in_order(problem, file)))
    if text is None:
        tree = include.without_unused(tree)
        text = include.text_of(tree, list(schema["properties"]))
    return _assemble(tree, text, file, name)


def _in_order(problem: Problem, file: str) -> tuple[bool, int, int]:
    """The file's own problems first, then those of what it includes."""
    place = problem.place
    return (False, 0, 0) if place is None else (place.file != file, place.line or 0, place.column or 0)


def _assemble(tree: Tree, text: str, file: str, name: str) -> ArchSpec:
    top = tree.value
    trees = top["recipes"].value
    recipes = {key: build.build_recipe(key, build.resolve_recipe(key, trees)) for key in trees}
    structures = {key: build.build_flow(item) for key, item in top["structures"].value.items()}
    channels, height, width = (int(item.value) for item in top["input"].value)
    return ArchSpec(
        name=name,
        text=text,
        file=file,
        hash=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        model=build.build_model(top["model"]),
        input=(channels, height, width),
        structures=FrozenMap(structures),
        recipes=FrozenMap(recipes),
        blocks=tuple(build.build_group(item) for item in top["blocks"].value),
        data=build.build_data(top.get("data")),
        schedule=build.build_schedule(top["schedule"].plain()) if "schedule" in top else DEFAULT_SCHEDULE,
    )
