"""What ``specs/schema.json`` finds wrong with a tree, said so that a person can act on it.

The library's own messages are for programmers: where several forms are allowed it shows all of them. Here the
form that the author most likely meant is found first, and what is wrong with that one is told.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from updp.errors import Problem, UpdpError, suggest
from updp.spec.tree import Tree

TreePath: TypeAlias = tuple[str | int, ...]

_TYPES = {
    "array": "a list",
    "object": "a mapping",
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
_LIMITS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "minProperties": "at least {}",
    "minLength": "at least {} character",
}


@functools.cache
def load_schema(directory: Path) -> dict[str, Any]:
    """The schema of spec files, as plain data.

    Raises:
        UpdpError: if the installation has lost it.
    """
    try:
        schema: dict[str, Any] = json.loads((directory / "schema.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UpdpError(f"the schema of specs cannot be read: {error}") from None
    return schema


def schema_problems(tree: Tree, schema: dict[str, Any]) -> list[tuple[TreePath, Problem]]:
    """All violations, each with the path of what is wrong: the part of the tree that cannot be used."""
    validator = Draft202012Validator(schema)
    found: dict[tuple[TreePath, Problem], None] = {}
    for error in validator.iter_errors(tree.plain()):
        for leaf in _most_relevant(error):
            for path, problem in _render(leaf, tree):
                found[path, problem] = None
    return list(found)


def where(path: Sequence[str | int]) -> str:
    """A path as a person writes it.

    >>> where(["blocks", 3, "recipes", 0]), where(["recipes", "full", "replace", "mlp.act"])
    ('blocks[3].recipes[0]', "recipes.full.replace['mlp.act']")
    """
    text = ""
    for part in path:
        if isinstance(part, str) and part.isidentifier():
            text += f".{part}" if text else part
        else:
            text += f"[{part!r}]"
    return text


def show(value: Any) -> str:
    """A value, short enough for a message, in YAML's words."""
    if isinstance(value, dict):
        inner = ", ".join(repr(key) for key in value)
        text = f"a mapping with {inner}" if value else "an empty mapping"
    elif isinstance(value, list):
        text = "a list" if value else "an empty list"
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _most_relevant(error: ValidationError) -> Iterator[ValidationError]:
    """The error itself, or for ``anyOf`` those of the form that was most likely meant."""
    if error.validator != "anyOf":
        yield error
        return
    forms: dict[int, list[ValidationError]] = {}
    for inner in error.context or ():
        forms.setdefault(int(inner.relative_schema_path[0]), []).append(inner)
    fitting = {index: inner for index, inner in forms.items() if not any(map(_is_other_kind, inner))}
    if len(fitting) > 1:
        listed: Any = error.validator_value
        fitting = {index: inner for index, inner in fitting.items() if _has_own_key(listed[index], error.instance)}
    if len(fitting) != 1:
        yield error
        return
    for inner in next(iter(fitting.values())):
        yield from _most_relevant(inner)


def _is_at_top(error: ValidationError) -> bool:
    return not error.relative_path


def _is_other_kind(error: ValidationError) -> bool:
    """Whether the value is of another kind than this form, so that the form was not meant."""
    if not _is_at_top(error):
        return False
    if error.validator in ("enum", "const"):
        return isinstance(error.instance, (list, dict))
    return error.validator == "type"


def _has_own_key(form: dict[str, Any], value: Any) -> bool:
    """Whether the value has a key that tells this form from the others."""
    return isinstance(value, dict) and bool(set(form.get("required", ())) & set(value))


def _render(error: ValidationError, tree: Tree) -> Iterator[tuple[TreePath, Problem]]:
    path: TreePath = tuple(error.absolute_path)
    node = _descend(tree, path)
    schema: Any = error.schema
    listed: Any = error.validator_value
    if "propertyNames" in error.absolute_schema_path and isinstance(error.instance, str):
        key = error.instance
        yield (*path, key), Problem(node.keys[key], where(path), f"bad key: {_message(error)}")
    elif error.validator == "additionalProperties":
        known = schema.get("properties", {})
        for key in node.value:
            if key not in known:
                problem = Problem(node.keys[key], where(path), f"unknown key: {suggest(key, known)}")
                yield (*path, key), problem
    elif error.validator == "required":
        for key in listed:
            if key not in node.value:
                yield path, Problem(node.place, where(path), f"the key {key!r} is missing")
    elif error.validator == "uniqueItems":
        values = [item.plain() for item in node.value]
        for index, item in enumerate(node.value):
            if values[index] in values[:index]:
                message = f"got {show(values[index])} twice"
                yield (*path, index), Problem(item.place, where((*path, index)), message)
    else:
        yield path, Problem(node.place, where(path), _message(error))


def _message(error: ValidationError) -> str:
    got: Any = error.instance
    limit: Any = error.validator_value
    schema: Any = error.schema
    if error.validator == "enum":
        return _one_of(got, limit)
    if error.validator == "const":
        return _one_of(got, [limit])
    if error.validator == "type":
        kinds = [limit] if isinstance(limit, str) else limit
        allowed = " or ".join(_TYPES[kind] for kind in kinds)
        return f"got {_with_kind(got)}, allowed: {allowed}{_hint(got, kinds)}"
    if error.validator in _LIMITS:
        shown = count(got) if isinstance(got, (list, dict)) else show(got)
        return f"got {shown}, allowed: {_LIMITS[error.validator].format(limit)}"
    if error.validator == "anyOf":
        kinds = [str(inner.validator_value) for inner in error.context or () if inner.validator == "type"]
        return f"got {_with_kind(got)}, allowed: {_forms(limit)}{_nearest_key(got, limit)}{_hint(got, kinds)}"
    return f"got {show(got)}, allowed: {schema.get('description', 'something else')}"


def count(entries: list[Any] | dict[str, Any]) -> str:
    """How many entries a list or a mapping has, in words."""
    return "1 entry" if len(entries) == 1 else f"{len(entries)} entries"


def _one_of(got: Any, allowed: Sequence[Any]) -> str:
    names = [value if isinstance(value, str) else show(value) for value in allowed]
    if isinstance(got, str) and got not in names:
        return suggest(got, names)
    is_other_kind = all(type(value) is not type(got) for value in allowed)
    return f"got {_with_kind(got) if is_other_kind else show(got)}, allowed: {', '.join(names)}"


def _with_kind(value: Any) -> str:
    kinds = ((bool, ""), (str, " (a string)"), ((int, float), " (a number)"))
    return show(value) + next((kind for type_, kind in kinds if isinstance(value, type_)), "")


def _hint(got: Any, kinds: Sequence[str]) -> str:
    is_number = isinstance(got, (int, float)) and not isinstance(got, bool)
    return f" (write '{got}' in quotes)" if is_number and "string" in kinds else ""


def _forms(forms: Sequence[dict[str, Any]]) -> str:
    return "; ".join(str(form["title"]) for form in forms)


def _nearest_key(got: Any, forms: Sequence[dict[str, Any]]) -> str:
    allowed = dict.fromkeys(key for form in forms for key in form.get("required", ()))
    keys = got if isinstance(got, dict) else ()
    hints = (suggest(key, allowed).partition(" (did you mean ")[2] for key in keys if key not in allowed)
    return next((f" (did you mean {hint}" for hint in hints if hint), "")


def _descend(tree: Tree, path: TreePath) -> Tree:
    for part in path:
        tree = tree.value[part]
    return tree


def without(tree: Tree, paths: Iterable[TreePath]) -> Tree:
    """A copy of the tree without the units (see :func:`unit`) that these paths are in.

    A lost entry of a list becomes an empty mapping, so that the others keep their places.
    """
    result, _ = tree.copy()
    for path in sorted({unit(path) for path in paths if path}, key=len, reverse=True):
        parent = _descend(result, path[:-1])
        if isinstance(parent.value, dict):
            parent.value.pop(path[-1], None)
        else:
            parent.value[path[-1]] = Tree({}, parent.value[path[-1]].place)
    return result


def unit(path: TreePath) -> TreePath:
    """The smallest part around a path that can be left out while the rest can still be checked."""
    depth = {"structures": 2, "recipes": 3, "blocks": 3, "model": 2, "data": 2}.get(str(path[0]), 1)
    if len(path) > 3 and path[2] in ("replace", "resize"):
        depth = 4
    return path[:depth]
