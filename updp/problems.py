"""What is wrong with many blocks, said once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from updp.errors import Place, Problem

_MEASURED = re.compile(r"\d\.\de[+-]\d\d|\[\d+(?:, \d+)+\]")  # a difference, a shape: another for each kind of block
_LISTED = 4  # names of blocks that a message lists before it counts them


def say_once(found: Iterable[tuple[Sequence[str], Problem]]) -> list[Problem]:
    """One problem per mistake: what is said of several blocks is said once, with their names.

    What was measured, and at what shape, is told as it was for the first of them.

    Args:
        found: problems, each with the blocks that have it; its text names the first of them.
    """
    groups: dict[tuple[Place | None, str], list[tuple[Sequence[str], Problem]]] = {}
    for names, problem in found:
        mistake = _MEASURED.sub("", _unnamed(problem.message, names[0]))
        groups.setdefault((problem.place, mistake), []).append((names, problem))
    problems = []
    for (place, _), members in groups.items():
        message = _unnamed(members[0][1].message, members[0][0][0])
        wheres = list(dict.fromkeys(_unnamed(problem.where, names[0]) for names, problem in members))
        text = ", ".join(wheres), message
        listing = members[0][0][0]
        if any(names[0] != listing for names, _ in members):
            listing = _listing(list(dict.fromkeys(name for names, _ in members for name in names)))
            text = text[0].replace("block \0", "blocks \0"), text[1].replace("block \0", "blocks \0")
        problems.append(Problem(place, text[0].replace("\0", listing), text[1].replace("\0", listing)))
    return problems


def _listing(blocks: Sequence[str]) -> str:
    return ", ".join(blocks) if len(blocks) <= _LISTED else f"{', '.join(blocks[:2])}, … ({len(blocks)} blocks)"


def _unnamed(text: str, block: str) -> str:
    """A text with NUL in the place of a block's name."""
    return re.sub(rf"(?<![\w.]){re.escape(block)}(?![\w\[]|\.\w)", "\0", text)
