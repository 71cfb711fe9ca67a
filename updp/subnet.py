"""SubnetConfig: which recipe each block of a network takes. JSON in and out; imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from updp.errors import InputError, Place, Problem, suggest
from updp.files import write_text
from updp.frozen import FrozenMap

VERSION = 1
KEEP = "keep"
MAX_BYTES = 1 << 20
SUFFIX = ".json"


@dataclass(frozen=True)
class SubnetConfig:
    """The choice of every block that is not kept, for the spec of this name.

    Blocks may be given with the choice ``"keep"``; they are left out, and the rest is sorted by block, so two
    configs that mean the same are equal and have one hash and one JSON text. ``about`` is for people: where the
    choices come from. It is written and read again, and is no part of what the config means.
    """

    spec: str
    choices: Mapping[str, str]
    version: int = VERSION
    about: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        pruned = {block: choice for block, choice in sorted(self.choices.items()) if choice != KEEP}
        object.__setattr__(self, "choices", FrozenMap(pruned))

    def choice(self, block: str) -> str:
        """The choice of a block; blocks that are not named are kept."""
        return self.choices.get(block, KEEP)

    @property
    def pruned(self) -> tuple[str, ...]:
        """The blocks that are not kept, sorted by name."""
        return tuple(self.choices)

    def key(self) -> str:
        """A short string that is the same for equal configs, today and in the next process."""
        text = json.dumps([self.version, self.spec, list(self.choices.items())])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:24]

    def to_json(self) -> str:
        """The text of a subnet file."""
        data: dict[str, Any] = {"version": self.version, "spec": self.spec}
        data |= {"about": self.about} if self.about else {}
        data["choices"] = dict(self.choices)
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, file: str = "<text>") -> SubnetConfig:
        """Read the text of a subnet file; ``file`` is only used in messages.

        Raises:
            InputError: with all problems of the text.
        """
        return _from_data(_parse(text, file), file)

    @classmethod
    def load(cls, path: str | Path) -> SubnetConfig:
        """Read a subnet file.

        Raises:
            InputError: if it cannot be read or is not a subnet file.
        """
        file = str(path)
        try:
            with Path(path).open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError([Problem(Place(file), "", f"cannot read the subnet: {reason}")]) from None
        if len(data) > MAX_BYTES:
            raise InputError([Problem(Place(file), "", f"the file is larger than {MAX_BYTES // 1024} KiB")])
        try:
            return cls.from_json(data.decode("utf-8-sig"), file)
        except UnicodeDecodeError:
            raise InputError([Problem(Place(file), "", "not UTF-8 text")]) from None

    def save(self, path: str | Path) -> None:
        """Write a subnet file; it is there completely or not at all.

        Raises:
            InputError: if it cannot be written.
        """
        write_text(path, self.to_json())

    def check(self, spec_name: str, available: Mapping[str, Sequence[str]], file: str | Path | None = None) -> None:
        """Check against a network: its spec's name and the recipes of each of its blocks.

        Messages name the file, where the subnet came from one.

        Raises:
            InputError: for a subnet of another spec, unknown blocks and unknown choices, all of them at once.
        """
        problems = []
        place = None if file is None else Place(str(file))
        if self.spec != spec_name:
            message = f"the subnet is for another spec: got {self.spec!r}, allowed: {spec_name}"
            raise InputError([Problem(place, "spec", message)])
        for block, choice in self.choices.items():
            where = f"choices[{block!r}]"
            if block not in available:
                problems.append(Problem(place, where, f"no such prunable block: {suggest(block, available)}"))
            elif choice not in available[block]:
                allowed = [KEEP, *available[block]]
                problems.append(Problem(place, where, f"no such choice: {suggest(choice, allowed)}"))
        if problems:
            raise InputError(problems)


def list_subnets() -> list[str]:
    """Names of the shipped subnets, sorted: the name of their spec, a slash, their own."""
    root = _directory()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.glob(f"*/*{SUFFIX}"))


def load_subnet(name_or_path: str | Path, spec: str | None = None) -> SubnetConfig:
    """Load a shipped subnet by its name, or any subnet file by its path.

    Args:
        name_or_path: a `Path` is always a file.
        spec: the name of a spec, whose subnets may be named without it.

    Raises:
        InputError: there is no such subnet, or its file is wrong.
    """
    return SubnetConfig.load(find_subnet(name_or_path, spec))


def find_subnet(name_or_path: str | Path, spec: str | None = None) -> Path:
    """The file that `load_subnet` reads; it is there if it was named.

    Raises:
        InputError: there is no such subnet.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, Path):
        return path
    names = list_subnets()
    for name in (name_or_path, f"{spec}/{name_or_path}"):
        if name in names:
            return _directory() / f"{name}{SUFFIX}"
    if path.suffix != SUFFIX and not path.is_file():
        own = [name.partition("/")[2] for name in names if name.startswith(f"{spec}/")]
        allowed = own if "/" not in name_or_path and own else names
        raise InputError(f"no such subnet: {suggest(name_or_path, allowed)}, or the path of a {SUFFIX} file")
    return path


def _directory() -> Path:
    """Where the shipped subnets are: beside the specs, which are found by the code that reads YAML."""
    from updp.spec.files import specs_directory

    return specs_directory() / "subnets"


def _parse(text: str, file: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise InputError([Problem(Place(file), "", f"the key {twice!r} is there twice")])
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = Place(file, error.lineno, error.colno)
        raise InputError([Problem(place, "", f"not JSON: {error.msg}")]) from None
    except (RecursionError, ValueError):
        raise InputError([Problem(Place(file), "", "not JSON that updp can read")]) from None


def _from_data(data: Any, file: str) -> SubnetConfig:
    place = Place(file)
    if not isinstance(data, dict):
        raise InputError([Problem(place, "", 'allowed: {"version": 1, "spec": NAME, "choices": {BLOCK: RECIPE}}')])
    keys = ("version", "spec", "choices")
    known = (*keys, "about")
    problems = [Problem(place, "", f"unknown key: {suggest(key, known)}") for key in data if key not in known]
    problems += [Problem(place, "", f"the key {key!r} is missing") for key in keys if key not in data]
    version, spec, choices = (data.get(key) for key in keys)
    if "version" in data and (version != VERSION or isinstance(version, bool)):
        problems.append(Problem(place, "version", f"got {version!r}, allowed: {VERSION}"))
    if "spec" in data and not isinstance(spec, str):
        problems.append(Problem(place, "spec", f"got {spec!r}, allowed: the name of a spec"))
    if not isinstance(data.get("about", ""), str):
        problems.append(Problem(place, "about", f"got {data['about']!r}, allowed: text"))
    recipes: dict[str, str] = {}
    if isinstance(choices, dict):
        for block, choice in choices.items():
            problems += _read_choice(block, choice, recipes, place)
    elif "choices" in data:
        problems.append(Problem(place, "choices", "must be a mapping from block to choice"))
    if problems:
        raise InputError(problems)
    return SubnetConfig(str(spec), recipes, about=data.get("about", ""))


def _read_choice(block: str, choice: Any, recipes: dict[str, str], place: Place) -> list[Problem]:
    where = f"choices[{block!r}]"
    if isinstance(choice, dict):
        others = [key for key in choice if key != "recipe"]
        if others:
            return [Problem(place, where, f"{suggest(others[0], ['recipe'])}; other keys are reserved")]
        choice = choice.get("recipe")
    if not isinstance(choice, str):
        return [Problem(place, where, f'got {choice!r}, allowed: a recipe\'s name or {{"recipe": NAME}}')]
    recipes[block] = choice
    return []
