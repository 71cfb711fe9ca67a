"""Trained weights that packages of PyPI carry: where they are, and how their tensors' names become timm's.

All of it is data, ``specs/weights/MODEL.yaml``, named after the timm model; imports no torch. A package is asked for
its file and nothing else: its own code is never imported. Weights are data, and a file that is found by what pip wrote
down is the same file whatever that code does.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from updp.errors import InputError, Problem, suggest
from updp.files import sha256
from updp.spec import include
from updp.spec.files import SUFFIXES, specs_directory
from updp.spec.schema import load_schema, schema_problems, where
from updp.spec.tree import Tree, read_text, read_tree

PACKAGE = "package"  # what --weights takes in place of a file


@dataclass(frozen=True)
class Names:
    """How the names of a file's tensors become the model's.

    Attributes:
        flat: how the names of a flat list of blocks begin, ``{n}`` being the number; empty if there is none.
        staged: how the model's own names begin, a ``{letter}`` for each number.
        replace: (expression, replacement) in order; the first that is found in a name is applied.
    """

    flat: str = ""
    staged: str = ""
    replace: tuple[tuple[str, str], ...] = ()

    def __call__(self, names: Iterable[str], own: Iterable[str]) -> dict[str, str]:
        """The new name of each name.

        Args:
            own: the names of the model's tensors, whose blocks are counted.
        """
        blocks = _numbered(self.staged, own)
        return {name: self._replaced(self._staged(name, blocks)) for name in names}

    def _staged(self, name: str, blocks: list[str]) -> str:
        found = re.match(_expression(self.flat), name) if self.flat else None
        if found is None or int(found[1]) >= len(blocks):
            return name
        return blocks[int(found[1])] + name[found.end() :]

    def _replaced(self, name: str) -> str:
        for expression, replacement in self.replace:
            new, found = re.subn(expression, replacement, name)
            if found:
                return new
        return name


def _expression(pattern: str) -> str:
    """A beginning such as ``blocks.{s}.{i}`` as a regular expression that ends where a part of a name ends."""
    parts = (r"(\d+)" if part.startswith("{") else re.escape(part) for part in re.split(r"(\{\w\})", pattern))
    return "".join(parts) + r"(?=\.|$)"


def _numbered(pattern: str, names: Iterable[str]) -> list[str]:
    """The different beginnings of names that fit a pattern, in the order of their numbers."""
    found = (re.match(_expression(pattern), name) for name in names) if pattern else ()
    numbers = {match[0]: [int(number) for number in match.groups()] for match in found if match is not None}
    return sorted(numbers, key=numbers.__getitem__)


@dataclass(frozen=True)
class PackagedWeights:
    """A package that carries a model's weights.

    Attributes:
        file: the path of the weights below the folder that packages are installed in.
        sha256: of that file.
        extra: the extra of updp that brings the package.
    """

    model: str
    package: str
    file: str
    sha256: str
    licence: str
    source: str
    extra: str
    names: Names

    @property
    def version(self) -> str | None:
        """Of the installed package; None if it is not installed."""
        found = self._installed()
        return None if found is None else found.version

    def find(self) -> Path:
        """The installed file, of which every byte is the one that was looked at when this was written down.

        Raises:
            InputError: the package is not installed, has no such file, or has another.
        """
        found = self._installed()
        if found is None:
            install = f"`pip install {self.package}`, or `pip install 'updp[{self.extra}]'` for all of these"
            raise _refusal(f"the package {self.package}, which has those of {self.model}, is not installed: {install}")
        path, name = Path(str(found.locate_file(self.file))), f"{self.package} {found.version}"
        if not path.is_file():
            raise _refusal(f"{name} is installed, but has no file {path}: install it again")
        if (got := sha256(path)) != self.sha256:
            raise _refusal(f"{path}: not the known file of {name}: its sha256 is {got}, allowed: {self.sha256}")
        return path

    def _installed(self) -> importlib.metadata.Distribution | None:
        try:
            return importlib.metadata.distribution(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def _refusal(message: str) -> InputError:
    return InputError(f"--weights {PACKAGE}: {message}")


def list_packaged() -> list[str]:
    """Names of the timm models whose weights a package carries, sorted."""
    return sorted(path.stem for path in _directory().iterdir() if path.suffix in SUFFIXES)


def load_packaged(model: str) -> PackagedWeights:
    """What is known of the package with a timm model's weights.

    Raises:
        InputError: none is known for this model; or its file is wrong, with all problems.
    """
    names = list_packaged()
    if model not in names:
        raise _refusal(f"no package with weights is known for {suggest(model, names)}; or give a file")
    return read_packaged(next(p for p in _directory().iterdir() if p.stem == model and p.suffix in SUFFIXES))


def read_packaged(path: Path) -> PackagedWeights:
    """Read one file.

    Raises:
        InputError: with all problems of the file and of those that it includes, each with its line and column.
    """
    tree = include.expand(read_tree(read_text(path), str(path)), path, _directory())
    problems = [problem for _, problem in schema_problems(tree, load_schema(_directory()))]
    if not problems:
        problems = list(_rule_problems(tree))
    if problems:
        raise InputError(problems)
    top: dict[str, Any] = tree.plain()
    plain = {key: top[key] for key in ("package", "file", "sha256", "licence", "source", "extra")}
    return PackagedWeights(model=path.stem, names=_names(top.get("names", {})), **plain)


def find_weights(weights: str | Path, model: str) -> Path:
    """The file that is meant by what ``--weights`` takes: a path, or the word ``package``.

    Args:
        weights: a `Path` is always a file, and so is any other text, ``./package`` too.
        model: the timm model, for which a package is looked up.

    Raises:
        InputError: no package is known, or it is not installed, or its file is not the known one.
    """
    return load_packaged(model).find() if weights == PACKAGE else Path(weights)


def known_names(path: Path, model: str) -> Names | None:
    """How names become the model's, if this is the file of the package that is known for it; None for other files.

    A file is known by its bytes, wherever it lies: what was found in a package once can be read again by its path.
    """
    if model not in list_packaged():
        return None
    known = load_packaged(model)
    try:
        return known.names if path.suffix == Path(known.file).suffix and sha256(path) == known.sha256 else None
    except OSError:  # reading it as weights, which comes next, says what is wrong with it
        return None


def _directory() -> Path:
    return specs_directory() / "weights"


def _names(plain: Mapping[str, Any]) -> Names:
    flatten = plain.get("flatten", {})
    rules = tuple((rule["from"], rule["to"]) for rule in plain.get("replace", ()))
    return Names(flatten.get("from", ""), flatten.get("to", ""), rules)


def _rule_problems(tree: Tree) -> Iterator[Problem]:
    """Rules that are no regular expressions, or put in groups that there are not."""
    names = tree.get("names")
    rules = None if names is None else names.get("replace")
    for index, rule in enumerate([] if rules is None else rules.items()):
        expression, replacement = rule.value["from"].value, rule.value["to"].value
        tried = (("from", "", "a regular expression"), ("to", replacement, "a replacement for what `from` finds"))
        for key, text, allowed in tried:
            try:
                re.sub(expression, text, "")
            except (re.error, IndexError) as error:
                message = f"got {rule.value[key].value!r}, allowed: {allowed} ({error})"
                yield Problem(rule.value[key].place, where(["names", "replace", index, key]), message)
                break
