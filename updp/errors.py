"""Errors a user can act on: each names the place, what was got and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

_MANY = 24  # longer lists of allowed values are shortened
_NEAREST = 5  # how many values a shortened list shows


@dataclass(frozen=True)
class Place:
    """A position in a file; line and column count from 1, as editors do."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where in the file, which part of the document, and what about it."""

    place: Place | None
    where: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place or ""), self.where, self.message) if part)


class UpdpError(Exception):
    """Base of every error that the commands turn into one message instead of a traceback."""

    exit_status: ClassVar[int] = 1


class InputError(UpdpError):
    """Something the user gave is wrong. Made from a message, or from all problems found at once."""

    exit_status: ClassVar[int] = 2

    def __init__(self, problems: str | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (
            (Problem(None, "", problems),) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[InputError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)  # keeps .problems when a worker process hands the error back


class SpecError(InputError):
    """A spec is wrong, by itself or for the model it is bound to."""


class MergeError(InputError):
    """A merge that cannot be expressed exactly; the message says why."""


class CertificateError(UpdpError):
    """A merged network is not the network it was merged from."""


class TrainingError(UpdpError):
    """Training cannot go on, for example because the loss is not a number."""


class ProcessError(UpdpError):
    """Another process of the run ended, or does not answer any more."""


def suggest(got: str, allowed: Iterable[str]) -> str:
    """Say what was got and what is allowed, with the nearest allowed value if one is near.

    >>> suggest("ful", ["full", "pointwise"])
    "got 'ful', allowed: full, pointwise (did you mean 'full'?)"
    """
    names = list(dict.fromkeys(allowed))
    if not names:
        return f"got {got!r}, but there is none"
    folded = {name.casefold(): name for name in reversed(names)}
    near = [folded[name] for name in difflib.get_close_matches(got.casefold(), folded, n=_NEAREST)]
    shown = names if len(names) <= _MANY else near or names[:_NEAREST]
    listing = ", ".join(name if name.isprintable() else repr(name) for name in shown)
    if len(names) > _MANY:
        listing += f", … ({len(names)} in all)"
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"got {got!r}, allowed: {listing}{hint}"
