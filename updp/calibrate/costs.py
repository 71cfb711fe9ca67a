"""What blocks cost, as they are and merged: multiply-accumulates, and the time they take here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from updp.errors import InputError
from updp.measure import LatencyTable, Timing, compare, environment
from updp.merging import merge_blocks
from updp.oracle import count_supernet
from updp.structure import evaluating
from updp.subnet import SubnetConfig
from updp.supernet import Supernet

NETWORK = "network"
NETWORK_SECONDS, BLOCK_SECONDS = 4.0, 0.5  # spent on timing, roughly

Pair: TypeAlias = tuple[str, str]
"""A block and a recipe."""


@dataclass(frozen=True)
class Cost:
    """One block under one recipe, merged, beside the block as it was.

    Attributes:
        macs, macs_before: multiply-accumulates of one image.
        latency, latency_before: seconds, medians of runs in turns at batch 1.
    """

    block: str
    recipe: str
    macs: int
    macs_before: int
    latency: float
    latency_before: float


@dataclass(frozen=True)
class Costs:
    """Every block under every recipe, and the whole network as it is.

    Attributes:
        macs, latency: of the network; seconds.
        times: all timings, with their spread and what they depend on: ``network``, each block by its name, and each
            merged block as ``BLOCK RECIPE``.
    """

    macs: int
    latency: float
    rows: tuple[Cost, ...]
    times: LatencyTable

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "times": self.times.to_dict()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Costs:
        """Read what `to_json` gave.

        Raises:
            InputError: it is something else.
        """
        try:
            rows = tuple(Cost(**row) for row in data["rows"])
            return cls(int(data["macs"]), float(data["latency"]), rows, LatencyTable.from_dict(data["times"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a table of costs: {error}") from None


def measure_costs(supernet: Supernet, pairs: Sequence[Pair], progress: Callable[[int], None] | None = None) -> Costs:
    """Count and time every block as it is and as each recipe makes it; nothing need be solved for that.

    Args:
        progress: called with how many blocks are timed.
    """
    macs = _macs(supernet, pairs)
    about = environment(_like(supernet).device, dtype=_like(supernet).dtype)
    times = LatencyTable(about, tuple(_times(supernet, pairs, progress)))
    seconds = {row.name: row.median_ms / 1e3 for row in times.rows}
    rows = [
        Cost(block, recipe, macs[block, recipe], macs[block, ""], seconds[f"{block} {recipe}"], seconds[block])
        for block, recipe in pairs
    ]
    return Costs(macs["", ""], seconds[NETWORK], tuple(rows), times)


def _like(supernet: Supernet) -> torch.Tensor:
    return next(supernet.parameters())


def _macs(supernet: Supernet, pairs: Iterable[Pair]) -> Mapping[Pair, int]:
    """Of each block under each recipe; ``""`` stands for the baseline, and for the network."""
    costs: dict[Pair, int] = {}
    supernet.set_subnet(supernet.all_keep())
    kept = count_supernet(supernet)
    costs["", ""] = kept.macs
    costs |= {(row.name, ""): row.macs for row in kept.blocks}
    for blocks in _by_recipe(pairs):
        supernet.set_subnet(SubnetConfig(supernet.spec.name, blocks))
        costs |= {
            (row.name, blocks[row.name]): row.macs for row in count_supernet(supernet).blocks if row.name in blocks
        }
    supernet.set_subnet(supernet.all_keep())
    return costs


def _by_recipe(pairs: Iterable[Pair]) -> list[dict[str, str]]:
    """Pairs in groups of one recipe each."""
    groups: dict[str, dict[str, str]] = {}
    for block, recipe in pairs:
        groups.setdefault(recipe, {})[block] = recipe
    return list(groups.values())


def _times(supernet: Supernet, pairs: Sequence[Pair], progress: Callable[[int], None] | None) -> Iterable[Timing]:
    """Of the network, and of each block and its merged forms in turns."""
    device = _like(supernet).device
    merged: dict[str, dict[str, nn.Module]] = {}
    for blocks in _by_recipe(pairs):
        supernet.set_subnet(SubnetConfig(supernet.spec.name, blocks))
        for block in merge_blocks(supernet):
            merged.setdefault(block.name, {})[blocks[block.name]] = block.merged
    supernet.set_subnet(supernet.all_keep())
    with evaluating(supernet):
        x = torch.randn(1, *supernet.spec.input, device=device, dtype=_like(supernet).dtype)
        yield from compare({NETWORK: lambda: supernet(x)}, NETWORK_SECONDS, device).values()
        for number, (name, forms) in enumerate(merged.items(), 1):
            yield from _block_times(supernet, name, forms, device)
            if progress is not None:
                progress(number)


def _block_times(
    supernet: Supernet, name: str, forms: Mapping[str, nn.Module], device: torch.device
) -> Iterable[Timing]:
    bound, keep = supernet.bound[name], supernet.blocks[name].keep
    assert keep is not None
    x = torch.randn(1, *bound.input_shape[1:], device=device, dtype=_like(supernet).dtype)
    functions: dict[str, Callable[[], object]] = {name: lambda: keep(x, *bound.args, **bound.kwargs)}
    functions |= {f"{name} {recipe}": lambda form=form: form(x) for recipe, form in forms.items()}  # type: ignore[misc]
    return compare(functions, BLOCK_SECONDS, device).values()
