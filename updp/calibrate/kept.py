"""Solved operators on disk: a file for each group of pairs that were solved together, with what was found out of them.

A file is there whole or not at all; whoever is interrupted goes on behind the last of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from updp.artefact import load_tensors, save_tensors
from updp.calibrate.costs import Pair
from updp.errors import InputError
from updp.recipe import PrunedFlow
from updp.subnet import SubnetConfig
from updp.supernet import Supernet

_PATTERN = "operators-*.safetensors"


@dataclass(frozen=True)
class Found:
    """What solving one block under one recipe alone came to.

    Attributes:
        damage: how far the network's answers move.
        error: of the block's worst operator.
        samples, unknowns: of the operator with the fewest samples for its unknowns.
    """

    damage: float
    error: float
    samples: int
    unknowns: int


def save_group(
    folder: Path, number: int, supernet: Supernet, found: Mapping[Pair, Found], identity: Mapping[str, Any]
) -> None:
    """Write the flows of these pairs as they are in the supernet."""
    tensors: dict[str, Tensor] = {}
    for index, pair in enumerate(found):
        state = flow_of(supernet, pair).state_dict()
        tensors |= {f"{index}.{name}": tensor for name, tensor in state.items()}
    rows = [{"pair": pair, **asdict(each)} for pair, each in found.items()]
    metadata = {"updp": "operators", "identity": _text(identity), "rows": json.dumps(rows)}
    save_tensors(folder / f"operators-{number:03}.safetensors", tensors, metadata)


def load_group(
    folder: Path, number: int, supernet: Supernet, pairs: Sequence[Pair], identity: Mapping[str, Any]
) -> dict[Pair, Found] | None:
    """Put a group's operators into the supernet, if the file is there and of the same pairs and identity."""
    file = folder / f"operators-{number:03}.safetensors"
    if not file.is_file():
        return None
    tensors, metadata = load_tensors(file)
    found = _rows(metadata, file)
    if metadata.get("identity") != _text(identity) or list(found) != list(pairs):
        return None
    _put(supernet, tensors, list(found), set(pairs))
    return found


def load_operators(supernet: Supernet, folder: Path, subnet: SubnetConfig | None = None) -> list[Pair]:
    """Put operators that were solved for each block alone into the supernet's flows, what is appended included.

    Args:
        folder: the stage ``damage`` of a run directory.
        subnet: only those that it names; all when left out.

    Returns:
        The pairs of block and recipe that were loaded.

    Raises:
        InputError: there are none, or they are of another network.
    """
    files = sorted(folder.glob(_PATTERN))
    if not files:
        raise InputError(f"{folder}: has no solved operators")
    loaded = []
    for file in files:
        tensors, metadata = load_tensors(file)
        pairs = list(_rows(metadata, file))
        wanted = {(b, r) for b, r in pairs if subnet is None or subnet.choice(b) == r}
        _put(supernet, tensors, pairs, wanted)
        loaded += [pair for pair in pairs if pair in wanted]
    return loaded


def _put(supernet: Supernet, tensors: Mapping[str, Tensor], pairs: Sequence[Pair], wanted: set[Pair]) -> None:
    for index, pair in enumerate(pairs):
        if pair in wanted:
            own = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == str(index)}
            try:
                flow_of(supernet, pair).load_state_dict(own)
            except (RuntimeError, KeyError) as error:
                raise InputError(f"operators of block {pair[0]}, recipe {pair[1]}: {error}") from None


def flow_of(supernet: Supernet, pair: Pair) -> PrunedFlow:
    """The flow of a block under a recipe."""
    flow = supernet.blocks[pair[0]].choices[pair[1]]
    assert isinstance(flow, PrunedFlow)
    return flow


def _rows(metadata: Mapping[str, str], file: Path) -> dict[Pair, Found]:
    try:
        rows = json.loads(metadata["rows"])
        return {
            (row["pair"][0], row["pair"][1]): Found(**{k: v for k, v in row.items() if k != "pair"}) for row in rows
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{file}: holds no solved operators: {error}") from None


def _text(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)
