"""One training under way: the network, its weight average, and all that must follow when it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import random_seed
from torch import Tensor, nn

from updp.spec import TrainSettings
from updp.train.factory import (
    carry_state,
    make_average,
    make_loss,
    make_mixer,
    make_optimizer,
    make_scheduler,
    optimizer_state,
    restore_optimizer,
)
from updp.train.statistics import statistics_of_all

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""The loss of answers and targets."""


def derive_seed(seed: int, *parts: object) -> int:
    """A seed of 31 bits for one part of a run, the same on every machine."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class _Forward(nn.Module):
    """What the accelerator wraps. The network inside stays plain, so that it can change and be calibrated."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


class Session:
    """The state that policies work on.

    Attributes:
        network: the module that is trained, in float32 and unwrapped.
        settings: how.
        seed: what every random choice is derived from.
        steps_per_epoch: optimizer steps in an epoch.
        updates: optimizer steps made.
        accelerator: device, processes, precision.
        optimizer, scheduler: timm's; None before `connect`, the scheduler also where the settings have none.
        average: timm's moving average of the weights, or None.
        weight: of this process's losses: its images to those of the mean process, if batches are not shared equally.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: TrainSettings,
        *,
        accelerator: Accelerator,
        seed: int,
        steps_per_epoch: int,
    ) -> None:
        self.network = network.to(accelerator.device)
        self.settings = settings
        self.accelerator = accelerator
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch
        self.weight = 1.0
        self.updates = 0
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.average: Any = None
        self.criterion = make_loss(settings)
        self.mixer = make_mixer(network, settings)
        self._forward: nn.Module | None = None

    @property
    def position(self) -> float:
        """Epochs trained so far, with their fraction."""
        return self.updates / self.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def result(self) -> nn.Module:
        """The network whose weights this training is for: the average where there is one."""
        return self.network if self.average is None else self.average.module

    def networks(self) -> list[nn.Module]:
        """The network and its average; a policy that changes one changes both, so that they stay alike."""
        return [self.network] if self.average is None else [self.network, self.average.module]

    def start_average(self) -> None:
        """Begin to average the weights, where the settings ask for it."""
        self.average = make_average(self.network, self.settings)

    def connect(self) -> None:
        """Wrap the network as it is now, and tell the optimizer.

        To be called again after parameters came or went: what the optimizer knows of those that stay is kept,
        the scheduler goes on from the same step, and nothing holds those that are gone.
        """
        old = self.optimizer
        if old is not None:
            self.release()
        optimizer = make_optimizer(self.network, self.settings)
        if old is not None:
            carry_state(old.optimizer, optimizer)
        self._forward, self.optimizer = self.accelerator.prepare(_Forward(self.network), optimizer)
        self.scheduler = make_scheduler(optimizer, self.settings, self.steps_per_epoch)
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, besides what follows from settings and seed; tensors are not copied."""
        average = None if self.average is None else self.average.module.state_dict()
        optimizer = optimizer_state(self.optimizer.optimizer, self.network)
        return {
            "updates": self.updates, "network": self.network.state_dict(), "average": average, "optimizer": optimizer,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state; the session is connected, and its network has the structure that it had then."""
        self.updates = int(state["updates"])
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        restore_optimizer(self.optimizer.optimizer, self.network, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)

    def start_epoch(self) -> None:
        """Training mode."""
        assert self._forward is not None
        self._forward.train()

    def start_step(self) -> None:
        """Random numbers that depend on seed, step and process alone: none of their generators' states need be kept."""
        random_seed(derive_seed(self.seed, self.updates, self.accelerator.process_index))

    def agree(self, mine: bool) -> bool:
        """What the main process says, in all processes."""
        if self.accelerator.num_processes == 1:
            return mine
        said = torch.tensor([int(mine)], device=self.accelerator.device)
        return bool(broadcast(said).item())

    def receive(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the device, mixed if the settings say so."""
        device = self.accelerator.device
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        return (images, targets) if self.mixer is None else self.mixer(images, targets)

    def run_pass(
        self, images: Tensor, targets: Tensor, *, last: bool = True, criterion: Criterion | None = None
    ) -> Tensor:
        """Forward and backward; gradients add up, and processes share them in the last pass. The loss."""
        assert self._forward is not None
        criterion = criterion or self.criterion
        with nullcontext() if last else self.accelerator.no_sync(self._forward):
            with statistics_of_all():
                answers = self._forward(images)
            loss = criterion(answers, targets)
            self.accelerator.backward(loss if self.weight == 1 else loss * self.weight)
        return loss.detach()

    def update(self) -> None:
        """One optimizer step with the gradients at hand, and all that follows it."""
        if self.settings.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)
        if self.average is not None:
            self.average.update(self.network, step=self.updates)

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Estimate the norms of the current subnet, in every network with its own weights, in float32.

        Every process sees all batches, so that the statistics agree.
        """
        for network in self.networks():
            training = network.training
            network.calibrate(batch.to(self.accelerator.device) for batch in batches)  # type: ignore[operator]
            network.train(training)

    def finish(self) -> None:
        """Put the averaged weights into the network."""
        if self.average is not None:
            self.network.load_state_dict(self.average.module.state_dict())

    def release(self) -> None:
        """Let go of optimizer and wrapper; the accelerator can be used for the next stage."""
        self._forward = self.optimizer = self.scheduler = None
        self.accelerator.free_memory()
