"""``include``: what the specs of one family share stands in one file.

A spec that says ``include: families/x.yaml`` starts from that file: mappings are merged key by key at every depth,
and everything else that the spec gives itself replaces what the file says. Of several files the later wins. The
result is a spec like any other, with a text that needs no other file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from updp.errors import Place, Problem, SpecError, suggest
from updp.spec.tree import Tree, read_text, read_tree, scalar

KEY = "include"
FAMILIES = "families"
_HEADER = "# A spec as updp read it: what it includes is written out.\n"
_WIDTH = 110


def expand(tree: Tree, path: Path, shipped: Path) -> Tree:
    """The tree with what it includes below it; the tree itself if it includes nothing.

    Args:
        path: the file that the tree was read from: a path in ``include`` is relative to it.
        shipped: where such a path is looked for next: the directory of the shipped specs.

    Raises:
        SpecError: a file that cannot be read, is no mapping, or includes itself.
    """
    return _expand(tree, [path], shipped)


def _expand(tree: Tree, chain: list[Path], shipped: Path) -> Tree:
    items = _included(tree)
    if not items:
        return tree
    whole = Tree({}, tree.place)
    for item in items:
        path = _find(item, chain[-1].parent, shipped)
        if any(path.resolve() == other.resolve() for other in chain):
            names = " -> ".join(str(other) for other in (*chain, path))
            raise _refusal(item.place, f"includes itself: {names}")
        base = read_tree(read_text(path), str(path))
        if not isinstance(base.value, dict):
            raise SpecError([Problem(base.place, "", "allowed: a mapping, with the keys that a spec has")])
        whole = overlay(whole, _expand(base, [*chain, path], shipped))
    return overlay(whole, _without_key(tree))


def refuse(tree: Tree) -> None:
    """Raise `SpecError` if a tree that was not read from a file of its own includes another."""
    if items := _included(tree):
        message = "a text that stands alone can include nothing: there is no file to look beside"
        raise _refusal(items[0].place, message)


def _included(tree: Tree) -> list[Tree]:
    item = tree.get(KEY) if isinstance(tree.value, dict) else None
    items = [] if item is None else item.items()
    if item is not None and not (items and all(isinstance(each.value, str) and each.value.strip() for each in items)):
        raise _refusal(item.place, "allowed: the path of a .yaml file, such as families/NAME.yaml, or a list of them")
    return items


def _refusal(place: Place, message: str) -> SpecError:
    return SpecError([Problem(place, KEY, message)])


def _find(item: Tree, beside: Path, shipped: Path) -> Path:
    """The included file: beside the including one, or among the shipped, where a copied family also finds its own."""
    for folder in (beside, shipped, shipped / FAMILIES):
        with suppress(OSError):  # a name that is longer than names may be
            if (folder / str(item.value)).is_file():
                return folder / str(item.value)
    families = [path.relative_to(shipped).as_posix() for path in sorted((shipped / FAMILIES).glob("*.yaml"))]
    message = f"no such file, neither beside this one nor among the shipped: {suggest(item.value, families)}"
    raise _refusal(item.place, message)


def _without_key(tree: Tree) -> Tree:
    rest = {key: item for key, item in tree.value.items() if key != KEY}
    return Tree(rest, tree.place, {key: tree.keys[key] for key in rest})


def overlay(base: Tree, own: Tree) -> Tree:
    """``own`` above ``base``: mappings key by key, at every depth; everything else is ``own``'s."""
    if not (isinstance(base.value, dict) and isinstance(own.value, dict)):
        return own
    merged = Tree(dict(base.value), own.place, base.keys | own.keys)
    for key, item in own.value.items():
        below = base.value.get(key)
        merged.value[key] = item if below is None else overlay(below, item)
    return merged


def without_unused(tree: Tree) -> Tree:
    """A valid tree without the structures and recipes, of an included file, that no block has."""
    groups = [group.value for group in tree.value["blocks"].value]
    used = {"structures": {group["structure"].value for group in groups}, "recipes": set[str]()}
    pending = [item.value for group in groups for item in group["recipes"].value]
    while pending:
        name = pending.pop()
        used["recipes"].add(name)
        parent = tree.value["recipes"].value[name].get("extends")
        pending += [] if parent is None else [parent.value]
    result = Tree(dict(tree.value), tree.place, tree.keys)
    for section, names in used.items():
        old = tree.value[section]
        kept = {name: item for name, item in old.value.items() if name in names}
        result.value[section] = Tree(kept, old.place, {name: old.keys[name] for name in kept})
    return result


def text_of(tree: Tree, order: Sequence[str]) -> str:
    """A tree as YAML that reads back as the same values; top-level keys in this order."""
    plain = tree.plain()
    ordered = {key: plain[key] for key in order if key in plain}
    return _HEADER + yaml.dump(
        ordered, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=_WIDTH, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.2 would read as something else; writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        try:
            quoted = not isinstance(scalar(data), str)
        except ValueError:
            quoted = True
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_text)
