"""Saved networks: one safetensors file that says what it is and is rebuilt from its own text.

The metadata holds the resolved spec text and its hash, the SubnetConfig, the format version, the versions of updp,
timm and torch, and the certificate. Nothing in the file is ever run. What a merged network was made from, the pruned
blocks before merging, is a second file beside it, ``NAME.source.safetensors``: `verify` needs it, users of the network
do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from updp.certificate import Certificate, certify, versions
from updp.errors import InputError, SpecError, suggest
from updp.files import replacing, sha256
from updp.merging import assemble, merge_blocks
from updp.spec import ArchSpec, parse_spec
from updp.structure import create_model
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, build_supernet

FORMAT_VERSION = "1"


# --- tensors ----------------------------------------------------------------------------------------------------------


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically. Tied tensors (same memory, same shape) are stored once and named in the metadata."""
    stored: dict[str, Tensor] = {}
    owners: dict[tuple[Any, ...], str] = {}
    ties: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
        )
        if tensor.numel() and place in owners:
            ties[name] = owners[place]
            continue
        owners[place] = name
        stored[name] = tensor.detach().cpu().contiguous().clone()
    extra = {"ties": json.dumps(ties)} if ties else {}
    with replacing(path) as temporary:
        try:
            save_file(stored, temporary, metadata={"format": "pt", **(metadata or {}), **extra})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(str(error)) from error
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """The library writes metadata in random order; sorted, the same network is the same file."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # padded with blanks, as the format allows
            file.seek(8)
            file.write(text.ljust(length))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, ties restored.

    Raises:
        InputError: there is no such file, or it is not a whole safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # Cloned: tensors of a mapped file are not aligned, and alignment chooses the algorithm, hence the bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None
    ties = _json(metadata.get("ties", "{}"), path, "ties")
    if not isinstance(ties, dict):
        raise InputError(f"{path}: metadata 'ties': got {type(ties).__name__}, allowed: names of tensors by name")
    for name, owner in ties.items():
        if not isinstance(owner, str) or owner not in tensors:
            raise InputError(f"{path}: {name!r} is tied to {owner!r}, which the file does not hold")
        tensors[name] = tensors[owner]
    return tensors, metadata


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], file: str | Path, *, assign: bool = False) -> None:
    """Load a state dict strictly.

    Raises:
        InputError: names or shapes differ; the message lists the first of each kind. Nothing is loaded then.
    """
    own = module.state_dict()
    problems = []
    if missing := [name for name in own if name not in tensors]:
        problems.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if unknown := [name for name in tensors if name not in own]:
        problems.append(f"{len(unknown)} tensors do not belong ({_some(unknown)})")
    wrong = [n for n, t in tensors.items() if n in own and own[n].shape != t.shape]
    if wrong:
        shown = [f"{n}: got {list(tensors[n].shape)}, expected {list(own[n].shape)}" for n in wrong[:3]]
        problems.append(f"{len(wrong)} tensors have another shape ({'; '.join(shown)})")
    if problems:
        raise InputError(f"{file}: does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(dict(tensors), assign=assign)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _json(text: str, path: Path, what: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: metadata {what!r} is not JSON: {error}") from None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A baseline's weights, names as in the file: safetensors, or a ``.pth`` state dict (tensors only).

    Raises:
        InputError: the file is not such a file.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".bin") and path.is_file():
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its reader met
            raise InputError(f"{path}: not a state dict of tensors: {str(error).splitlines()[0]}") from None
        if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
            tensors = tensors["state_dict"]
        named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
        if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise InputError(f"{path}: not a state dict of tensors")
        return dict(tensors)
    return load_tensors(path)[0]


# --- networks ---------------------------------------------------------------------------------------------------------


def source_path(path: str | Path) -> Path:
    """Where the pruned blocks before merging are kept: ``net.safetensors`` -> ``net.source.safetensors``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.source{path.suffix}")


def save_network(
    path: str | Path,
    network: nn.Module,
    supernet: Supernet,
    certificate: Certificate,
    random_certificate: Certificate | None = None,
) -> None:
    """Save a merged network and, beside it, the pruned blocks that it was merged from.

    Args:
        network: what `updp.merge` returned for the supernet's current subnet.
        certificate: of the network's own weights.
        random_certificate: of the same subnet with every parameter random.
    """
    source = {n: t for n, t in supernet.state_dict().items() if _belongs_to_pruned(supernet, n)}
    save_tensors(source_path(path), source, {"updp": "source", "format_version": FORMAT_VERSION})
    spec = supernet.spec
    metadata = {
        "updp": "network",
        "format_version": FORMAT_VERSION,
        "spec_name": spec.name,
        "spec": spec.text,
        "spec_hash": spec.hash,
        "subnet": supernet.subnet.to_json(),
        "num_classes": str(_num_classes(network)),
        "certificate": json.dumps(certificate.to_json()),
        "versions": json.dumps(versions()),
        "source_sha256": sha256(source_path(path)),
    }
    if random_certificate is not None:
        metadata["certificate_random"] = json.dumps(random_certificate.to_json())
    save_tensors(path, network.state_dict(), metadata)


def _belongs_to_pruned(supernet: Supernet, name: str) -> bool:
    return any(
        f".choices.{block.active}." in name and supernet.get_submodule(name.partition(".choices.")[0]) is block
        for block in supernet.blocks.values()
        if block.active != "keep"
    )


def _num_classes(network: nn.Module) -> int:
    value = getattr(network, "num_classes", None)
    return int(value) if isinstance(value, int) else 0


@dataclass(frozen=True)
class Header:
    """What a saved network says of itself."""

    path: Path
    spec: ArchSpec
    subnet: SubnetConfig
    num_classes: int
    certificate: Certificate | None
    versions: Mapping[str, str]
    source_sha256: str


def read_header(path: Path, metadata: Mapping[str, str]) -> Header:
    """Check and read the metadata of a saved network.

    Raises:
        InputError: the file is another kind of safetensors file, of a newer format, or its spec was changed.
    """
    if metadata.get("updp") != "network":
        raise InputError(f"{path}: not a network saved by updp (weights alone go to --weights, with a spec)")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path}: format_version {suggest(str(metadata.get('format_version')), [FORMAT_VERSION])}")
    missing = [
        k for k in ("spec_name", "spec", "spec_hash", "subnet", "num_classes", "certificate") if k not in metadata
    ]
    if missing:
        raise InputError(f"{path}: the metadata lacks {', '.join(missing)}")
    spec = parse_spec(metadata["spec"], file=f"{path}!spec", name=metadata["spec_name"])
    if spec.hash != metadata["spec_hash"]:
        raise InputError(f"{path}: spec_hash is not that of the spec in the file")
    subnet = SubnetConfig.from_json(metadata["subnet"], file=f"{path}!subnet")
    try:
        certificate = Certificate.from_json(_json(metadata["certificate"], path, "certificate"))
        classes = int(metadata["num_classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: metadata is incomplete: {error}") from None
    read = _json(metadata.get("versions", "{}"), path, "versions")
    return Header(path, spec, subnet, classes, certificate, read, metadata.get("source_sha256", ""))


def load(path: str | Path) -> nn.Module:
    """A saved network as a plain `nn.Module` in eval mode, rebuilt from the spec text that the file carries.

    Raises:
        InputError: the file is missing, truncated, not a network of updp, or its tensors do not fit its own spec.
    """
    tensors, metadata = load_tensors(path)
    header = read_header(Path(path), metadata)
    return _rebuild(header, tensors)


def _supernet_of(header: Header, tensors: Mapping[str, Tensor]) -> Supernet:
    """The network before merging: kept blocks and everything around blocks filled in, pruned blocks random."""
    try:
        model = create_model(header.spec, num_classes=header.num_classes or None)
        own = model.state_dict()
        model.load_state_dict(own | {n: t for n, t in tensors.items() if n in own and own[n].shape == t.shape})
        supernet = build_supernet(header.spec, model, resized=True)
        supernet.reduce(header.subnet)
    except SpecError as error:
        raise InputError(f"{header.path}: its spec builds no such network here: {error}") from None
    return supernet


def _rebuild(header: Header, tensors: Mapping[str, Tensor]) -> nn.Module:
    supernet = _supernet_of(header, tensors)
    network = assemble(supernet, merge_blocks(supernet, values=False))
    load_state(network, tensors, header.path, assign=True)
    return network.eval()


def inspect(path: str | Path) -> Header:
    """What a saved network says of itself, without building it."""
    return read_header(Path(path), load_tensors(path)[1])


# --- verify -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    ``random``: the certificate of this spec and subnet, recomputed with every parameter random. ``given``: the same on
    the network's own weights, or None where its source file is not beside it. ``stored``: the largest relative
    difference between a saved tensor and the one merged again from the source; ``stored_bound`` is half a unit in the
    last place of the saved type.
    """

    random: Certificate
    given: Certificate | None
    stored: float | None
    stored_bound: float | None
    worst_tensor: str | None
    reason: str | None = None

    @property
    def weights_checked(self) -> bool:
        """Whether the stored tensors themselves were held against what they were merged from."""
        return self.given is not None

    @property
    def ok(self) -> bool:
        """Everything that could be checked holds."""
        stored = self.stored is None or (self.stored_bound is not None and self.stored <= self.stored_bound)
        return self.random.ok and (self.given is None or self.given.ok) and stored

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "weights_checked": self.weights_checked,
            "random": self.random.to_json(),
            "given": None if self.given is None else self.given.to_json(),
            "stored": self.stored,
            "stored_bound": self.stored_bound,
            "worst_tensor": self.worst_tensor,
            "reason": self.reason,
        }


def verify(path: str | Path, *, without_source: bool = False) -> Verification:
    """Recompute the certificate of a saved network.

    Args:
        without_source: be content, where the source file is not beside it, with the proof for random weights: that
            this spec and subnet merge exactly, not that these tensors came out of it.

    Raises:
        InputError: as `load`; or the source file is not beside it, or not the one it was merged from.
    """
    path = Path(path)
    tensors, metadata = load_tensors(path)
    header = read_header(path, metadata)
    reason = _why_unchecked(header)
    if reason is not None and header.subnet.pruned and not without_source:
        raise InputError(f"{path}: {reason} (--without-source checks the spec and the subnet alone)")
    network = _rebuild(header, tensors)
    supernet = _supernet_of(header, tensors)
    random = certify(supernet, weights="random")
    if reason is not None:
        return Verification(random, None, None, None, None, reason)
    _load_source(supernet, source_path(path))
    given = certify(supernet, weights="given")
    stored, bound, name = _compare(supernet, network)
    return Verification(random, given, stored, bound, name)


def _why_unchecked(header: Header) -> str | None:
    """Why a network's tensors cannot be held against what they were merged from; None where they can.

    Raises:
        InputError: the source file is another network's.
    """
    if not header.subnet.pruned:
        return "nothing is merged in this network"
    source = source_path(header.path)
    if not source.is_file():
        return f"{source.name} is not beside it, so its weights cannot be checked"
    if sha256(source) != header.source_sha256:
        raise InputError(f"{source}: not the file that {header.path.name} was merged from (its checksum differs)")
    return None


def _load_source(supernet: Supernet, source: Path) -> None:
    """Fill the pruned blocks from the source file."""
    supernet.free_baseline()
    expected = {n: t for n, t in supernet.state_dict().items() if _belongs_to_pruned(supernet, n)}
    tensors, _ = load_tensors(source)
    if set(tensors) != set(expected) or any(tensors[n].shape != t.shape for n, t in expected.items()):
        raise InputError(f"{source}: its tensors are not those of the pruned blocks")
    supernet.load_state_dict(supernet.state_dict() | tensors)


def _compare(supernet: Supernet, network: nn.Module) -> tuple[float, float, str | None]:
    """The worst saved tensor against the same merged again in float64, relative to the tensor's largest value."""
    exact = assemble(supernet, merge_blocks(supernet.double())).state_dict()
    worst, bound, name = 0.0, 0.0, None
    for key, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        reference = exact[key].double()
        scale = float(reference.abs().max()) if reference.numel() else 0.0
        difference = float((tensor.double() - reference).abs().max()) if reference.numel() else 0.0
        error = difference / scale if scale else difference
        bound = max(bound, torch.finfo(tensor.dtype).eps / 2)
        if not math.isfinite(error):
            return math.inf, bound, key
        if error > worst:
            worst, name = error, key
    return worst, bound, name
