"""What a training step costs: time and memory of the supernet, of both sides of the blend, and of plain training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from updp.measure import Timing, compare
from updp.spec import TrainSettings
from updp.subnet import SubnetConfig
from updp.supernet import Supernet
from updp.train.policies import Plain, Policy, Sandwich
from updp.train.session import Session

BASELINE, SANDWICH, BLENDED, PRUNED, MERGED = "baseline", "supernet", "blend below 1", "blend 1", "merged"
"""The kinds of steps: plain training of the baseline, a sandwich step, finetuning before and after the baseline's
branches are gone, and plain training of the merged network."""


class LiveBytes(TorchDispatchMode):
    """Sums up the memory of the tensors that are alive after every operation of torch, while it is entered.

    What kernels take while they run does not show. Tensors that are ``known`` do not count.

    Attributes:
        peak: the most there was, in bytes.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


class Step:
    """One training step on one batch, to be taken again and again; weights change, shapes do not."""

    def __init__(
        self, network: nn.Module, policy: Policy, settings: TrainSettings, batch: tuple[Tensor, Tensor],
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.session = Session(network, settings, accelerator=accelerator, seed=0, steps_per_epoch=1)
        self.policy = policy
        self.batch = batch
        self.session.connect()
        self.session.start_epoch()

    def __call__(self) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self.session.start_step()
            self.policy.step(self.session, *self.session.receive(*self.batch))
            self.session.update()

    def memory(self) -> int:
        """Bytes of the tensors that are alive at most: weights, the optimizer's state, gradients, activations."""
        self()  # an optimizer makes its state in the first step
        session = self.session
        state = (v for known in session.optimizer.state.values() for v in known.values() if isinstance(v, Tensor))
        known = [*session.network.parameters(), *session.network.buffers(), *state]
        with LiveBytes([*known, *self.batch]) as live:
            self()
        storages = (tensor.untyped_storage() for tensor in known)
        held: dict[int, int] = {storage._cdata: storage.nbytes() for storage in storages}
        return int(live.peak) + sum(held.values())


def training_steps(
    supernet: Supernet, subnet: SubnetConfig, merged: nn.Module | None, settings: TrainSettings,
    batch: tuple[Tensor, Tensor], accelerator: Accelerator, *, recipe: str | None = None,
) -> dict[str, Step]:  # fmt: skip
    """A step of each kind, on copies of the networks.

    Args:
        supernet: whole, at the baseline's weights.
        merged: the merged network, or None to do without.
        settings: of finetuning.
        batch: images ``(N, C, H, W)`` and labels ``(N,)``.
        recipe: of the supernet's pruned blocks; None is each block's default.
    """

    def blended(blend: float) -> Supernet:
        network = copy.deepcopy(supernet)
        network.reduce(subnet)
        if blend == 1.0:
            network.free_baseline()
        else:
            network.set_blend(blend)
        return network

    kept = copy.deepcopy(supernet)
    kept.reduce(kept.all_keep())
    makers: dict[str, Callable[[], tuple[nn.Module, Policy]]] = {
        BASELINE: lambda: (kept, Plain()),
        SANDWICH: lambda: (copy.deepcopy(supernet), Sandwich(recipe=recipe)),
        BLENDED: lambda: (blended(0.5), Plain()),
        PRUNED: lambda: (blended(1.0), Plain()),
    }
    if merged is not None:
        makers[MERGED] = lambda: (copy.deepcopy(merged), Plain())
    return {kind: Step(*make(), settings, batch, accelerator) for kind, make in makers.items()}


def training_costs(steps: dict[str, Step], seconds: float, device: torch.device) -> list[dict[str, Any]]:
    """Measure steps in turns, for about so many seconds.

    Returns:
        For each ``name``, ``median_ms``, ``low_ms`` and ``high_ms`` (quartiles), and ``memory`` in bytes.
    """
    memory = {kind: step.memory() for kind, step in steps.items()}
    times: dict[str, Timing] = compare(steps, seconds, device, least=3)
    return [{**times[kind].to_dict(), "memory": memory[kind]} for kind in steps]
