"""Which modules of a network are the blocks that a spec's patterns mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from updp.errors import Place, Problem, SpecError
from updp.spec.language import BlockGroup

_SLICE = re.compile(r"(?P<path>.*)\[(?P<first>[0-9]+):(?P<end>[0-9]+)\]")
_NEAREST = 3


@dataclass
class _Matches:
    """The modules of one network, and what has been found wrong so far."""

    names: Sequence[str]
    lengths: Mapping[str, int]
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order = {name: index for index, name in enumerate(self.names)}

    def children(self, path: str) -> list[str]:
        """Direct children of a module, in order of definition."""
        return [name for name in self.names if name.rpartition(".")[0] == path and name.rpartition(".")[1]]

    def members(self, block: str) -> list[str]:
        """The modules that a block stands for: itself, or the children that a slice takes."""
        parts = _SLICE.fullmatch(block)
        if parts is None:
            return [block]
        return self.children(parts["path"])[int(parts["first"]) : int(parts["end"])]


def match_blocks(
    groups: Sequence[BlockGroup], names: Sequence[str], lengths: Mapping[str, int]
) -> dict[str, BlockGroup]:
    """Find the blocks of a network.

    Args:
        groups: the entries of a spec's ``blocks``.
        names: paths of all modules of the network, in order of definition.
        lengths: number of children of each ``Sequential``, by path; only these can be sliced.

    Returns:
        The blocks in order of definition, each with its group. A slice of a ``Sequential`` is a block with
        the name that it is written with, all stars filled in: ``features[8:14]``.

    Raises:
        SpecError: if a pattern matches nothing or a slice does not fit, if two groups match one block, or if
            one block lies inside another. All such errors are reported together.
    """
    matches = _Matches(names, lengths)
    owners: dict[str, tuple[BlockGroup, Place | None]] = {}
    for index, group in enumerate(groups):
        for block, place in _match_group(group, f"blocks[{index}]", matches).items():
            if block in owners:
                other, first = owners[block]
                message = f"{block!r} is a block already: {_origin(other, first)}"
                matches.problems.append(Problem(place, f"blocks[{index}]", message))
            else:
                owners[block] = (group, place)
    _find_overlaps(owners, matches)
    if matches.problems:
        raise SpecError(matches.problems)
    ordered = sorted(owners, key=lambda block: matches.order[matches.members(block)[0]])
    return {block: owners[block][0] for block in ordered}


def _match_group(group: BlockGroup, where: str, matches: _Matches) -> dict[str, Place | None]:
    """Blocks of one group, each with the place of the pattern that matched it first."""
    found: dict[str, Place | None] = {}
    for pattern, place in _with_places(group.match, group.match_places, group.place):
        for block in _match_pattern(pattern, place, f"{where}.match", matches):
            found.setdefault(block, place)
    for pattern, place in _with_places(group.except_, group.except_places, group.place):
        excepted = _match_pattern(pattern, place, f"{where}.except", matches)
        if excepted and not any(block in found for block in excepted):
            message = f"{pattern!r} takes away nothing that `match` found"
            matches.problems.append(Problem(place, f"{where}.except", message))
        found = {block: origin for block, origin in found.items() if block not in set(excepted)}
    return found


def _with_places(
    patterns: Sequence[str], places: Sequence[Place], default: Place | None
) -> list[tuple[str, Place | None]]:
    known: list[Place | None] = [*places, *[default] * (len(patterns) - len(places))]
    return list(zip(patterns, known, strict=True))


def _match_pattern(pattern: str, place: Place | None, where: str, matches: _Matches) -> list[str]:
    slice_ = _SLICE.fullmatch(pattern)
    path = pattern if slice_ is None else slice_["path"]
    expression = re.compile("[^.]*".join(re.escape(part) for part in path.split("*")))
    found = [name for name in matches.names if name and expression.fullmatch(name)]
    if not found:
        message = f"got {path!r}, which matches no module{_nearest(path, matches.names)}"
        matches.problems.append(Problem(place, where, message))
    if slice_ is None:
        return found
    first, end = int(slice_["first"]), int(slice_["end"])
    return [f"{name}[{first}:{end}]" for name in found if _can_slice(name, first, end, place, where, matches)]


def _can_slice(name: str, first: int, end: int, place: Place | None, where: str, matches: _Matches) -> bool:
    if name not in matches.lengths:
        message = f"{name!r} is not a Sequential, only a Sequential can be sliced"
    elif not first < end <= matches.lengths[name]:
        message = f"got the slice [{first}:{end}], but {name!r} has {matches.lengths[name]} modules"
    else:
        return True
    matches.problems.append(Problem(place, where, message))
    return False


def _find_overlaps(owners: Mapping[str, tuple[BlockGroup, Place | None]], matches: _Matches) -> None:
    """Refuse blocks that share a module with another block."""
    taken: dict[str, str] = {}  # module -> the block that stands for it
    for block in owners:
        for member in matches.members(block):
            if member in taken:
                message = f"{block!r} overlaps the block {taken[member]!r}: {_origin(*owners[taken[member]])}"
                matches.problems.append(Problem(owners[block][1], "blocks", message))
            taken[member] = block
    for member, block in taken.items():
        parts = member.split(".")
        above = (".".join(parts[:count]) for count in range(1, len(parts)))
        outer = next((taken[module] for module in above if module in taken), None)
        if outer is not None and outer != block:
            message = f"{block!r} lies inside the block {outer!r}: {_origin(*owners[outer])}"
            matches.problems.append(Problem(owners[block][1], "blocks", message))


def _origin(group: BlockGroup, place: Place | None) -> str:
    return f"structure {group.structure!r}" + ("" if place is None else f", matched at {place}")


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Patterns that would match something and look like this one."""
    general = (re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name) for name in names)
    candidates = dict.fromkeys(name for pair in zip(general, names, strict=True) for name in pair if name)
    near = difflib.get_close_matches(pattern, candidates, n=_NEAREST, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
