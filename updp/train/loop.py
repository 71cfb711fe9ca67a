"""The one training loop. What differs between stages is in `updp.train.policies`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from updp.errors import InputError, TrainingError
from updp.spec import TrainSettings
from updp.train.policies import Policy
from updp.train.session import Session

_CHECK_EVERY = 25  # steps; reading losses from an accelerator more often would make it wait

Evaluate = Callable[[nn.Module], Mapping[str, float]]


class Progress(Protocol):
    """What watches a training. Called in the main process only."""

    def on_start(self, total_steps: int, title: str) -> None:
        """Training begins."""

    def on_step(self, state: dict[str, Any]) -> None:
        """A step is done: ``epoch`` and ``step`` (from 1, of all), ``lr``, ``loss`` (the last known)."""

    def on_epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done; the record is an entry of the history."""

    def on_end(self) -> None:
        """Training ended, well or not."""


class _Silent:
    def on_start(self, total_steps: int, title: str) -> None: ...
    def on_step(self, state: dict[str, Any]) -> None: ...
    def on_epoch(self, record: dict[str, Any]) -> None: ...
    def on_end(self) -> None: ...


@dataclass(frozen=True)
class FitResult:
    """What a training leaves beside the network.

    Attributes:
        history: per epoch ``epoch`` (from 1), the policy's losses, ``lr``, what the policy records, the
            scores of ``evaluate`` where it was called, ``seconds``. The last ones are the returned network's.
        seconds: of the whole.
    """

    history: list[dict[str, Any]]
    seconds: float


def fit(
    network: nn.Module,
    loader: Any,
    settings: TrainSettings,
    policy: Policy,
    *,
    accelerator: Accelerator,
    seed: int,
    evaluate: Evaluate | None = None,
    eval_every: int = 1,
    progress: Progress | None = None,
) -> FitResult:
    """Train a network in place.

    Python's, NumPy's and torch's global random states are set at every epoch, from ``seed`` and the epoch: the same
    seed, machine and number of threads give the same bits.

    Args:
        network: a timm model or a supernet; it ends in eval mode, with the averaged weights if there is ``ema``.
        loader: batches ``(images (N, C, H, W), targets (N,))``; a DataLoader is split between processes.
        evaluate: called with the (averaged) network after the last epoch, and every ``eval_every`` if that is not 0.

    Raises:
        TrainingError: a loss is not finite.
        InputError: no batches, or settings that timm refuses.
    """
    loader = accelerator.prepare(loader)
    if not len(loader):
        raise InputError("no batch to train on: there are fewer images than one batch takes")
    session = Session(network, settings, accelerator=accelerator, seed=seed, steps_per_epoch=len(loader))
    watch = progress if progress is not None and accelerator.is_main_process else _Silent()
    start = time.perf_counter()
    watch.on_start(settings.epochs * len(loader), policy.title)
    try:
        history = _train(session, policy, loader, watch, evaluate, eval_every)
    finally:
        watch.on_end()
        session.release()
    network.eval()
    return FitResult(history, time.perf_counter() - start)


def _train(
    session: Session, policy: Policy, loader: Any, watch: Progress, evaluate: Evaluate | None, eval_every: int
) -> list[dict[str, Any]]:
    """All epochs; the network ends with the weights that the last evaluation saw."""
    policy.before_training(session)
    if not session.settings.epochs:
        policy.after_training(session)
        return []
    session.start_average()
    session.connect()
    history = []
    for epoch in range(session.settings.epochs):
        due = _due(evaluate, epoch, eval_every, session.settings)
        history.append(_run_epoch(session, policy, loader, epoch, watch, due))
        watch.on_epoch(history[-1])
    session.finish()
    return history


def _due(evaluate: Evaluate | None, epoch: int, every: int, settings: TrainSettings) -> Evaluate | None:
    """What evaluates after this epoch, if anything."""
    last = epoch + 1 == settings.epochs
    return evaluate if last or (every and (epoch + 1) % every == 0) else None


def _run_epoch(
    session: Session, policy: Policy, loader: Any, epoch: int, watch: Progress, evaluate: Evaluate | None
) -> dict[str, Any]:
    """One epoch and its record."""
    start = time.perf_counter()
    session.start_epoch(epoch)
    policy.before_epoch(session, epoch)
    ledger = _Ledger(policy.passes, epoch, session)
    for images, targets in _batches(loader, epoch):
        policy.before_step(session, session.position)
        rate = session.learning_rate
        ledger.add(policy.step(session, *session.receive(images, targets)))
        session.update()
        watch.on_step({"epoch": epoch + 1, "step": session.updates, "lr": rate, "loss": ledger.latest})
    losses = ledger.close()
    if epoch + 1 == session.settings.epochs:
        policy.after_training(session)
    record = {"epoch": epoch + 1, **losses, "lr": rate, **policy.record()}
    if evaluate is not None:
        record |= evaluate(session.result)
    return {**record, "seconds": time.perf_counter() - start}


def _batches(loader: Any, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    if callable(set_epoch := getattr(loader, "set_epoch", None)):
        set_epoch(epoch)
    yield from loader


class _Ledger:
    """The losses of an epoch, on the device; looked at after every step on a CPU, now and then elsewhere."""

    def __init__(self, passes: Sequence[str], epoch: int, session: Session) -> None:
        device = session.accelerator.device
        self.passes, self.epoch, self.session = passes, epoch, session
        self.every = 1 if device.type == "cpu" else _CHECK_EVERY
        self.losses = torch.zeros(session.steps_per_epoch, len(passes), device=device)
        self.added = self.checked = 0
        self.latest: float | None = None

    def add(self, losses: list[Tensor]) -> None:
        torch.stack(losses, out=self.losses[self.added])
        self.added += 1
        if self.added - self.checked >= self.every:
            self.check()

    def check(self) -> None:
        """Raise if a loss since the last check is not finite."""
        fresh = self.losses[self.checked : self.added].cpu()
        finite = fresh.isfinite()
        if not finite.all():
            row, column = (~finite).nonzero()[0].tolist()
            raise TrainingError(
                f"{self.passes[column]} is {float(fresh[row, column])} at epoch {self.epoch + 1}, step "
                f"{self.checked + row + 1} of {len(self.losses)} (pass {column + 1} of {len(self.passes)}): "
                "try a smaller lr, a longer warm-up or clip_grad"
            )
        self.checked = self.added
        self.latest = float(fresh[-1].mean())

    def close(self) -> dict[str, float]:
        """Means over the epoch and over processes, by name."""
        if self.checked < self.added:
            self.check()
        means = self.session.accelerator.reduce(self.losses[: self.added].mean(0), "mean").tolist()
        found: dict[str, list[float]] = {}
        for name, mean in zip(self.passes, means, strict=True):
            found.setdefault(name, []).append(mean)
        return {name: sum(values) / len(values) for name, values in found.items()}
