"""A valid tree -> the dataclasses of :mod:`updp.spec.language`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeVar

from updp.frozen import FrozenMap, freeze
from updp.spec.language import (
    Across,
    Append,
    BlockGroup,
    DataSettings,
    Flow,
    ModelSource,
    Moment,
    Negate,
    Node,
    Opaque,
    Recipe,
    Replace,
    Resize,
    Step,
    Sum,
)
from updp.spec.settings import DEFAULT_SCHEDULE, STAGES, Schedule, TrainSettings
from updp.spec.tree import Tree

S = TypeVar("S")

SOURCES = ("timm", "python")
"""Keys of ``model`` that say what builds the network; a spec has one of them."""


def build_flow(tree: Tree) -> Flow:
    """A list of steps."""
    return tuple(_node(item) for item in tree.value)


def _node(tree: Tree) -> Node:
    value, place = tree.value, tree.place
    if isinstance(value, str):
        return Negate(place) if value == "negate" else Step(value, place=place)
    if "optional" in value:
        return Step(value["optional"].value, optional=True, place=place)
    if "opaque" in value:
        return Opaque(value["opaque"].value, _strings(tree, "enters"), _strings(tree, "leaves"), place)
    if "sum" in value:
        name = value["as"].value if "as" in value else None
        return Sum(tuple(build_flow(branch) for branch in value["sum"].value), name, place)
    return Across(value["across"].value, build_flow(value["flow"]), place)


def _strings(tree: Tree, key: str) -> tuple[str, ...]:
    item = tree.get(key)
    return () if item is None else tuple(part.value for part in item.items())


def build_recipe(name: str, tree: Tree) -> Recipe:
    """A recipe whose ``extends`` has been resolved (see :func:`resolve_recipe`)."""
    empty = Tree({}, tree.place)
    replaced, resized = (tree.get(key) or empty for key in ("replace", "resize"))
    replace = {key: Replace(item.value, item.place) for key, item in replaced.value.items()}
    resize = {key: _resize(item) for key, item in resized.value.items()}
    options = {key: tree.value[key].value for key in ("padding", "kind", "compose") if key in tree.value}
    merge = tree.get("merge")
    if merge is not None and merge.value != "all":
        options["merge"] = tuple(tuple(step.value for step in run.value) for run in merge.value)
        options["merge_places"] = tuple(tuple(step.place for step in run.value) for run in merge.value)
    append = _append(tree.get("append"))
    return Recipe(name, FrozenMap(replace), FrozenMap(resize), append, place=tree.place, **options)


def _resize(tree: Tree) -> Resize:
    if not isinstance(tree.value, dict):
        return Resize(int(tree.value), place=tree.place)
    at = tree.get("at")
    moment = Moment(fraction=0.0) if at is None else _moment(at.plain())
    return Resize(int(tree.value["kernel"].value), moment, tree.place)


def _moment(value: Any) -> Moment:
    if isinstance(value, dict):
        return Moment(epoch=int(value["epoch"]))
    return Moment(fraction=float(Fraction(value)))


def _append(tree: Tree | None) -> tuple[Append, ...]:
    result: list[Append] = []
    run: list[Tree] = []  # bare names in a row are one Append
    for item in [] if tree is None else tree.value:
        if isinstance(item.value, str):
            run.append(item)
            continue
        result += _end_of(run)
        layers = tuple(layer.value for layer in item.value["layers"].value)
        result.append(Append(layers, item.value["after"].value, item.place))
        run = []
    return tuple(result + _end_of(run))


def _end_of(run: list[Tree]) -> list[Append]:
    return [Append(tuple(item.value for item in run), None, run[0].place)] if run else []


def resolve_recipe(name: str, trees: Mapping[str, Tree]) -> Tree:
    """Follow ``extends``: mappings are merged key by key, all else is replaced. There must be no cycle."""
    tree = trees[name]
    parent = tree.get("extends")
    if parent is None:
        return tree
    base = resolve_recipe(parent.value, trees)
    merged = Tree(dict(base.value), tree.place, dict(base.keys))
    for key, item in tree.value.items():
        old = merged.value.get(key)
        if old is not None and isinstance(item.value, dict) and isinstance(old.value, dict):
            item = Tree(old.value | item.value, item.place, old.keys | item.keys)
        merged.value[key] = item
        merged.keys[key] = tree.keys[key]
    merged.value.pop("extends", None)
    return merged


def build_group(tree: Tree) -> BlockGroup:
    """One entry of ``blocks``."""
    match = tree.value["match"].items()
    excepted = tree.value["except"].items() if "except" in tree.value else []
    return BlockGroup(
        match=tuple(item.value for item in match),
        except_=tuple(item.value for item in excepted),
        structure=tree.value["structure"].value,
        recipes=tuple(item.value for item in tree.value["recipes"].value),
        place=tree.place,
        match_places=tuple(item.place for item in match),
        except_places=tuple(item.place for item in excepted),
    )


def build_model(tree: Tree) -> ModelSource:
    """Every key but ``timm`` and ``python`` is an argument of what builds the network."""
    kwargs = FrozenMap({key: freeze(item.plain()) for key, item in tree.value.items() if key not in SOURCES})
    if "timm" in tree.value:
        return ModelSource(tree.value["timm"].value, kwargs, place=tree.place)
    item = tree.value["python"]
    module, _, function = item.value.partition(":")
    return ModelSource(function, kwargs, module, item.place)


def build_data(tree: Tree | None) -> DataSettings:
    """The data settings that the spec overrides."""
    return replace_fields(DataSettings(), {} if tree is None else tree.plain())


def build_schedule(values: Mapping[str, Any], start: Schedule = DEFAULT_SCHEDULE) -> Schedule:
    """Plain, valid values of ``schedule`` on top of ``start``; ``train`` first, then each stage's own."""
    changes: dict[str, Any] = {key: values[key] for key in ("seed", "held_out") if key in values}
    for stage in STAGES:
        settings: TrainSettings = getattr(start, stage)
        settings = replace_fields(settings, values.get("train", {}))
        changes[stage] = replace_fields(settings, values.get(stage, {}))
    changes["distill"] = replace_fields(start.distill, values.get("distill", {}))
    changes["search"] = replace_fields(start.search, values.get("search", {}))
    changes["blend"] = replace_fields(start.blend, values.get("blend", {}))
    changes["teacher"] = replace_fields(start.teacher, values.get("teacher", {}))
    return replace_fields(start, changes)


def replace_fields(instance: S, values: Mapping[str, Any]) -> S:
    """``dataclasses.replace`` that also takes ``1.0`` for an int and ``1`` for a float."""
    hints = typing.get_type_hints(type(instance))
    changes = {key: _as_field(value, hints[key]) for key, value in values.items()}
    return dataclasses.replace(instance, **changes)  # type: ignore[type-var]


def _as_field(value: Any, hint: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, list)):
        return value
    kinds = {hint, *typing.get_args(hint)}
    if isinstance(value, list):
        return tuple(float(item) for item in value)
    return int(value) if int in kinds else float(value) if float in kinds else value
