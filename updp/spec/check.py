"""What is wrong with a spec beyond its schema: names that mean nothing, numbers that contradict each other.

Works on what the schema left usable, so that one run reports as many errors as can be known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

from updp.errors import Place, Problem, suggest
from updp.spec import build
from updp.spec.language import DataSettings, Flow, Opaque, Recipe, Step, Sum, names_in, walk
from updp.spec.schema import TreePath, count, unit, where
from updp.spec.settings import STAGES
from updp.spec.tree import Tree

_IMAGE_KEYS = tuple(field.name for field in dataclasses.fields(DataSettings))


def cross_problems(tree: Tree, usable: Tree, damaged: Iterable[TreePath]) -> list[Problem]:
    """Problems of a spec given as its whole tree, its usable part, and the paths that the schema refused."""
    units = {unit(path) for path in damaged if path}
    check = _Check(tree, usable, units)
    problems = [
        *check.recipes(),
        *check.structures(),
        *check.groups(),
        *check.unused(),
        *check.model(),
        *check.images(),
    ]
    if "schedule" in usable.value:
        problems += schedule_problems(usable.value["schedule"], ("schedule",))
    return problems


def schedule_problems(schedule: Tree, path: TreePath) -> list[Problem]:
    """Ranges in a valid ``schedule`` that are the wrong way round."""
    problems = []
    for stage in ("train", *STAGES, "distill"):
        settings = schedule.get(stage)
        scale = settings.get("scale") if settings is not None else None
        if scale is not None and scale.value is not None and scale.value[0].value > scale.value[1].value:
            message = f"got {scale.plain()}, allowed: the smaller number first"
            problems.append(Problem(scale.place, where((*path, stage, "scale")), message))
    return problems


class _Check:
    """One check of one tree."""

    def __init__(self, tree: Tree, usable: Tree, damaged: set[TreePath]) -> None:
        self.tree = tree
        self.damaged = damaged
        self.named = {section: _section(tree, section) for section in ("structures", "recipes")}
        self.trees: Mapping[str, Tree] = _section(usable, "recipes")
        self.flows = {name: build.build_flow(item) for name, item in _section(usable, "structures").items()}
        self.usable = usable
        self.has_unknown_names = False

    def recipes(self) -> Iterator[Problem]:
        """``extends`` that leads nowhere or in a circle, and moments after the end."""
        for name, tree in self.trees.items():
            extends = tree.get("extends")
            path = ("recipes", name, "extends")
            if extends is not None and extends.value not in self.named["recipes"]:
                self.has_unknown_names = True
                others = [other for other in self.named["recipes"] if other != name]
                message = f"no such recipe: {suggest(extends.value, others)}"
                yield Problem(extends.place, where(path), message)
            elif extends is not None and name in (chain := self.chain(name))[1:]:
                message = f"extends itself: {' -> '.join(chain)}"
                yield Problem(extends.place, where(path), message)
            yield from _late_moments(name, tree)

    def chain(self, name: str) -> list[str]:
        """The recipe, the one it extends, and so on; ends at the first that is missing or seen before."""
        chain: list[str] = []
        while name not in chain and name in self.trees:
            chain.append(name)
            extends = self.trees[name].get("extends")
            if extends is None:
                return chain
            name = extends.value
        return [*chain, name]

    def resolved(self, name: str) -> Recipe | None:
        """The recipe with ``extends`` resolved, None if it cannot be."""
        chain = self.chain(name)
        if len(set(chain)) < len(chain) or any(link not in self.trees for link in chain):
            return None
        return build.build_recipe(name, build.resolve_recipe(name, self.trees))

    def structures(self) -> Iterator[Problem]:
        """Names of sums that mean two things."""
        for name, flow in self.flows.items():
            names = names_in(flow)
            for node in walk(flow):
                if isinstance(node, Sum) and node.name is not None and names.count(node.name) > 1:
                    message = f"the name {node.name!r} is there already, as a step or another sum"
                    yield Problem(node.place, where(("structures", name)), message)
                if isinstance(node, (Step, Opaque)) and node.path == "negate":
                    message = "got 'negate', which is reserved: write it as a bare step to multiply by -1"
                    yield Problem(node.place, where(("structures", name)), message)

    def groups(self) -> Iterator[Problem]:
        """Blocks of unknown structures and recipes, and recipes that do not fit their blocks' structure."""
        seen: set[Problem] = set()
        for index, tree in enumerate(_items(self.usable, "blocks")):
            yield from _bad_slices(index, tree)
            structure, recipes = tree.get("structure"), tree.get("recipes")
            if structure is not None:
                yield from self.known("structures", structure, ("blocks", index, "structure"))
            for number, item in enumerate([] if recipes is None else recipes.value):
                yield from self.known("recipes", item, ("blocks", index, "recipes", number))
                if structure is not None and structure.value in self.flows:
                    problems = set(self.misfits(item.value, structure.value)) - seen
                    seen |= problems
                    yield from problems

    def known(self, section: str, item: Tree, path: TreePath) -> Iterator[Problem]:
        if item.value not in self.named[section] and self.named[section]:
            self.has_unknown_names = True
            message = f"no such {section[:-1]}: {suggest(item.value, self.named[section])}"
            yield Problem(item.place, where(path), message)

    def misfits(self, name: str, structure: str) -> Iterator[Problem]:
        """Parts that a recipe names and a structure lacks."""
        recipe = self.resolved(name)
        if recipe is None:
            return
        flow = self.flows[structure]
        steps, sums = _parts(flow)
        for part, path, place, allowed in self.named_parts(recipe, steps, sums):
            inside = any(part.startswith(f"{step}.") for step in steps) and path[2] != "resize"
            if part not in allowed and not inside:
                message = f"structure {structure!r} has no such step: {suggest(part, allowed)}"
                yield Problem(place, where(path), message)

    def named_parts(
        self, recipe: Recipe, steps: list[str], sums: list[str]
    ) -> Iterator[tuple[str, TreePath, Place | None, list[str]]]:
        """Each part that a recipe names, where it does so, and the names that are allowed there."""
        for section in ("replace", "resize"):
            for part in getattr(recipe, section):
                owner = self.owner(recipe.name, section, part)
                place = self.trees[owner].value[section].keys[part]
                yield part, ("recipes", owner, section, part), place, steps
        owner = self.owner(recipe.name, "append")
        append = self.trees[owner].get("append")
        for index, item in enumerate([] if append is None else append.value):
            if isinstance(item.value, dict):
                path = ("recipes", owner, "append", index, "after")
                yield item.value["after"].value, path, item.value["after"].place, steps + sums
        owner = self.owner(recipe.name, "merge")
        for run, (parts, places) in enumerate(zip(recipe.merge, recipe.merge_places, strict=False)):
            for index, (part, place) in enumerate(zip(parts, places, strict=True)):
                yield part, ("recipes", owner, "merge", run, index), place, steps + sums

    def owner(self, name: str, section: str, key: str | None = None) -> str:
        """The recipe in the chain of ``extends`` that wrote this section, or this key of it."""
        for link in self.chain(name):
            tree = self.trees[link].get(section)
            if tree is not None and (key is None or key in tree.value):
                return link
        return name

    def unused(self) -> Iterator[Problem]:
        """Structures and recipes that no block has. Not told while names in ``blocks`` may be misspelt.

        Of an included file a spec may use a part.
        """
        groups = _items(self.usable, "blocks")
        if self.has_unknown_names or not groups or any(path[0] == "blocks" for path in self.damaged):
            return
        used = {"structures": {group.value["structure"].value for group in groups}}
        listed = {item.value for group in groups for item in group.value["recipes"].value}
        used["recipes"] = {link for name in listed for link in self.chain(name)}
        for section, names in self.named.items():
            for name, tree in names.items():
                place = self.tree.value[section].keys.get(name, tree.place)
                if name not in used[section] and place.file == self.tree.place.file:
                    yield Problem(place, where((section, name)), "never used: no entry of `blocks` names it")

    def model(self) -> Iterator[Problem]:
        """Two sources of one network, or one that leaves the images' settings unsaid."""
        model = self.usable.get("model")
        if model is None or "python" not in model.value:
            return
        if "timm" in model.value:
            yield Problem(model.keys["python"], "model", "got both 'timm' and 'python', allowed: one of them")
            return
        data = self.tree.get("data")
        missing = [key for key in _IMAGE_KEYS if data is None or key not in data.value]
        if missing and (data is None or isinstance(data.value, dict)):
            message = f"lacks {', '.join(missing)}, which no network but timm's brings along"
            yield Problem((data or model.value["python"]).place, "data", message)

    def images(self) -> Iterator[Problem]:
        """A mean or standard deviation for another number of channels than the images have."""
        data, shape = self.usable.get("data"), self.usable.get("input")
        if data is None or shape is None:
            return
        channels = int(shape.value[0].value)
        for key in ("mean", "std"):
            item = data.get(key)
            if item is not None and len(item.value) != channels:
                message = f"got {count(item.value)}, allowed: {channels}, one for each channel of the input"
                yield Problem(item.place, where(("data", key)), message)


def _section(tree: Tree, name: str) -> dict[str, Tree]:
    item = tree.get(name)
    return item.value if item is not None and isinstance(item.value, dict) else {}


def _items(tree: Tree, name: str) -> list[Tree]:
    item = tree.get(name)
    return item.value if item is not None and isinstance(item.value, list) else []


def _parts(flow: Flow) -> tuple[list[str], list[str]]:
    """Names of the steps and of the sums of a flow."""
    sums = [node.name for node in walk(flow) if isinstance(node, Sum) and node.name is not None]
    steps = [node.path for node in walk(flow) if isinstance(node, (Step, Opaque))]
    return list(dict.fromkeys(steps)), sums


def _late_moments(name: str, tree: Tree) -> Iterator[Problem]:
    resize = tree.get("resize")
    for step, item in ({} if resize is None else resize.value).items():
        at = item.get("at") if isinstance(item.value, dict) else None
        if at is not None and isinstance(at.value, str) and Fraction(at.value) > 1:
            path = ("recipes", name, "resize", step, "at")
            yield Problem(at.place, where(path), f"got {at.value}, allowed: from 0 to 1")


def _bad_slices(index: int, tree: Tree) -> Iterator[Problem]:
    for key in ("match", "except"):
        item = tree.get(key)
        for number, pattern in enumerate([] if item is None else item.items()):
            _, bracket, bounds = pattern.value.partition("[")
            if bracket:
                first, last = map(int, bounds.rstrip("]").split(":"))
                if first >= last:
                    is_list = item is not None and isinstance(item.value, list)
                    path = ("blocks", index, key, number) if is_list else ("blocks", index, key)
                    message = f"got {pattern.value!r}, which is empty: [first:end] needs first < end"
                    yield Problem(pattern.place, where(path), message)
