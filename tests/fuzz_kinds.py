"""What `fuzz.py` makes wrong, and what is asked to read it: a class for each kind of file.

Whatever the file, the answer is success or an `UpdpError`; everything else is a finding.
"""

from __future__ import annotations

import functools
import io
import json
from dataclasses import asdict
from pathlib import Path
from random import Random

import fake_run
import numpy as np
from mutate import joined_tensors, npz_mutated, split_tensors, tensors_mutated, text_mutated, yaml_mutated
from PIL import Image

from updp import artefact, merge
from updp.calibrate import Damage, DamageTable
from updp.cli.summary import show_header, show_summary
from updp.data import DataConfig, open_data
from updp.files import sha256
from updp.pipeline import Calibration, RunDirectory
from updp.report import render
from updp.report.read import STAGES, read_run
from updp.spec import ArchSpec, list_specs, load_spec, parse_spec
from updp.spec.files import specs_directory
from updp.structure import bind, create_model
from updp.subnet import SubnetConfig, list_subnets, load_subnet
from updp.supernet import build_supernet
from updp.tables import load_tables
from updp.train.checkpoint import Checkpoints

TINY = "deit_digits"
PARTS = "--"  # in the name of a kept file, between the parts of its place in a folder
HALF = DataConfig(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875, interpolation="bilinear")


class Specs:
    """Specs and families, loaded; where the network is a small one as shipped, its blocks are found, too."""

    name = "specs"
    plain = "whole.yaml"

    def __init__(self, folder: Path) -> None:
        root = specs_directory()
        files = sorted([*root.glob("*.yaml"), *root.glob("families/*.yaml")])
        small = [path.read_bytes() for path in files if path.stem.endswith("_digits")]
        whole = [load_spec(name).text.encode() for name in list_specs()]
        self.seeds = [path.read_bytes() for path in files] + whole + small * 9
        self.tables = [path.read_bytes() for path in sorted(root.glob("tables/*.yaml"))]
        self.small = {name: load_spec(name) for name in list_specs() if name.endswith("_digits")}
        self.folder = folder

    def mutated(self, rng: Random) -> tuple[str, bytes]:
        if rng.random() < 0.03:
            return "tables.yaml", yaml_mutated(rng.choice(self.tables), rng, self.tables)
        return "spec.yaml", yaml_mutated(rng.choice(self.seeds), rng, self.seeds)

    def read(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.write_bytes(content)
        if name.endswith("tables.yaml"):
            load_tables(path)
            return
        spec = load_spec(path)
        if parse_spec(spec.text, file="text", name=spec.name).hash != spec.hash:
            raise AssertionError("a spec's own text reads as another spec")
        if self._is_small(spec):
            bind(spec, create_model(spec))

    def _is_small(self, spec: ArchSpec) -> bool:
        """Whether the network is one of the small ones: what else a spec asks for may well take long to build."""
        return any(spec.model == other.model and spec.input == other.input for other in self.small.values())


class Subnets:
    """Subnet files, loaded and held against a network's blocks."""

    name = "subnets"
    plain = "subnet.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.available = build_supernet(load_spec(TINY)).recipes
        own = SubnetConfig(TINY, {block: recipes[0] for block, recipes in self.available.items()}, about="all")
        shipped = [load_subnet(name).to_json().encode() for name in list_subnets()]
        self.seeds = [own.to_json().encode()] * len(shipped) + shipped

    def mutated(self, rng: Random) -> tuple[str, bytes]:
        return "subnet.json", text_mutated(rng.choice(self.seeds), rng, self.seeds)

    def read(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.write_bytes(content)
        config = SubnetConfig.load(path)
        if SubnetConfig.from_json(config.to_json()) != config:
            raise AssertionError("a subnet's own text reads as another subnet")
        config.key()
        config.check(TINY, self.available, path)


@functools.cache
def tiny_spec() -> ArchSpec:
    """A network of two blocks, a few kilobytes."""
    text = load_spec(TINY).text
    for old, new in (("embed_dim: 64", "embed_dim: 8"), ("depth: 6", "depth: 2"), ("img_size: 32", "img_size: 16")):
        assert old in text
        text = text.replace(old, new)
    return parse_spec(text.replace("[3, 32, 32]", "[3, 16, 16]"), file="tiny", name="tiny")


class Artefacts:
    """Saved networks, their sources, states of trainings and weights: read, rebuilt, verified."""

    name = "artefacts"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network, self.source = folder / "net.safetensors", folder / "net.source.safetensors"
        supernet = build_supernet(tiny_spec(), num_classes=2, resized=True).eval()
        block, recipes = next(iter(supernet.available.items()))
        supernet.reduce(SubnetConfig("tiny", {block: recipes[0]}))
        supernet.free_baseline()
        network, certificate = merge(supernet)
        artefact.save_network(self.network, network, supernet, certificate, certificate)
        Checkpoints(folder / "checkpoints").save(
            "key", {"updates": 7, "model": dict(network.state_dict()), "lr": [1.0]}
        )
        self.places = {
            "net.safetensors": self.network,
            "net.source.safetensors": self.source,
            "state.safetensors": next((folder / "checkpoints").iterdir()),
        }
        self.seeds = {name: path.read_bytes() for name, path in self.places.items()}

    def mutated(self, rng: Random) -> tuple[str, bytes]:
        name = rng.choice(("net.safetensors",) * 8 + ("net.source.safetensors", "state.safetensors"))
        return name, tensors_mutated(self.seeds[name], rng, list(self.seeds.values()))

    def read(self, name: str, content: bytes) -> None:
        name = name.rpartition(PARTS)[2]
        for other, path in self.places.items():
            path.write_bytes(self.seeds[other])
        self.places[name].write_bytes(content)
        if name == "state.safetensors":
            Checkpoints(self.folder / "checkpoints").latest("key")
        elif name == "net.safetensors":
            artefact.load(self.network)
            artefact.verify(self.network, without_source=True)
        else:  # signed anew, or all that is told is that it was changed
            header, rest = split_tensors(self.seeds["net.safetensors"])
            header["__metadata__"]["source_sha256"] = sha256(self.source)
            self.network.write_bytes(joined_tensors(json.dumps(header).encode(), rest))
            artefact.verify(self.network)


class Packed:
    """Packed sets of images, opened, and their first images decoded."""

    name = "npz"
    plain = "val.npz"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        images = [_jpeg(40 * number) for number in range(3)]
        arrays = {
            "data": np.frombuffer(b"".join(images), np.uint8),
            "offset": np.cumsum([0, *map(len, images)]),
            "label": np.array([0, 1, 1], np.int16),
            "classes": np.array(["cat", "dog"]),
        }
        self.seeds = []
        for save in (np.savez, np.savez_compressed):
            file = io.BytesIO()
            save(file, **arrays)
            self.seeds.append(file.getvalue())

    def mutated(self, rng: Random) -> tuple[str, bytes]:
        return "val.npz", npz_mutated(rng.choice(self.seeds), rng, self.seeds)

    def read(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.write_bytes(content)
        data = open_data(f"npz:{path}", input=(3, 16, 16), config=HALF)
        data.check_classes(2)
        data.describe()
        images = data.val()
        for index in range(min(len(images), 3)):
            images[index]


def _jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (value, 0, 0)).save(file, "JPEG")
    return file.getvalue()


class Runs:
    """A file of a run directory: the run opened, its stages' results read, its page written, what it came to shown."""

    name = "runs"

    def __init__(self, folder: Path) -> None:
        self.folders = {"searched": folder / "searched", "calibrated": folder / "calibrated"}
        fake_run.write_run(self.folders["searched"])
        _calibrated(self.folders["calibrated"])
        self.seeds = {
            PARTS.join((name, *path.relative_to(root).parts)): path.read_bytes()
            for name, root in self.folders.items()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    def mutated(self, rng: Random) -> tuple[str, bytes]:
        name = rng.choice(list(self.seeds))
        if name.endswith(".yaml"):
            return name, yaml_mutated(self.seeds[name], rng, [self.seeds[name]])
        return name, text_mutated(
            self.seeds[name], rng, [text for other, text in self.seeds.items() if other.endswith(".json")]
        )

    def read(self, name: str, content: bytes) -> None:
        kind, *parts = name.split(PARTS)
        folder = self.folders[kind]
        path = folder.joinpath(*parts)
        path.write_bytes(content)
        try:
            _answers(folder)
        finally:
            path.write_bytes(self.seeds[name])


def _answers(folder: Path) -> None:
    """Read all that is read of a run without its network; a refusal must not keep the rest from being tried."""
    refused = None
    for read in (_opened, lambda folder: render(read_run(folder))):
        try:
            read(folder)
        except artefact.InputError as error:
            refused = error
    if refused is not None:
        raise refused


def _opened(folder: Path) -> None:
    run = RunDirectory.open(folder)
    show_header(run)
    for stage in STAGES:
        run.result(stage)
    show_summary(run)
    if run.record.calibration is not None:
        DamageTable.load(run.file("damage", "table.json"))


def _calibrated(folder: Path) -> None:
    """The run of a calibration, as far as it is read."""
    fake_run.write_run(folder, ("baseline", "finetune", "merge"))
    fake_run.change(folder / "run.json", calibration=asdict(Calibration(finetune=True, macs=0.8, judge="digits")))
    rows = [Damage(block, "full", 0.1, 0.2, 1000, 2000, 1e-3, 2e-3, 500, 400) for block in fake_run.BLOCKS]
    solved = {
        "block": fake_run.BLOCKS[0],
        "operator": "a",
        "samples": 9,
        "unknowns": 9,
        "ridge": 0.1,
        "error_before": 2.0,
        "error": 1.0,
    }
    damage = {"macs": 9000, "latency": 0.1, "solved_on": 80, "judged_on": 20, "rows": [asdict(row) for row in rows]}
    calibrate = {
        "damage": 0.3,
        "damage_solved": 0.4,
        "choices": fake_run.CHOICES,
        "solved": [solved] * 3,
        "candidates": [{}],
    }
    for stage, result in (("damage", damage), ("calibrate", calibrate)):
        (folder / stage).mkdir()
        fake_run.write_json(folder / stage / "result.json", result)
    DamageTable(fake_run.SPEC, 9000, 20, tuple(rows), 0.1, {"cpu": "x"}).save(folder / "damage" / "table.json")
    SubnetConfig(fake_run.SPEC, fake_run.CHOICES).save(folder / "calibrate" / "subnet.json")


KINDS = {kind.name: kind for kind in (Specs, Subnets, Artefacts, Packed, Runs)}
