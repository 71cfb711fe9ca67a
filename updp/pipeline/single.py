"""Work on one network outside a run: judging it, merging it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from updp.artefact import inspect, load, save_network, source_path
from updp.certificate import Certificate
from updp.data import Data
from updp.errors import InputError, Place, Problem, suggest
from updp.files import check_writable
from updp.oracle import Score
from updp.pipeline.context import open_for, score
from updp.pipeline.finish import merge_certified
from updp.pipeline.given import model_with_weights
from updp.pipeline.prepare import read_subnet
from updp.pipeline.settings import resolve
from updp.pipeline.watch import Watch
from updp.randomize import randomize, settle
from updp.spec import ArchSpec, load_spec
from updp.structure import create_model
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, build_supernet

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Judged:
    """A network's score, and what it was scored on and how."""

    network: str
    weights: str
    score: Score
    data: Data


def judge(
    name: str,
    data_name: str,
    weights: str | Path | None,
    settings: Sequence[str],
    device: str,
    watch: Watch | None = None,
) -> Judged:
    """Score a saved network, or a spec's network with given weights, on the validation images of a data set.

    Args:
        name: the path of a saved network, or a spec.
        settings: of the spec; with a saved network only ``data.…``.

    Raises:
        InputError: network, weights and data do not exist or do not fit.
    """
    saved = Path(name).suffix == _SUFFIX
    spec = _saved_spec(Path(name), weights, settings) if saved else resolve(load_spec(name), settings)
    data = open_for(spec, data_name)
    if saved:
        model, origin = load(name), "its own"
        data.check_classes(int(model.num_classes))  # type: ignore[arg-type]
    elif weights is not None:
        model, origin = model_with_weights(spec, weights, data), str(weights)
    else:
        model, origin = create_model(spec, num_classes=data.num_classes or None, seed=spec.schedule.seed), "random"
    result = score(model.to(device), data, watch or Watch(), "scoring", spec)
    return Judged(name, origin, result, data)


def _saved_spec(path: Path, weights: str | Path | None, settings: Sequence[str]) -> ArchSpec:
    if weights is not None:
        raise InputError(f"--weights: {path} has its own weights; allowed with a spec")
    others = [setting for setting in settings if not setting.strip().startswith("data.")]
    if others:
        place = Place(f"--set {others[0]}")
        raise InputError([Problem(place, "", "a saved network stays what it is; allowed: data.mean, data.std, …")])
    return resolve(inspect(path).spec, settings)


@dataclass(frozen=True)
class Merged:
    """A merged network that was saved."""

    path: Path
    network: nn.Module
    certificate: Certificate


def merge_spec(
    name: str, subnet: str | Path, weights: str | Path | None, out: Path, settings: Sequence[str] = (), seed: int = 0
) -> Merged:
    """Merge a spec's network as a subnet says, without training, and save it.

    Args:
        subnet: the name of a shipped one, or a file.
        weights: of the baseline; every parameter and statistic is random without them.

    Raises:
        InputError: spec, subnet, weights or the place to write are wrong. Nothing is written then.
        CertificateError: the merged network is not the one that it was made from.
    """
    spec = resolve(load_spec(name), settings)
    if out.suffix != _SUFFIX or out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out: got {out}, allowed: a file NAME{_SUFFIX} in a folder that exists")
    check_writable(out)
    supernet = pruned_network(spec, subnet, weights, seed)
    network, certificate, random = merge_certified(supernet)
    save_network(out, network, supernet, certificate, random)
    return Merged(out, network, certificate)


def pruned_network(spec: ArchSpec, subnet: str | Path, weights: str | Path | None = None, seed: int = 0) -> Supernet:
    """A spec's network pruned as a subnet says, ready to merge; all its values are random without weights.

    Args:
        subnet: the name of a shipped one, a file, or all:RECIPE for every block that the recipe can prune.

    Raises:
        InputError: subnet or weights do not fit the spec.
    """
    model = create_model(spec, seed=seed) if weights is None else model_with_weights(spec, weights, None)
    torch.manual_seed(seed)
    supernet = build_supernet(spec, model, resized=True)
    if weights is None:
        randomize(supernet, seed)
    supernet.reduce(_chosen(subnet, supernet))
    supernet.free_baseline()
    supernet.eval()
    if weights is None:
        settle(supernet, lambda: supernet(torch.randn(2, *spec.input)))
    return supernet


def _chosen(subnet: str | Path, supernet: Supernet) -> SubnetConfig:
    """The subnet; of all:RECIPE the blocks that the recipe can prune."""
    every, _, recipe = str(subnet).partition(":")
    if isinstance(subnet, Path) or every != "all" or not recipe:
        return read_subnet(subnet, supernet)
    if recipe not in supernet.spec.recipes:
        raise InputError(f"subnet all:RECIPE: {suggest(recipe, supernet.spec.recipes)}")
    return SubnetConfig(
        supernet.spec.name, {name: recipe for name, known in supernet.available.items() if recipe in known}
    )


def products(merged: Merged) -> list[Path]:
    """The files that `merge_spec` wrote."""
    return [merged.path, source_path(merged.path)]
