"""YAML text -> a tree of values that know their line and column.

Stricter than YAML: the scalars of the YAML 1.2 core schema (so ``1e-3`` is a number and ``no`` a string), no
tags, no duplicate keys, string keys only, and limits on size, depth and what aliases expand to, so that no
file can be a bomb.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from updp.errors import Place, Problem, SpecError

MAX_BYTES = 1 << 20
MAX_DEPTH = 40
MAX_NODES = 20_000
MAX_DIGITS = 18  # what fits into 64 bits

_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCT = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class Tree:
    """A YAML node: a scalar, a list of trees or a dictionary of trees; ``keys`` has the keys' places."""

    value: Any
    place: Place
    keys: dict[str, Place] = field(default_factory=dict)

    def plain(self) -> Any:
        """The values alone."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def items(self) -> list[Tree]:
        """The items of a list; a scalar counts as a list of one."""
        return self.value if isinstance(self.value, list) else [self]

    def get(self, key: str) -> Tree | None:
        """The value of a key, None if there is none."""
        item: Tree | None = self.value.get(key)
        return item

    def copy(self) -> tuple[Tree, int]:
        """A copy that shares no tree with this one, and how many nodes it has."""
        nodes = 1
        value = self.value
        if isinstance(value, dict):
            copies = {key: item.copy() for key, item in value.items()}
            nodes += sum(count for _, count in copies.values())
            value = {key: item for key, (item, _) in copies.items()}
        elif isinstance(value, list):
            pairs = [item.copy() for item in value]
            nodes += sum(count for _, count in pairs)
            value = [item for item, _ in pairs]
        return Tree(value, self.place, dict(self.keys)), nodes


def scalar(text: str) -> Any:
    """The value of a plain scalar under the YAML 1.2 core schema.

    Raises:
        ValueError: for numbers that are not finite or absurdly long.
    """
    for pattern, value in ((_NULL, None), (_TRUE, True), (_FALSE, False)):
        if pattern.fullmatch(text):
            return value
    numbers = ((_INT, 10), (_OCT, 8), (_HEX, 16))
    for pattern, base in numbers:
        if pattern.fullmatch(text):
            if len(text) > MAX_DIGITS:
                raise ValueError(f"got a number of {len(text)} digits, allowed: at most {MAX_DIGITS}")
            return int(text if base == 10 else text[2:], base)
    if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        number = math.inf if _NOT_FINITE.fullmatch(text) else float(text)
        if not math.isfinite(number):
            raise ValueError(f"got {text}, allowed: finite numbers")
        return number
    return text


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        SpecError: it cannot be read, is too large, or is not UTF-8.
    """
    place = Place(str(path))
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError([Problem(place, "", f"cannot read the spec: {reason}")]) from None
    if len(data) > MAX_BYTES:
        raise SpecError([Problem(place, "", f"the file is larger than {MAX_BYTES // 1024} KiB")])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1
        raise SpecError([Problem(Place(str(path), line, column), "", "not UTF-8 text")]) from None


def read_tree(text: str, file: str) -> Tree:
    """Parse one YAML document that holds something.

    Raises:
        SpecError: as :func:`read_value` does, and for an empty document.
    """
    tree = read_value(text, file)
    if tree.value is None:
        raise SpecError([Problem(Place(file), "", "the file is empty, it must hold a spec")])
    return tree


def read_value(text: str, file: str) -> Tree:
    """Parse one YAML document; an empty one is null.

    Raises:
        SpecError: for anything but plain data in one document; all duplicate keys are reported together.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SpecError([Problem(Place(file), "", f"the file is larger than {MAX_BYTES // 1024} KiB")])
    composer = _Composer(file)
    try:
        tree = composer.document(iter(yaml.parse(text, Loader=yaml.SafeLoader)))
    except yaml.reader.ReaderError as error:
        lines = text[: error.position].split("\n")
        place = Place(file, len(lines), len(lines[-1]) + 1)
        raise SpecError([Problem(place, "", f"not YAML: {error.reason} ({error.character!r})")]) from None
    except yaml.MarkedYAMLError as error:
        raise SpecError([_syntax_problem(error, file)]) from None
    if composer.problems:
        raise SpecError(composer.problems)
    return tree


def _syntax_problem(error: yaml.MarkedYAMLError, file: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file)
    context = f" ({error.context})" if error.context else ""
    return Problem(place, "", f"not YAML: {error.problem or 'syntax error'}{context}")


class _Composer:
    """Builds the tree from the parser's events, so that limits hold before anything large exists."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, Tree | None] = {}  # None while the anchored node is still open
        self.nodes = 0

    def document(self, events: Iterator[yaml.Event]) -> Tree:
        self.events = events
        tree: Tree | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if tree is not None:
                    self.fail(event, "got a second document, allowed: one")
                tree = self.node(next(events), 0)
        return Tree(None, Place(self.file)) if tree is None else tree

    def place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        return Place(self.file) if mark is None else Place(self.file, mark.line + 1, mark.column + 1)

    def fail(self, event: yaml.Event, message: str) -> NoReturn:
        raise SpecError([*self.problems, Problem(self.place(event), "", message)])

    def count(self, event: yaml.Event, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            self.fail(event, f"more than {MAX_NODES} values, aliases expanded")

    def node(self, event: Any, depth: int) -> Tree:
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        self.count(event, 1)
        if depth > MAX_DEPTH:
            self.fail(event, f"nested more than {MAX_DEPTH} deep")
        if event.tag is not None:
            self.fail(event, f"got the tag {event.tag!r}, tags are not allowed")
        if event.anchor is not None:
            if event.anchor in self.anchors:
                self.fail(event, f"the anchor {event.anchor!r} is there already")
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            tree = self.leaf(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            items = [self.node(item, depth + 1) for item in self.until(yaml.SequenceEndEvent)]
            tree = Tree(items, self.place(event))
        else:
            tree = self.mapping(event, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = tree
        return tree

    def until(self, end: type[yaml.Event]) -> Iterator[Any]:
        for event in self.events:
            if isinstance(event, end):
                return
            yield event

    def alias(self, event: yaml.AliasEvent) -> Tree:
        if event.anchor not in self.anchors:
            self.fail(event, f"the alias {event.anchor!r} has no anchor before it")
        target = self.anchors[event.anchor]
        if target is None:
            self.fail(event, f"the alias {event.anchor!r} stands inside what it means")
        tree, nodes = target.copy()
        self.count(event, nodes)
        return tree

    def leaf(self, event: yaml.ScalarEvent) -> Tree:
        place = self.place(event)
        if event.style is not None:
            return Tree(event.value, place)
        try:
            return Tree(scalar(event.value), place)
        except ValueError as error:
            self.problems.append(Problem(place, "", str(error)))
            return Tree(0, place)

    def mapping(self, event: yaml.Event, depth: int) -> Tree:
        tree = Tree({}, self.place(event))
        for key_event in self.until(yaml.MappingEndEvent):
            key = self.node(key_event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            if not isinstance(key.value, str):
                self.problems.append(Problem(key.place, "", _key_message(key)))
            elif key.value in tree.value:
                first = tree.keys[key.value]
                message = f"the key {key.value!r} is there already, at {first}"
                self.problems.append(Problem(key.place, "", message))
            else:
                tree.value[key.value] = value
                tree.keys[key.value] = key.place
        return tree


def _key_message(key: Tree) -> str:
    if isinstance(key.value, (list, dict)):
        return "a key must be a string, not a list or a mapping"
    shown = json.dumps(key.value)
    return f"a key must be a string; write it in quotes: '{shown}'"
