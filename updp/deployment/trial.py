"""A saved network deployed on this machine: its plan, how much faster it is, what it computes and takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from updp.artefact import inspect, load
from updp.certificate import relative
from updp.deployment.network import Deployed, deploy
from updp.deployment.plan import Plan
from updp.deployment.programs import Lines
from updp.files import check_writable
from updp.measure import Speedup, Timing, compare, speedup
from updp.train.cost import LiveBytes

PLAN = ".plan.json"
_SECONDS = 4.0


@dataclass(frozen=True)
class Memory:
    """Bytes: of weights, packed or not, and of the maps that are alive at the same time.

    What kernels take besides, for a part of a map at a time, does not show: neither torch's nor ours.
    """

    weights: int
    maps: int

    @classmethod
    def of(cls, network: nn.Module, x: Tensor) -> Memory:
        tensors = [*network.parameters(), *network.buffers()]
        own = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        within = [0]  # of programs, whose maps torch does not see
        handles = [
            module.register_forward_pre_hook(lambda module, args: within.append(module.nbytes(args[0].shape)))
            for module in network.modules()
            if isinstance(module, Lines)
        ]
        try:
            with torch.no_grad(), LiveBytes([*tensors, x]) as live:
                network(x)
        finally:
            for handle in handles:
                handle.remove()
        return cls(sum(own.values()), live.peak + max(within))


@dataclass(frozen=True)
class Trial:
    """What deploying came to.

    Attributes:
        before: the network in torch, channels last; ``after``: deployed; timed in turns.
        error: largest difference of the outputs, relative to the largest output.
    """

    plan: Plan
    path: Path
    before: Timing
    after: Timing
    faster: Speedup
    error: float
    memory_before: Memory
    memory_after: Memory

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_json(), "path": str(self.path), "error": self.error,
            "before": self.before.to_dict(), "after": self.after.to_dict(), "faster": asdict(self.faster),
            "memory_before": asdict(self.memory_before), "memory_after": asdict(self.memory_after),
        }  # fmt: skip


def try_saved(
    path: Path,
    *,
    batch: int = 1,
    plan: Path | None = None,
    out: Path | None = None,
    cache: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Trial:
    """Deploy a saved network, time it against torch, and save the plan.

    Args:
        path: a network saved by updp.
        batch: images at a time.
        plan: follow this one instead of measuring.
        out: where the plan goes; beside the network when left out.

    Raises:
        InputError: no such network, or a plan of another.
        CertificateError: the deployed network computes something else.
    """
    header = inspect(path)
    target = out or path.with_suffix(PLAN)
    check_writable(target)
    network = load(path)
    x = torch.randn(batch, *header.spec.input, generator=torch.Generator().manual_seed(0))
    deployed = deploy(network, x, plan=plan, cache=cache, progress=progress)
    deployed.plan.save(target)
    return _compared(network, deployed, x, target)


def _compared(network: nn.Module, deployed: Deployed, x: Tensor, target: Path) -> Trial:
    with torch.no_grad():
        error = relative(deployed(x), network(x))
    network = network.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    functions = {"torch": functools.partial(network, x), "deployed": functools.partial(deployed, x)}
    times = compare(functions, _SECONDS)
    before, after = times["torch"], times["deployed"]
    memory = Memory.of(network, x), Memory.of(deployed, x)
    return Trial(deployed.plan, target, before, after, speedup(before, after), error, *memory)
