"""The network as it is drawn: its blocks in order, what became of each, and what the recipes do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import groupby

from updp.report.read import Record, Run
from updp.spec import Recipe
from updp.subnet import KEEP


@dataclass(frozen=True)
class BlockView:
    """A block of the drawn network. ``depth`` is (before, after) in layers where it is known."""

    name: str
    short: str
    choice: str | None
    pruned: bool
    depth: tuple[int, int] | None
    title: str


@dataclass(frozen=True)
class Group:
    """Consecutive blocks that share a path prefix."""

    name: str
    blocks: list[BlockView]


def network(run: Run) -> list[Group]:
    """The blocks in order of execution, grouped by the path before their last number."""
    depths = [_depths(run.stage("merge").record(side)) for side in ("before", "after")]
    merged = _merged_ops(run)
    views = []
    for block in run.about.records("blocks"):
        name = block.text("name") or "?"
        choice = run.subnet.choice(name) if run.subnet else None
        before, after = (side.get(name) for side in depths)
        depth = (before, after) if before is not None and after is not None else None
        pruned = choice not in (None, KEEP)
        offers = ", ".join(block.texts("recipes"))
        facts = [
            f"structure {block.text('structure') or '?'}",
            "kept"
            if choice == KEEP
            else f"pruned by {choice}"
            if pruned
            else f"may be pruned by {offers or 'nothing'}",
            f"layers in depth: {before} before, {after} after" if depth else "",
            f"merged: {', '.join(merged[name])}" if name in merged else "",
        ]
        title = "; ".join([name, *(fact for fact in facts if fact)])
        views.append((_prefix(name), BlockView(name, name, choice, pruned, depth, title)))
    return [_group(prefix, [view for _, view in members]) for prefix, members in groupby(views, lambda item: item[0])]


def _prefix(name: str) -> str:
    """The path of a block up to its last number: ``a1.0`` -> ``a1``, ``a.3.mlp`` -> ``a``, ``a[2:5]`` -> ``a``."""
    parts = name.split("[")[0].split(".")
    if "[" in name:
        return ".".join(parts)
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1]] if numbers else parts[:-1])


def _group(prefix: str, blocks: list[BlockView]) -> Group:
    def shorten(name: str) -> str:
        return name.removeprefix(prefix).removeprefix(".") or name

    return Group(prefix, [dataclasses.replace(block, short=shorten(block.name)) for block in blocks])


def _depths(side: Record) -> dict[str, int]:
    pairs = ((block.text("name"), block.number("depth")) for block in side.records("blocks"))
    return {name: min(int(depth), 99) for name, depth in pairs if name is not None and depth is not None and depth >= 0}


def _merged_ops(run: Run) -> dict[str, list[str]]:
    ops: dict[str, list[str]] = {}
    for op in run.stage("merge").record("certificate").records("ops"):
        ops.setdefault(op.text("block") or "?", []).append(op_name(op))
    return ops


def op_name(op: Record) -> str:
    """A merged operator by what it was merged from, or by its place in the merged network."""
    return " + ".join(op.texts("steps")) or op.text("op") or "?"


def recipes(run: Run) -> list[tuple[str, str]]:
    """(name, what it does) of every recipe that the run's subnet uses, or may use while there is no subnet."""
    if run.spec is None:
        return []
    offered = {name for block in run.about.records("blocks") for name in block.texts("recipes")}
    used = set(run.subnet.choices.values()) if run.subnet else offered
    return [(name, _recipe(recipe)) for name, recipe in run.spec.recipes.items() if name in used]


def _recipe(recipe: Recipe) -> str:
    parts = [f"{step} becomes {new.target}" for step, new in recipe.replace.items()]
    parts += [f"{step} shrinks to {size.kernel}×{size.kernel}" for step, size in recipe.resize.items()]
    for append in recipe.append:
        parts.append(f"{', '.join(append.layers)} appended{f' after {append.after}' if append.after else ''}")
    if recipe.merge == "all":
        parts.append("everything affine is merged")
    else:
        parts += [f"{' + '.join(steps)} become one layer" for steps in recipe.merge]
    return "; ".join(parts)
