"""``updp calibrate``: a pretrained network pruned without training, from a few hundred images without labels."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from updp.artefact import save_network, source_path
from updp.calibrate import DamageTable, Solved, SolveSettings, choose, measure_damage, network_damage, solve_subnet
from updp.certificate import Certificate
from updp.data import ImageSet, loader
from updp.errors import InputError, Place, Problem
from updp.files import json_text, read_json, sha256, write_text
from updp.oracle import Count, count, count_subnet
from updp.packaged import find_weights
from updp.pipeline.context import absolute, open_for, workers_for
from updp.pipeline.finish import merge_certified
from updp.pipeline.prepare import model_with_weights
from updp.pipeline.settings import resolve, rewrite
from updp.pipeline.watch import Watch
from updp.spec import ArchSpec, load_spec
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, build_supernet

_BATCH = 50
_LEAST_IMAGES = 10


@dataclass(frozen=True)
class CalibrationRequest:
    """What ``updp calibrate`` is asked for.

    Attributes:
        images: how many to use; a fifth of them only judge the damage.
        prune, macs: how many blocks, or at most which part of the baseline's multiply-accumulates.
    """

    spec: str
    weights: str | Path
    data: str
    out: Path
    prune: int | None = None
    macs: float | None = None
    recipe: str | None = None
    images: int = 1000
    settings: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True)
class Calibrated:
    """A network that was pruned by calibration, and what is known of it."""

    table: DamageTable
    subnet: SubnetConfig
    solved: tuple[Solved, ...]
    damage: float
    certificate: Certificate
    before: Count
    after: Count
    path: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.table.spec, "choices": dict(self.subnet.choices), "damage": self.damage,
            "solved": [dataclasses.asdict(each) for each in self.solved], "certificate": self.certificate.to_json(),
            "before": self.before.to_json(), "after": self.after.to_json(), "file": self.path.name,
            "seconds": self.seconds,
        }  # fmt: skip


def composed_at_start(spec: ArchSpec) -> ArchSpec:
    """The spec with operators that are composed before anything is trained, so that they can be solved for."""
    recipes = [name for name, recipe in spec.recipes.items() if recipe.kind == "prune"]
    return rewrite(spec, {f"recipes.{name}.compose": "start" for name in recipes})


def calibrate(request: CalibrationRequest, watch: Watch | None = None) -> Calibrated:
    """Measure each block's damage (or read what was measured before), choose blocks, solve them, merge, save.

    Raises:
        InputError: something asked for does not exist or does not fit. Nothing is written then.
    """
    start, watch = time.perf_counter(), watch or Watch()
    spec = composed_at_start(resolve(load_spec(request.spec), request.settings))
    supernet, images = _open(request, spec)
    solve, judge = _Batches(images, spec, 0.0, 0.8), _Batches(images, spec, 0.8, 1.0, kept=True)
    settings = SolveSettings(seed=request.seed)
    table = _table(request, spec, supernet, (solve, judge), settings, watch)
    subnet = choose(table, prune=request.prune, macs=request.macs)
    with watch.task("solving", len(subnet.pruned)) as advance:
        solved = solve_subnet(supernet, subnet, solve, settings, advance)
    damage = network_damage(supernet, subnet, judge)
    supernet.reduce(subnet)
    supernet.free_baseline()
    network, certificate, random = merge_certified(supernet.eval())
    path = request.out / "network.safetensors"
    save_network(path, network, supernet, certificate, random)
    subnet.save(request.out / "subnet.json")
    result = Calibrated(
        table, subnet, tuple(solved), damage, certificate, count_subnet(spec),
        count(network, spec.input, supernet.bound, choices=dict(subnet.choices)), path, time.perf_counter() - start,
    )  # fmt: skip
    write_text(request.out / "result.json", json_text(result.to_json()))
    return result


def _open(request: CalibrationRequest, spec: ArchSpec) -> tuple[Supernet, ImageSet]:
    """Everything a request names, checked before anything is written."""
    if request.prune is None and request.macs is None:
        raise InputError("--prune or --budget: say how many blocks to prune, or what the network may cost")
    if request.macs is not None and not 0 < request.macs < 1:
        raise InputError(f"--budget macs: got {request.macs:g}, allowed: a part of the baseline's, such as 0.8x")
    data = open_for(spec, request.data, labelled=False)
    images = data.any_images(request.images, request.seed)
    if len(images) < _LEAST_IMAGES:
        raise InputError(f"data {request.data!r}: {len(images)} images, allowed: at least {_LEAST_IMAGES}")
    supernet = build_supernet(spec, model_with_weights(spec, request.weights, None), resized=True)
    if request.prune is not None and not 1 <= request.prune <= len(supernet.available):
        blocks = f"{spec.name} has {len(supernet.available)} prunable blocks"
        raise InputError(f"--prune: got {request.prune}, allowed: 1 to {len(supernet.available)} ({blocks})")
    for name in supernet.available if request.recipe else ():
        supernet.default_choice(name, request.recipe)
    _make(request.out)
    return supernet, images


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / "damage.json").is_file():
            raise InputError(f"--out: {out} has files in it; allowed: a new, an empty, or a calibration's directory")
    except OSError as error:
        raise InputError(f"--out: {out}: {error.strerror or error}") from None


class _Batches:
    """A part of the images: read anew each time, unless they are ``kept`` in memory."""

    def __init__(self, images: ImageSet, spec: ArchSpec, first: float, last: float, *, kept: bool = False) -> None:
        self.images, self.spec = images.part(round(first * len(images)), round(last * len(images))), spec
        self.kept: list[Tensor] | None = [] if kept else None

    def __call__(self) -> Iterator[Tensor]:
        if self.kept:
            yield from self.kept
            return
        batches = []
        for batch, _ in loader(self.images, _BATCH, train=False, workers=workers_for(self.spec)):
            if self.kept is not None:
                batches.append(batch)
            yield batch
        self.kept = batches if self.kept is not None else None


def _table(
    request: CalibrationRequest,
    spec: ArchSpec,
    supernet: Supernet,
    batches: tuple[_Batches, _Batches],
    settings: SolveSettings,
    watch: Watch,
) -> DamageTable:
    """The damages, from the directory if they were measured there for the same network and images."""
    identity = {
        "spec_hash": spec.hash, "weights": sha256(find_weights(request.weights, spec.model.name)),
        "data": absolute(request.data),
        "images": len(batches[0].images) + len(batches[1].images), "recipe": request.recipe,
        "settings": dataclasses.asdict(settings), "torch": torch.__version__,
    }  # fmt: skip
    record, file = request.out / "calibrate.json", request.out / "damage.json"
    if file.is_file():
        if read_json(record) != json.loads(json.dumps(identity)):
            message = "is of another network, other images or other settings; give another --out, or remove it"
            raise InputError([Problem(Place(str(file)), "", message)])
        return DamageTable.load(file)
    pairs = sum(len(recipes) if request.recipe is None else 1 for recipes in supernet.available.values())
    with watch.task("damage of each block", pairs) as advance:
        table = measure_damage(supernet, *batches, settings, recipe=request.recipe, progress=advance)
    write_text(record, json_text(identity))
    table.save(file)
    return table


def products(result: Calibrated) -> list[Path]:
    """The files that `calibrate` wrote, the network first."""
    folder = result.path.parent
    return [result.path, source_path(result.path), *(folder / name for name in ("subnet.json", "damage.json"))]
