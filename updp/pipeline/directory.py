"""A run directory: ``run.json``, the spec's own text, and a folder for each stage.

Every file appears completely or not at all. A stage's ``result.json`` is its last file: with it the stage is finished.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from updp.errors import InputError, Place, Problem
from updp.files import json_text, read_json, write_text
from updp.pipeline.program import program
from updp.pipeline.results import check_result
from updp.report.read import STAGES, read_spec, stages_of
from updp.spec import ArchSpec, apply_settings
from updp.subnet import SubnetConfig

VERSION = 1
_STAGE_OF = {"distill": "calibrate"}  # trainings that are a part of a stage of another name


@dataclass(frozen=True)
class Calibration:
    """How blocks are chosen and solved for where no supernet is trained and searched.

    Attributes:
        images: how many to use; a fifth of them only judge the damage.
        macs, latency: at most these parts of the baseline's.
        candidates: how many sets of blocks are compared as true networks.
        judge: the data on whose labels accuracies are told; None where there are no labels.
        finetune: whether training follows.
    """

    images: int = 1000
    macs: float | None = None
    latency: float | None = None
    candidates: int = 8
    judge: str | None = None
    finetune: bool = False


@dataclass(frozen=True)
class RunRecord:
    """What a run is: the same record, CPU and versions give the same bits. The content of ``run.json``.

    Attributes:
        spec, spec_hash: the spec's name and the hash of its text, which is in ``spec.yaml``.
        data: the dataset's name, with an absolute path where it has one.
        num_classes: of the data, and so of the network.
        prune: how many blocks; None where only a budget says what is pruned.
        recipe: under which recipe; None is each block's default.
        settings: what ``--set`` changed in the schedule.
        seed, threads, device, precision: what else the bits depend on.
        weights: ``{"file", "sha256"}`` of given baseline weights, or None.
        subnet: the choices of a given subnet, or None.
        blocks: ``{"name", "structure", "recipes"}`` of every block, in order of execution.
        environment: versions and hardware at the start.
        calibration: how blocks are chosen and solved for, or None.
        init: ``{"directory", "sha256"}`` of the calibration whose pruned weights training starts from, or None.
        processes: how many began the run. Batches, statistics and searches are the same however many share them, but
            not every bit: a run may go on with another number, which each stage's result tells.
    """

    spec: str
    spec_hash: str
    data: str
    num_classes: int
    prune: int | None
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
    calibration: Calibration | None = None
    init: Mapping[str, str] | None = None
    processes: int = 1
    version: int = VERSION

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this run."""
        calibration, subnet = self.calibration, self.subnet is not None
        finetuned = calibration is None or calibration.finetune
        return stages_of(subnet=subnet, calibrated=calibration is not None, finetuned=finetuned)

    def differences(self, other: RunRecord) -> list[str]:
        """What makes another run of it, one line each; hardware and versions do not."""
        told = (
            "environment", "blocks", "num_classes", "version", "weights", "settings", "calibration", "init",
            "processes",
        )  # fmt: skip
        names = [field.name for field in dataclasses.fields(self) if field.name not in told]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        ours, theirs = (tuple(s for s in run.settings if not is_seed(s)) for run in (self, other))
        pairs.append(("settings", ours, theirs))
        for name in ("weights", "init"):
            sums = [(getattr(run, name) or {}).get("sha256") for run in (self, other)]
            pairs.append((name, sums[0], sums[1]))
        for field in dataclasses.fields(Calibration):
            values = [getattr(run.calibration, field.name, None) for run in (self, other)]
            pairs.append((field.name, values[0], values[1]))
        return [f"{name}: got {_shown(b)}, the run has {_shown(a)}" for name, a, b in pairs if a != b]


def is_seed(setting: str) -> bool:
    """Whether a setting is the seed's, which a record has by itself."""
    return setting.partition("=")[0].strip() == "seed"


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
    def create(
        cls, path: Path, record: RunRecord, spec: ArchSpec, subnet: SubnetConfig | None, pruned: Path | None = None
    ) -> RunDirectory:
        """Make a run directory in one step: made beside its place, then renamed.

        An empty directory that is there stays, as someone may be in it; it gets its files, ``run.json`` last.

        Args:
            subnet: a given one.
            pruned: weights of the pruned network to start from, which are copied.

        Raises:
            InputError: it cannot be written.
        """
        staging: Path | None = None
        try:
            place = path.resolve()
            there = place.is_dir()
            parent = place if there else place.parent
            parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{place.name}."))
            os.chmod(staging, 0o755)
            _write(staging, record, spec, subnet)
            if pruned is not None:
                (staging / "calibrate").mkdir()
                shutil.copyfile(pruned, staging / "calibrate" / pruned.name)
            _fill(place, staging) if there else os.rename(staging, place)
        except BaseException as error:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
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
            raise InputError(f"{path}: {reason} (`{program()} run SPEC … --out {path}` makes one)")
        record = _read_record(path / "run.json")
        spec = read_spec(path / "spec.yaml", record.spec, record.spec_hash)
        return cls(path, record, apply_settings(spec, record.settings))

    def renewed(self, record: RunRecord) -> RunDirectory:
        """The same calibration with other blocks chosen: only what was made of the present choice goes."""
        self.begin("calibrate", anew=True)
        write_json(self.path / "run.json", dataclasses.asdict(record))
        return RunDirectory.open(self.path)

    def file(self, stage: str, name: str) -> Path:
        return self.path / stage / name

    def result(self, stage: str) -> dict[str, Any] | None:
        """The result of a stage, or None if it is not finished.

        Raises:
            InputError: the file is not what the stage writes.
        """
        file = self.file(stage, "result.json")
        if not file.is_file():
            return None
        result = read_json(file)
        check_result(stage, result, file)
        return result

    def checkpoints(self, training: str) -> Path:
        """Where the states of a training are kept while its stage is not finished."""
        return self.file(_STAGE_OF.get(training, training), "checkpoints")

    def begin(self, stage: str, *, anew: bool = False) -> None:
        """Make a stage's folder. What was made from the stage's earlier product is no longer finished.

        Args:
            anew: whether a training of this stage that was stopped is not to go on.
        """
        try:
            for number, later in enumerate(STAGES[STAGES.index(stage) :]):
                self.file(later, "result.json").unlink(missing_ok=True)
                if number or anew:
                    shutil.rmtree(self.checkpoints(later), ignore_errors=True)
            (self.path / stage).mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def finish(self, stage: str, result: Mapping[str, Any]) -> None:
        """Write a stage's last file; the states of its training are not needed any more."""
        write_json(self.file(stage, "result.json"), result)
        shutil.rmtree(self.checkpoints(stage), ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed processes have left: files under temporary names, states of trainings that are done."""
        for file in self.path.rglob(".*.tmp"):
            file.unlink(missing_ok=True)
        for stage in STAGES:
            if self.file(stage, "result.json").is_file():
                shutil.rmtree(self.checkpoints(stage), ignore_errors=True)


def _write(directory: Path, record: RunRecord, spec: ArchSpec, subnet: SubnetConfig | None) -> None:
    """The first files of a run."""
    write_text(directory / "spec.yaml", spec.text)
    if subnet is not None:
        (directory / "search").mkdir()
        subnet.save(directory / "search" / "subnet.json")
    write_json(directory / "run.json", dataclasses.asdict(record))


def _fill(directory: Path, staging: Path) -> None:
    """Move all that was staged in a directory up into it; what makes it a run comes last."""
    if any(file != staging for file in directory.iterdir()):
        raise InputError(f"{directory}: cannot make the run directory: it has files in it")
    moved: list[str] = []
    try:
        for name in sorted(os.listdir(staging), key="run.json".__eq__):
            os.rename(staging / name, directory / name)
            moved.append(name)
        staging.rmdir()
    except BaseException:
        for name in moved:
            os.rename(directory / name, staging / name)
        raise


def _read_record(file: Path) -> RunRecord:
    data = read_json(file)
    if data.get("version") != VERSION:
        message = f"got {data.get('version')!r}, allowed: {VERSION}"
        raise InputError([Problem(Place(str(file)), "version", message)])
    data = {**_SINCE, **data}
    wrong = [name for name, kinds in _KINDS.items() if name not in data or not isinstance(data[name], kinds)]
    if "settings" not in wrong and not all(isinstance(each, str) for each in data["settings"]):
        wrong.append("settings")
    if wrong:
        raise InputError([Problem(Place(str(file)), name, "is missing or not what updp writes") for name in wrong])
    kept: dict[str, Any] = {name: data[name] for name in _KINDS}
    try:
        calibration = None if kept["calibration"] is None else Calibration(**kept["calibration"])
    except TypeError as error:
        raise InputError([Problem(Place(str(file)), "calibration", str(error))]) from None
    lists = {name: tuple(kept[name]) for name in _LISTS}
    return RunRecord(**{**kept, **lists, "calibration": calibration})


_LISTS = ("settings", "blocks")
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("spec", "spec_hash", "data", "device", "precision"), str),
    **dict.fromkeys(("num_classes", "seed", "threads", "version", "processes"), int),
    **dict.fromkeys(_LISTS, list),
    **dict.fromkeys(("weights", "subnet", "calibration", "init"), (dict, type(None))),
    "prune": (int, type(None)),
    "recipe": (str, type(None)),
    "environment": dict,
}
_SINCE = {"calibration": None, "init": None, "processes": 1}  # keys that the first runs did not have


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write JSON, completely or not at all; numbers that JSON does not have become null."""
    write_text(file, json_text(data))
