"""What a run directory holds, read with care: the files may be partial, from another version, or hostile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from updp.errors import InputError, Place, Problem
from updp.files import read_json
from updp.spec import ArchSpec, apply_settings, parse_spec
from updp.subnet import SubnetConfig

STAGES = ("baseline", "supernet", "search", "damage", "calibrate", "finetune", "merge")
"""All stages, in their order; each has a folder of its name. No run has all of them."""
SEARCHED = ("baseline", "supernet", "search", "finetune", "merge")
"""The stages of a run that trains a supernet and searches it."""

_LARGEST = 1e18


def stages_of(*, subnet: bool, calibrated: bool, finetuned: bool = True) -> tuple[str, ...]:
    """The stages of a run.

    A given subnet needs neither supernet nor search; where blocks are calibrated, damage and calibrate stand for both.
    """
    if calibrated:
        return tuple(s for s in STAGES if s not in ("supernet", "search") and (finetuned or s != "finetune"))
    return ("baseline", "finetune", "merge") if subnet else SEARCHED


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
    def listed(self) -> tuple[str, ...]:
        """The stages to show."""
        calibration = self.about.record("calibration")
        finetuned = calibration.flag("finetune") is True
        return stages_of(subnet=False, calibrated=True, finetuned=finetuned) if calibration else SEARCHED

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stages that this run does without, though others like it have them."""
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
    chosen = [directory / stage / "subnet.json" for stage in ("search", "calibrate")]
    subnet = _read_subnet(next((file for file in chosen if file.is_file()), chosen[0]), problems)
    if problems:
        raise InputError(problems)
    return Run(directory, about, stages, spec, subnet)


def _read_json(path: Path, problems: list[Problem]) -> Record:
    try:
        return Record(read_json(path))
    except InputError as error:
        problems.extend(error.problems)
    return Record()


def _read_spec(path: Path, about: Record, problems: list[Problem]) -> ArchSpec | None:
    """The run's own spec with the run's settings applied; None if the run directory has none."""
    if not path.is_file():
        return None
    try:
        spec = read_spec(path, about.text("spec") or path.stem, about.data.get("spec_hash"))
        return apply_settings(spec, about.texts("settings"))
    except InputError as error:
        problems.extend(error.problems)
    return None


def read_spec(file: Path, name: str, expected: object) -> ArchSpec:
    """The run's own spec, without the run's settings; ``expected`` is the hash that its text must have.

    Raises:
        InputError: it cannot be read, is wrong, or was changed.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError([Problem(Place(str(file)), "", f"cannot be read: {error}")]) from None
    spec = parse_spec(text, file=str(file), name=name)
    if expected is not None and spec.hash != expected:
        message = (
            f"the spec was changed since the run began: got hash {spec.hash[:12]}…, run.json has "
            f"{str(expected)[:12]}…; put it back, or start a run in another directory"
        )
        raise InputError([Problem(Place(str(file)), "", message)])
    return spec


def _read_subnet(path: Path, problems: list[Problem]) -> SubnetConfig | None:
    if not path.is_file():
        return None
    try:
        return SubnetConfig.load(path)
    except InputError as error:
        problems.extend(error.problems)
    return None
