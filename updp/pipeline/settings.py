"""``--set key=value`` on a spec: its schedule, and also its model, its data settings and its input.

A setting of the schedule leaves the spec what it is. The others give another spec, with a text and a hash of its own,
so that a network made from it can be rebuilt from that text alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from updp.errors import InputError, Place, Problem, SpecError
from updp.spec import ArchSpec, apply_settings, parse_spec
from updp.spec.tree import read_tree, read_value

_SPEC_KEYS = ("model", "data", "input")


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings that change the spec itself, and settings of its schedule."""
    of_spec = [s for s in settings if s.partition("=")[0].strip().partition(".")[0] in _SPEC_KEYS]
    return of_spec, [s for s in settings if s not in of_spec]


def resolve(spec: ArchSpec, settings: Sequence[str]) -> ArchSpec:
    """The spec under these settings.

    Raises:
        InputError: with every setting that is unknown or has a wrong value.
    """
    of_spec, of_schedule = split_settings(settings)
    problems: list[Problem] = []
    try:
        spec = _rewrite(spec, of_spec)
    except InputError as error:
        problems += error.problems
    try:
        spec = apply_settings(spec, of_schedule)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    return spec


def _rewrite(spec: ArchSpec, settings: Sequence[str]) -> ArchSpec:
    """The spec that the changed text gives. JSON is YAML, so the text needs no other writer."""
    if not settings:
        return spec
    document = read_tree(spec.text, spec.file).plain()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            message = "allowed: KEY=VALUE, for example model.drop_path_rate=0.1"
            raise InputError([Problem(Place(f"--set {setting}"), "", message)])
        _put(document, key.strip().split("."), read_value(text, f"--set {setting}").plain(), setting)
    shown = f"{spec.name} with {' '.join(f'--set {setting}' for setting in settings)}"
    try:
        changed = parse_spec(json.dumps(document, indent=2, ensure_ascii=False) + "\n", file=shown, name=spec.name)
    except SpecError as error:  # lines and columns of the rewritten text would help nobody
        raise InputError([replace(problem, place=Place(shown)) for problem in error.problems]) from None
    return replace(changed, file=spec.file)


def rewrite(spec: ArchSpec, changes: Mapping[str, Any]) -> ArchSpec:
    """The spec with other values at these paths, and the text that says so."""
    document = read_tree(spec.text, spec.file).plain()
    for path, value in changes.items():
        _put(document, path.split("."), value, f"{path}={value}")
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    changed = parse_spec(text, file=spec.file, name=spec.name)
    if changed.model == spec.model:  # the place in the user's own file is the one that helps
        changed = replace(changed, model=spec.model)
    return replace(changed, schedule=spec.schedule)


def composed_at_start(spec: ArchSpec, *, append: bool = True) -> ArchSpec:
    """The spec with operators that are composed before anything is trained, so that they can be solved for.

    Args:
        append: whether recipes append what they say. An appended activation is of use only once it has been trained;
            before, it would only have to be kept out of the way.
    """
    changes: dict[str, Any] = {}
    for name in (name for name, recipe in spec.recipes.items() if recipe.kind == "prune"):
        changes[f"recipes.{name}.compose"] = "start"
        if not append:
            changes[f"recipes.{name}.append"] = []
    return rewrite(spec, changes)


def _put(document: dict[str, Any], path: Sequence[str], value: Any, setting: str) -> None:
    for part in path[:-1]:
        inner = document.setdefault(part, {})
        if not isinstance(inner, dict):
            raise InputError([Problem(Place(f"--set {setting}"), "", f"{part} is a value: it has no {path[-1]}")])
        document = inner
    document[path[-1]] = value
