"""From what a user asks for to a run directory. Everything is checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from updp import processes
from updp.conformance import check_spec
from updp.data import Data
from updp.errors import InputError, Place, Problem, suggest
from updp.files import sha256
from updp.measure import environment
from updp.packaged import find_weights
from updp.pipeline.context import absolute, open_for, open_images
from updp.pipeline.directory import Calibration, RunDirectory, RunRecord, is_seed
from updp.pipeline.given import model_with_weights, num_classes_of
from updp.pipeline.lock import check_free, locked
from updp.pipeline.opening import candidates, check_enough, check_prunable, init_record, open_init, with_judge
from updp.pipeline.settings import composed_at_start, resolve, split_settings
from updp.pipeline.watch import Watch
from updp.spec import STAGES as TRAINING
from updp.spec import ArchSpec, load_spec
from updp.structure import create_model
from updp.subnet import SubnetConfig, find_subnet
from updp.supernet import Supernet, build_supernet
from updp.train.factory import PRECISIONS, make_optimizer, make_scheduler

DEVICES = ("auto", "cpu", "cuda")
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Request:
    """What ``updp run`` or ``updp calibrate`` is asked for. Of what is None, a run that exists keeps what it has."""

    spec: str
    data: str
    out: Path
    prune: int | None = None
    recipe: str | None = None
    weights: str | Path | None = None
    subnet: str | Path | None = None
    settings: Sequence[str] = ()
    seed: int | None = None
    threads: int | None = None
    device: str | None = None
    precision: str | None = None
    calibration: Calibration | None = None
    init: Path | None = None


@dataclass
class _Findings:
    """All that is wrong with a request."""

    problems: list[Problem] = field(default_factory=list)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Keep an error of this part and go on with the next."""
        try:
            yield
        except InputError as error:
            self.problems += error.problems

    def check(self) -> None:
        if self.problems:
            raise InputError(list(dict.fromkeys(self.problems)))


def prepare(request: Request, watch: Watch | None = None) -> RunDirectory:
    """Make the run directory that a request asks for, or open it if it is there.

    Raises:
        InputError: with everything that is wrong; nothing has been written then.
    """
    found = _Findings()
    existing = None
    with found.part():
        check_free(request.out)
        existing = _existing(request.out)
    if existing is not None:
        request = _completed(request, existing)
    with found.part():
        settings = [*request.settings, *([] if request.seed is None else [f"seed={request.seed}"])]
        spec = resolve(load_spec(request.spec), settings)
        calibration = request.calibration or (existing and existing.record.calibration)
        if calibration or request.init or (existing and existing.record.init):
            spec = composed_at_start(spec, append=bool(calibration and calibration.finetune))
        init = None if request.init is None else open_init(request.init, spec)
        request = _with_init(request, init)
    found.check()
    device, precision = _start(request, existing)
    record, subnet = _examine(request, spec, settings, (device, precision), found)
    if existing is not None:
        return _taken_up(existing, record, request, watch or Watch())
    with (watch or Watch()).task("checking", None):
        check_spec(spec)
    processes.wait()  # all have looked whether there is a run before one makes it
    if processes.is_first():
        pruned = None if init is None else init.file("calibrate", "weights.safetensors")
        RunDirectory.create(request.out, record, spec, subnet, pruned)
    processes.wait()
    processes.until_seen(request.out / "run.json")
    return RunDirectory.open(request.out)


def _with_init(request: Request, init: RunDirectory | None) -> Request:
    """The request with the baseline's weights and the subnet of the calibration that it starts from.

    Raises:
        InputError: it has others of its own.
    """
    if init is None:
        return request
    for name in ("weights", "subnet", "recipe"):
        if getattr(request, name) is not None:
            raise InputError(f"--{name}: has no meaning with --init {init.path}, which brings its own")
    weights, subnet = init.file("baseline", "weights.safetensors"), init.file("calibrate", "subnet.json")
    return replace(request, weights=weights, subnet=subnet)


def _existing(out: Path) -> RunDirectory | None:
    """The run that is in the directory already, if any."""
    try:
        if processes.agreed((out / "run.json").is_file()):
            processes.until_seen(out / "run.json")
            return RunDirectory.open(out)
        if out.exists() and not out.is_dir():
            raise InputError(f"--out: {out} is a file, allowed: a directory")
        if out.is_dir() and any(out.iterdir()):
            allowed = "allowed: a new or an empty directory"
            raise InputError(f"--out: {out} has files in it and is no run directory; {allowed}")
    except OSError as error:
        raise InputError(f"--out: {out}: {error.strerror or error}") from None
    return None


def _completed(request: Request, existing: RunDirectory) -> Request:
    """The request with what it leaves out as the run has it; given weights are not read again."""
    record = existing.record
    changes: dict[str, Any] = {}
    if record.calibration is not None:
        changes = _completed_calibration(request, record)
    elif request.subnet is None and request.init is None:
        changes = {"prune": request.prune or record.prune, "recipe": request.recipe or record.recipe}
        if record.subnet is not None and request.recipe is None and request.prune in (None, record.prune):
            changes["subnet"] = existing.file("search", "subnet.json")
    if request.seed is None and not any(is_seed(setting) for setting in request.settings):
        changes["seed"] = record.seed
    return replace(request, **changes)


def _completed_calibration(request: Request, record: RunRecord) -> dict[str, Any]:
    """What a calibration's request leaves out; a budget or a number of blocks takes the place of both."""
    own, asked = record.calibration, request.calibration
    assert own is not None
    changes: dict[str, Any] = {"recipe": request.recipe or record.recipe}
    if request.weights is None and record.weights is not None:
        changes["weights"] = record.weights["file"]
    if asked is None:
        return {**changes, "calibration": own, "prune": request.prune or record.prune}
    if (request.prune, asked.macs, asked.latency) == (None, None, None):
        changes |= {"prune": record.prune}
        asked = replace(asked, macs=own.macs, latency=own.latency)
    return {**changes, "calibration": replace(asked, judge=asked.judge or own.judge)}


def _taken_up(existing: RunDirectory, record: RunRecord, request: Request, watch: Watch) -> RunDirectory:
    """A run that exists, if the request is the same; of a calibration another choice of blocks may be asked for."""
    if request.weights is None:
        record = replace(record, weights=existing.record.weights)
    if request.init is None:
        record = replace(record, init=existing.record.init)
    other = _with_choice_of(existing.record, record)
    _check_same(replace(existing, record=other), record)
    if (began := existing.record.processes) != record.processes:
        watch.on_note(
            f"the run began with {began} process{'es' * (began > 1)} and goes on with {record.processes}: "
            "as good, but not bit for bit what it would have been"
        )
    if other.differences(existing.record):
        if existing.result("damage") is not None:
            candidates(replace(existing, record=other), 1)
        watch.on_note("another choice of blocks: what was measured is kept, the rest of the run begins anew")
        processes.wait()
        if processes.is_first():
            with locked(existing.path, watch):
                existing.renewed(other)
        processes.wait()
        return RunDirectory.open(existing.path)
    return existing


def _with_choice_of(record: RunRecord, wanted: RunRecord) -> RunRecord:
    """A calibration's record with all of another that changes nothing that was measured of single blocks."""
    own, other = record.calibration, wanted.calibration
    if own is None or other is None:
        return record
    chosen = replace(own, macs=other.macs, latency=other.latency, candidates=other.candidates)
    measured = [
        [setting for setting in each.settings if not setting.strip().startswith("distill.") and not is_seed(setting)]
        for each in (record, wanted)
    ]
    settings = wanted.settings if measured[0] == measured[1] else record.settings
    return replace(record, prune=wanted.prune, calibration=chosen, settings=settings)


def _check_same(existing: RunDirectory, record: RunRecord) -> None:
    if differences := existing.record.differences(record):
        differences[-1] += "; give another --out, or remove it"
        place = Place(str(existing.path))
        raise InputError([Problem(place, "holds another run", difference) for difference in differences])


def _start(request: Request, existing: RunDirectory | None) -> tuple[str, str]:
    """The device and the precision; sets the number of threads."""
    record = None if existing is None else existing.record
    precision = request.precision or (record.precision if record else "no")
    if precision not in PRECISIONS:
        raise InputError(f"--precision: {suggest(precision, PRECISIONS)}")
    threads = request.threads or (record.threads if record else None)
    device = choose_device(request.device or (record.device if record else "auto"), threads)
    processes.check_device(device)
    return device, precision


def choose_device(name: str, threads: int | None) -> str:
    """The device that a name means here; sets the number of CPU threads.

    Raises:
        InputError: no such device, or a number of threads that makes no sense.
    """
    if name not in DEVICES:
        raise InputError(f"--device: {suggest(name, DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: got cuda, but torch finds no GPU here; allowed: auto, cpu")
    if threads is not None:
        if not 0 < threads <= _MOST_THREADS:
            raise InputError(f"--threads: got {threads}, allowed: 1 to {_MOST_THREADS}")
        torch.set_num_threads(threads)
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def _examine(
    request: Request, spec: ArchSpec, settings: Sequence[str], where: tuple[str, str], found: _Findings
) -> tuple[RunRecord, SubnetConfig | None]:
    """Check all parts against each other; report their problems together."""
    data: Data | None = None
    model = subnet = None
    calibration = request.calibration
    if calibration is not None and request.subnet is not None:
        raise InputError("--subnet: has no meaning where blocks are calibrated, which chooses them itself")
    unlabelled = calibration is not None and not calibration.finetune
    plain_model = create_model(spec)
    with found.part():
        data = _open(request, spec, plain_model)
    with found.part():
        model = _model(spec, request.weights, None if unlabelled else data, plain_model)
        if calibration is not None and data is not None:
            calibration = with_judge(calibration, spec, data, model)
    with found.part():
        _check_training(spec)
    supernet = build_supernet(spec, plain_model if model is None else model)
    prune: int | None = None
    with found.part():
        subnet, prune = _check_choice(request, supernet)
    found.check()
    assert model is not None
    weights = None
    if request.weights is not None:
        file = find_weights(request.weights, spec.model.name)
        weights = {"file": str(file.absolute()), "sha256": sha256(file)}
    record = RunRecord(
        spec=spec.name, spec_hash=spec.hash, data=absolute(request.data), num_classes=num_classes_of(model),
        prune=prune, recipe=request.recipe, settings=tuple(split_settings(settings)[1]),
        seed=spec.schedule.seed, threads=torch.get_num_threads(), device=where[0],
        precision=where[1], weights=weights,
        subnet=None if subnet is None else dict(subnet.choices), blocks=tuple(_blocks(supernet)),
        environment=environment(where[0]), calibration=calibration, init=init_record(request.init),
        processes=processes.count(),
    )  # fmt: skip
    return record, subnet


def _open(request: Request, spec: ArchSpec, model: nn.Module) -> Data:
    asked = request.calibration
    if asked is not None and not asked.finetune:
        data = open_images(spec, request.data, model)
    else:
        data = open_for(spec, request.data, model)
        _check_images(spec, data)
    if asked is not None:
        check_enough(data, asked, spec.schedule.seed)
    return data


def _check_images(spec: ArchSpec, data: Data) -> None:
    """Open every part of the data that a stage will ask for."""
    schedule = spec.schedule
    for stage in TRAINING:
        settings = getattr(schedule, stage)
        try:
            data.train(settings, seed=schedule.seed, held_out=schedule.held_out)
        except (AssertionError, IndexError, KeyError, ValueError) as error:  # timm's reader of policies
            message = f"got {settings.auto_augment!r}, which timm refuses: {error}"
            raise InputError([Problem(None, f"{stage}.auto_augment", message)]) from None
    data.held_out(schedule.held_out, schedule.seed)
    data.val()


def _check_training(spec: ArchSpec) -> None:
    """Names of optimizers and schedulers are timm's: only making one tells."""
    for stage in TRAINING:
        settings = getattr(spec.schedule, stage)
        if settings.batch_size < processes.count():
            message = f"got {settings.batch_size}, allowed: an image for each of {processes.count()} processes"
            raise InputError([Problem(None, f"{stage}.batch_size", message)])
        try:
            make_scheduler(make_optimizer(nn.Linear(1, 1), settings), settings, 1)
        except InputError as error:
            raise InputError([Problem(None, stage, str(error))]) from None


def _model(spec: ArchSpec, weights: str | Path | None, data: Data | None, plain_model: nn.Module) -> nn.Module:
    if weights is None:
        return plain_model if data is None else create_model(spec, num_classes=data.num_classes)
    return model_with_weights(spec, weights, data)


def _check_choice(request: Request, supernet: Supernet) -> tuple[SubnetConfig | None, int | None]:
    """The given subnet, and how many blocks are pruned, where that is said."""
    available = supernet.available
    if request.calibration is not None:
        return None, check_prunable(request.prune, request.recipe, request.calibration, supernet)
    if request.subnet is not None:
        subnet = read_subnet(request.subnet, supernet)
        if request.recipe is not None:
            raise InputError("--recipe: has no meaning with --subnet, which names a recipe for each block")
        if request.prune is not None and request.prune != len(subnet.pruned):
            raise InputError(f"--prune: got {request.prune}, but {request.subnet} prunes {len(subnet.pruned)} blocks")
        if not subnet.pruned:
            raise InputError([Problem(Place(str(request.subnet)), "choices", "prunes no block")])
        return subnet, len(subnet.pruned)
    for name in available:
        supernet.default_choice(name, request.recipe)
    if request.prune is None:
        raise InputError("--prune: say how many blocks to prune, or give a --subnet")
    if not 1 <= request.prune <= len(available):
        blocks = f"{supernet.spec.name} has {len(available)} prunable blocks"
        raise InputError(f"--prune: got {request.prune}, allowed: 1 to {len(available)} ({blocks})")
    return None, request.prune


def read_subnet(name_or_path: str | Path, supernet: Supernet) -> SubnetConfig:
    """A shipped subnet or a subnet file, checked against a network.

    Args:
        name_or_path: subnets of the network's own spec may be named without it.

    Raises:
        InputError: with all its problems, each with the file's name.
    """
    file = find_subnet(name_or_path, supernet.spec.name)
    subnet = SubnetConfig.load(file)
    subnet.check(supernet.spec.name, supernet.recipes, file)
    return subnet


def _blocks(supernet: Supernet) -> Iterator[dict[str, Any]]:
    for name, bound in supernet.bound.items():
        yield {"name": name, "structure": bound.group.structure, "recipes": list(bound.group.recipes)}
