"""A run directory: ``run.json``, the spec's own text, and a folder for each stage.

Every file appears completely or not at all. A stage's ``result.json`` is its last file: with it the stage is finished.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from updp.errors import InputError, Place, Problem
from updp.files import write_text
from updp.spec import ArchSpec, apply_settings, parse_spec
from updp.subnet import SubnetConfig

STAGES = ("baseline", "supernet", "search", "finetune", "merge")
VERSION = 1


@dataclass(frozen=True)
class RunRecord:
    """What a run is: the same record, CPU and versions give the same bits. The content of ``run.json``.

    Attributes:
        spec, spec_hash: the spec's name and the hash of its text, which is in ``spec.yaml``.
        data: the dataset's name, with an absolute path where it has one.
        num_classes: of the data, and so of the network.
        prune: how many blocks.
        recipe: under which recipe; None is each block's default.
        settings: what ``--set`` changed in the schedule.
        seed, threads, device, precision: what else the bits depend on.
        weights: ``{"file", "sha256"}`` of given baseline weights, or None.
        subnet: the choices of a given subnet, or None.
        blocks: ``{"name", "structure", "recipes"}`` of every block, in order of execution.
        environment: versions and hardware at the start.
    """

    spec: str
    spec_hash: str
    data: str
    num_classes: int
    prune: int
    recipe: str | None
    settings: tuple[str, ...]
    seed: int
    threads: int
    device: str
    precision: str
    weights: Mapping[str, str] | None
    subnet: Mapping[str, str] | None
    blocks: tuple[Mapping[str, Any], ...]
    environment: Mapping[str, Any]
    version: int = VERSION

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this run: a given subnet needs neither supernet nor search."""
        return STAGES if self.subnet is None else ("baseline", "finetune", "merge")

    def differences(self, other: RunRecord) -> list[str]:
        """What makes another run of it, one line each; hardware and versions do not."""
        told = ("environment", "blocks", "num_classes", "version", "weights")
        names = [field.name for field in dataclasses.fields(self) if field.name not in told]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        pairs.append(("weights", (self.weights or {}).get("sha256"), (other.weights or {}).get("sha256")))
        return [f"{name}: got {_shown(b)}, the run has {_shown(a)}" for name, a, b in pairs if a != b]


def _shown(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, str):
        return value if len(value) < 64 or " " in value else f"{value[:12]}…"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class RunDirectory:
    """A run directory that exists."""

    path: Path
    record: RunRecord
    spec: ArchSpec

    @classmethod
    def create(cls, path: Path, record: RunRecord, spec: ArchSpec, subnet: SubnetConfig | None) -> RunDirectory:
        """Make a run directory in one step: made beside its place, then renamed.

        Raises:
            InputError: it cannot be written.
        """
        staging: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
            os.chmod(staging, 0o755)
            write_text(Path(staging, "spec.yaml"), spec.text)
            if subnet is not None:
                Path(staging, "search").mkdir()
                subnet.save(Path(staging, "search", "subnet.json"))
            write_json(Path(staging, "run.json"), dataclasses.asdict(record))
            os.rename(staging, path)  # takes the place of an empty directory too
        except OSError as error:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            raise InputError(f"{path}: cannot make the run directory: {error.strerror or error}") from None
        return cls(path, record, spec)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open a run directory.

        Raises:
            InputError: it is none, or its files have been changed.
        """
        if not (path / "run.json").is_file():
            reason = "not a run directory: it has no run.json" if path.is_dir() else "no such directory"
            raise InputError(f"{path}: {reason} (`updp run SPEC … --out {path}` makes one)")
        record = _read_record(path / "run.json")
        file = path / "spec.yaml"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError([Problem(Place(str(file)), "", f"cannot be read: {error}")]) from None
        spec = parse_spec(text, file=str(file), name=record.spec)
        if spec.hash != record.spec_hash:
            message = (
                f"the spec was changed since the run began: got hash {spec.hash[:12]}…, run.json has "
                f"{record.spec_hash[:12]}…; put it back, or start a run in another directory"
            )
            raise InputError([Problem(Place(str(file)), "", message)])
        return cls(path, record, apply_settings(spec, record.settings))

    def file(self, stage: str, name: str) -> Path:
        return self.path / stage / name

    def result(self, stage: str) -> dict[str, Any] | None:
        """The result of a stage, or None if it is not finished."""
        file = self.file(stage, "result.json")
        return read_json(file) if file.is_file() else None

    def begin(self, stage: str) -> None:
        """Make a stage's folder. What was made from the stage's earlier product is no longer finished."""
        try:
            for later in STAGES[STAGES.index(stage) :]:
                self.file(later, "result.json").unlink(missing_ok=True)
            (self.path / stage).mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def finish(self, stage: str, result: Mapping[str, Any]) -> None:
        write_json(self.file(stage, "result.json"), result)


def _read_record(file: Path) -> RunRecord:
    data = read_json(file)
    if data.get("version") != VERSION:
        message = f"got {data.get('version')!r}, allowed: {VERSION}"
        raise InputError([Problem(Place(str(file)), "version", message)])
    wrong = [name for name, kinds in _KINDS.items() if name not in data or not isinstance(data[name], kinds)]
    if wrong:
        raise InputError([Problem(Place(str(file)), name, "is missing or not what updp writes") for name in wrong])
    kept: dict[str, Any] = {name: data[name] for name in _KINDS}
    return RunRecord(**{**kept, "settings": tuple(kept["settings"]), "blocks": tuple(kept["blocks"])})


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("spec", "spec_hash", "data", "device", "precision"), str),
    **dict.fromkeys(("num_classes", "prune", "seed", "threads", "version"), int),
    **dict.fromkeys(("settings", "blocks"), list),
    **dict.fromkeys(("weights", "subnet"), (dict, type(None))),
    "recipe": (str, type(None)),
    "environment": dict,
}


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        InputError: it cannot be read or holds something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = Place(str(file), error.lineno, error.colno)
        raise InputError([Problem(place, "", f"not JSON: {error.msg}")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError([Problem(Place(str(file)), "", f"cannot be read: {error}")]) from None
    if not isinstance(data, dict):
        raise InputError([Problem(Place(str(file)), "", f"got {type(data).__name__}, allowed: an object")])
    return data


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write JSON, completely or not at all; numbers that JSON does not have become null."""
    write_text(file, json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
