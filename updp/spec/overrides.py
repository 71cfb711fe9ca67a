"""Settings from the command line (``--set finetune.epochs=3``) on top of a spec's schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from updp.errors import InputError, Place, Problem
from updp.spec.build import build_schedule
from updp.spec.check import schedule_problems
from updp.spec.files import specs_directory
from updp.spec.language import ArchSpec
from updp.spec.schema import load_schema, schema_problems
from updp.spec.tree import Tree, read_value


def apply_settings(spec: ArchSpec, settings: Sequence[str]) -> ArchSpec:
    """The spec with other values in its schedule.

    Args:
        spec: the spec; its text and hash stay what they are.
        settings: each ``KEY=VALUE``. The key is a path below ``schedule`` (``finetune.epochs``, ``blend.K``);
            one that starts with ``train`` sets all three training stages. The value is written as in YAML.
            Of two for one key, the later wins.

    Raises:
        InputError: with all settings that have an unknown key or a value of the wrong type or range.
    """
    schedule = spec.schedule
    problems: list[Problem] = []
    for setting in settings:
        tree = _read(setting, problems)
        found = [] if tree is None else _problems(tree)
        problems += found
        if tree is not None and not found:
            schedule = build_schedule(tree.plain(), schedule)
    if problems:
        raise InputError(problems)
    return dataclasses.replace(spec, schedule=schedule)


def _read(setting: str, problems: list[Problem]) -> Tree | None:
    """A setting as the tree that a spec file with only this value would have under ``schedule``."""
    place = Place(f"--set {setting}")
    key, equals, text = setting.partition("=")
    path = key.strip().removeprefix("schedule.").split(".")
    if not equals or not all(path):
        problems.append(Problem(place, "", "allowed: KEY=VALUE, for example finetune.epochs=3"))
        return None
    try:
        tree = read_value(text, place.file)
    except InputError as error:
        problems += [Problem(place, ".".join(path), problem.message) for problem in error.problems]
        return None
    tree = _at(tree, place)
    for part in reversed(path):
        tree = Tree({part: tree}, place, {part: place})
    return tree


def _at(tree: Tree, place: Place) -> Tree:
    """The same tree with every place replaced: a line and a column say nothing about an option."""
    if isinstance(tree.value, dict):
        items = {key: _at(item, place) for key, item in tree.value.items()}
        return Tree(items, place, dict.fromkeys(items, place))
    if isinstance(tree.value, list):
        return Tree([_at(item, place) for item in tree.value], place)
    return Tree(tree.value, place)


def _problems(tree: Tree) -> list[Problem]:
    schema = load_schema(specs_directory())
    part = {"$schema": schema["$schema"], "$ref": "#/$defs/schedule", "$defs": schema["$defs"]}
    found = [problem for _, problem in schema_problems(tree, part)]
    return found or schedule_problems(tree, ())
