"""What a run directory holds, read with care: the files may be partial, from another version, or hostile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from updp.errors import InputError, Place, Problem
from updp.spec import ArchSpec, apply_settings, parse_spec
from updp.subnet import SubnetConfig

STAGES = ("baseline", "supernet", "search", "finetune", "merge")
_LARGEST = 1e18


class Record:
    """A JSON object of which nothing is certain: what is missing or of another type reads as None or empty."""

    def __init__(self, data: object = None) -> None:
        self.data: Mapping[str, object] = data if isinstance(data, Mapping) else {}

    def __bool__(self) -> bool:
        return bool(self.data)

    def number(self, key: str) -> float | None:
        """A number that can be drawn, or None."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if abs(value) <= _LARGEST else None  # false for NaN too

    def text(self, key: str) -> str | None:
        value = self.data.get(key)
        return value if isinstance(value, str) else None

    def flag(self, key: str) -> bool | None:
        value = self.data.get(key)
        return value if isinstance(value, bool) else None

    def record(self, key: str) -> Record:
        return Record(self.data.get(key))

    def records(self, key: str) -> list[Record]:
        """The objects in a list of objects; anything else in it is skipped."""
        return [Record(value) for value in self._list(key) if isinstance(value, Mapping)]

    def texts(self, key: str) -> list[str]:
        return [value for value in self._list(key) if isinstance(value, str)]

    def _list(self, key: str) -> list[object]:
        value = self.data.get(key)
        return value if isinstance(value, list) else []


@dataclass(frozen=True)
class Run:
    """A run directory: its settings, and the results of the stages that are finished."""

    directory: Path
    about: Record
    stages: Mapping[str, Record]
    spec: ArchSpec | None
    subnet: SubnetConfig | None

    def stage(self, name: str) -> Record:
        """The result of a stage; empty if it is not finished."""
        return self.stages.get(name, Record())

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stages that this run does without: a given subnet needs neither supernet nor search."""
        return ("supernet", "search") if self.about.record("subnet") else ()


def read_run(directory: Path) -> Run:
    """Read a run directory in any state of completion.

    Raises InputError, with every problem found, if it is no run directory or one of its files is corrupt.
    """
    if not (directory / "run.json").is_file():
        reason = "not a run directory: it has no run.json" if directory.is_dir() else "no such directory"
        raise InputError(f"{directory}: {reason}")
    problems: list[Problem] = []
    about = _read_json(directory / "run.json", problems)
    paths = {stage: directory / stage / "result.json" for stage in STAGES}
    stages = {stage: _read_json(path, problems) for stage, path in paths.items() if path.is_file()}
    spec = _read_spec(directory / "spec.yaml", about, problems)
    subnet = _read_subnet(directory / "search" / "subnet.json", problems)
    if problems:
        raise InputError(problems)
    return Run(directory, about, stages, spec, subnet)


def _read_json(path: Path, problems: list[Problem]) -> Record:
    place = Place(str(path))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        problems.append(Problem(Place(str(path), error.lineno, error.colno), "", f"not JSON: {error.msg}"))
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        problems.append(Problem(place, "", f"cannot be read: {error}"))
    else:
        if isinstance(data, dict):
            return Record(data)
        problems.append(Problem(place, "", f"got {type(data).__name__}, expected a JSON object"))
    return Record()


def _read_spec(path: Path, about: Record, problems: list[Problem]) -> ArchSpec | None:
    """The run's own spec with the run's settings applied; None if the run directory has none."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        spec = parse_spec(text, file=str(path), name=about.text("spec") or path.stem)
        if spec.hash != about.data.get("spec_hash", spec.hash):
            problems.append(Problem(Place(str(path)), "", "the spec was changed since the run began; put it back"))
        return apply_settings(spec, about.texts("settings"))
    except InputError as error:
        problems.extend(error.problems)
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(Place(str(path)), "", f"cannot be read: {error}"))
    return None


def _read_subnet(path: Path, problems: list[Problem]) -> SubnetConfig | None:
    if not path.is_file():
        return None
    try:
        return SubnetConfig.load(path)
    except InputError as error:
        problems.extend(error.problems)
    return None
