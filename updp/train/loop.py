"""The one training loop. What differs between stages is in `updp.train.policies`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from torch import Tensor, nn

from updp import processes
from updp.errors import InputError, TrainingError
from updp.spec import TrainSettings
from updp.train.checkpoint import Checkpoints, fingerprint
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
        earlier: of these, those before it was stopped and went on.
    """

    history: list[dict[str, Any]]
    seconds: float
    earlier: float = 0.0


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
    checkpoints: Checkpoints | None = None,
) -> FitResult:
    """Train a network in place.

    Python's, NumPy's and torch's global random states are set at every step, from ``seed`` and the step: the same
    seed, machine and number of threads and processes give the same bits, stopped in between or not.

    Args:
        network: a timm model or a supernet; it ends in eval mode, with the averaged weights if there is ``ema``.
        loader: batches ``(images (N, C, H, W), targets (N,))``; what is not shared out between processes already
            (`updp.data.loader`) is split so that they take batches in turn.
        evaluate: called with the (averaged) network after the last epoch, and every ``eval_every`` if that is not 0.
        checkpoints: where the training's state is kept, to go on from; they stay when it is done.

    Raises:
        TrainingError: a loss is not finite.
        InputError: no batches, settings that timm refuses, or checkpoints of another training.
    """
    loader, weight = _own_part(loader, accelerator)
    session = Session(network, settings, accelerator=accelerator, seed=seed, steps_per_epoch=len(loader))
    session.weight = weight
    watch = progress if progress is not None and accelerator.is_main_process else _Silent()
    training = _Training(session, policy, loader, watch, evaluate, eval_every, _Keeper(checkpoints, session, policy))
    watch.on_start(settings.epochs * len(loader), policy.title)
    try:
        training.run()
    finally:
        watch.on_end()
        session.release()
    network.eval()
    return FitResult(training.history, training.keeper.seconds, training.keeper.earlier)


def _own_part(loader: Any, accelerator: Accelerator) -> tuple[Any, float]:
    """This process's part of every batch, and what its losses weigh."""
    weight = getattr(loader, "weight", None)
    if weight is None or accelerator.num_processes == 1:
        loader = accelerator.prepare(loader)
    if not len(loader):
        raise InputError("no batch to train on: there are fewer images than one batch takes")
    return loader, weight or 1.0


class _Keeper:
    """When a training's state is kept, and what is in it beside the session's."""

    def __init__(self, checkpoints: Checkpoints | None, session: Session, policy: Policy) -> None:
        self.checkpoints, self.session = checkpoints, session
        self.start, self.earlier = time.perf_counter(), 0.0
        # Asking all processes takes time: only now and then.
        self.every = 1 if session.accelerator.num_processes == 1 else _CHECK_EVERY
        if checkpoints is not None:
            # Not how many processes there are: they share the same batches, and another number may go on.
            parts = (policy.title, policy.key(), session.settings, session.seed, session.steps_per_epoch,
                     session.accelerator.mixed_precision)  # fmt: skip
            self.key = fingerprint(session.network.state_dict(), *parts)

    @property
    def seconds(self) -> float:
        """Spent on this training, before it was stopped and since."""
        return self.earlier + time.perf_counter() - self.start

    def latest(self) -> dict[str, Any] | None:
        """The state to go on from, or None."""
        if self.checkpoints is None:
            return None
        saved = self.checkpoints.latest(self.key)
        found = processes.gathered(None if saved is None else int(saved["updates"]))
        if len(set(found)) > 1:
            raise InputError(f"{self.checkpoints.folder}: processes see different states there: {found}; go on later")
        if saved is not None:
            self.earlier = saved["seconds"]
        return saved

    def keep(self, history: Sequence[Mapping[str, Any]], ledger: _Ledger | None = None) -> None:
        """Keep the state if it is time: behind a step of an epoch, or, without ledger, behind the epoch."""
        session = self.session
        if self.checkpoints is None or (ledger is not None and session.updates % self.every):
            return
        if not session.agree(self.checkpoints.due(session.updates)):
            return
        losses = None
        if ledger is not None:
            ledger.check()
            losses = session.accelerator.gather(ledger.losses[None, : ledger.added])
        if session.accelerator.is_main_process:
            state = {**session.state(), "history": history, "losses": losses, "seconds": self.seconds}
            self.checkpoints.save(self.key, state)
        self.checkpoints.waited(session.updates)


@dataclass
class _Training:
    """All that one call of `fit` works with."""

    session: Session
    policy: Policy
    loader: Any
    watch: Progress
    evaluate: Evaluate | None
    eval_every: int
    keeper: _Keeper
    history: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        """All epochs, or those that are left; the network ends with the weights that the last evaluation saw."""
        session, policy, epochs = self.session, self.policy, self.session.settings.epochs
        saved = self.keeper.latest() if epochs else None
        if saved is None:
            policy.before_training(session)
        else:
            policy.resume(session, (saved["updates"] - 1) / session.steps_per_epoch)
        if not epochs:
            policy.after_training(session)
            return
        session.start_average()
        session.connect()
        losses = None
        if saved is not None:
            session.restore(saved)
            self.history, losses = list(saved["history"]), saved["losses"]
        for epoch in range(len(self.history), epochs):
            self.history.append(self._epoch(epoch, losses))
            losses = None
            self.watch.on_epoch(self.history[-1])
            if epoch + 1 < epochs:
                self.keeper.keep(self.history)
        session.finish()

    def _epoch(self, epoch: int, losses: Tensor | None) -> dict[str, Any]:
        """One epoch, or what is left of it behind steps whose losses are given; its record."""
        session, policy, start = self.session, self.policy, time.perf_counter()
        session.start_epoch()
        policy.before_epoch(session, epoch)
        ledger = _Ledger(policy.passes, epoch, session, losses)
        for images, targets in _batches(self.loader, epoch, ledger.added):
            session.start_step()
            policy.before_step(session, session.position)
            rate = session.learning_rate
            ledger.add(policy.step(session, *session.receive(images, targets)))
            session.update()
            self.watch.on_step({"epoch": epoch + 1, "step": session.updates, "lr": rate, "loss": ledger.latest})
            if ledger.added < session.steps_per_epoch:
                self.keeper.keep(self.history, ledger)
        means = ledger.close()
        if epoch + 1 == session.settings.epochs:
            policy.after_training(session)
        record = {"epoch": epoch + 1, **means, "lr": rate, **policy.record()}
        if self.evaluate is not None and self._due(epoch):
            record |= self.evaluate(session.result)
        return {**record, "seconds": time.perf_counter() - start}

    def _due(self, epoch: int) -> bool:
        """Whether the network is evaluated after this epoch."""
        last = epoch + 1 == self.session.settings.epochs
        return last or bool(self.eval_every and (epoch + 1) % self.eval_every == 0)


def _batches(loader: Any, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's batches behind those that are done; these are not read again, unless they come in a stream."""
    if callable(set_epoch := getattr(loader, "set_epoch", None)):
        set_epoch(epoch)
    yield from skip_first_batches(loader, done) if done else loader


class _Ledger:
    """The losses of an epoch, on the device; looked at after every step on a CPU, now and then elsewhere."""

    def __init__(self, passes: Sequence[str], epoch: int, session: Session, before: Tensor | None = None) -> None:
        """Open it; ``before`` are the losses of steps that are done, ``(processes, steps, passes)``."""
        device = session.accelerator.device
        self.passes, self.epoch, self.session = passes, epoch, session
        self.every = 1 if device.type == "cpu" else _CHECK_EVERY
        self.losses = torch.zeros(session.steps_per_epoch, len(passes), device=device)
        self.added = self.checked = 0
        self.latest: float | None = None
        if before is not None:
            self.added = self.checked = before.shape[1]
            own = session.accelerator.process_index
            same = len(before) == session.accelerator.num_processes  # otherwise others trained: their means are told
            self.losses[: self.added] = (before[own] if same else before.mean(0)).to(device)

    def add(self, losses: list[Tensor]) -> None:
        torch.stack(losses, out=self.losses[self.added])
        self.added += 1
        if self.added - self.checked >= self.every:
            self.check()

    def check(self) -> None:
        """Raise if a loss since the last check is not finite."""
        if self.checked == self.added:
            return
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
        self.check()
        means = self.session.accelerator.reduce(self.losses[: self.added].mean(0), "mean").tolist()
        found: dict[str, list[float]] = {}
        for name, mean in zip(self.passes, means, strict=True):
            found.setdefault(name, []).append(mean)
        return {name: sum(values) / len(values) for name, values in found.items()}
