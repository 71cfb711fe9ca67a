"""The stages as policies: what one step is, and what happens around steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from updp.spec import BlendSettings
from updp.subnet import SubnetConfig
from updp.supernet import Supernet
from updp.train.features import Features
from updp.train.session import Criterion, Session, derive_seed
from updp.train.teacher import Teacher


class Policy:
    """Hooks of the loop. As they stand here: one ordinary pass per step.

    Attributes:
        title: the stage's name.
        passes: what the losses that `step` returns are called; equal names are averaged.
    """

    title: ClassVar[str] = "train"
    passes: ClassVar[tuple[str, ...]] = ("train_loss",)

    def before_training(self, session: Session) -> None:
        """Called once, before the optimizer exists."""

    def resume(self, session: Session, position: float) -> None:
        """Called in the place of `before_training` where a training goes on that was stopped.

        The network is brought into the structure that it had behind the step at ``position``; its tensors follow.
        """
        self.before_training(session)

    def before_epoch(self, session: Session, epoch: int) -> None:
        """Called before each epoch, or what is left of one; epochs count from 0."""

    def before_step(self, session: Session, position: float) -> None:
        """Called before each step, with the epochs trained so far (fractional)."""

    def step(self, session: Session, images: Tensor, targets: Tensor) -> list[Tensor]:
        """Do the passes of one optimizer step, gradients included; returns their losses."""
        return [session.run_pass(images, targets)]

    def after_training(self, session: Session) -> None:
        """Called once, after the last step and before the last evaluation."""

    def record(self) -> dict[str, float]:
        """What an epoch's record says beside losses, scores and learning rate."""
        return {}

    def key(self) -> str:
        """Names what the training depends on beside the network, the images and the settings."""
        return ""


class Plain(Policy):
    """Ordinary training of a model."""

    title: ClassVar[str] = "baseline"


class Sandwich(Policy):
    """The sandwich rule on a supernet: all kept, two random subnets, all pruned; then one optimizer step.

    Each pass is followed by its own backward pass; the gradients add up.
    """

    title: ClassVar[str] = "supernet"
    passes: ClassVar[tuple[str, ...]] = ("loss_keep", "loss_random", "loss_random", "loss_pruned")

    def __init__(self, *, recipe: str | None = None) -> None:
        """Prepare; ``recipe`` prunes under this recipe instead of each block's default."""
        self.recipe = recipe
        self._generator = torch.Generator()

    def before_training(self, session: Session) -> None:
        cast(Supernet, session.network).set_blend(1.0)

    def key(self) -> str:
        return str(self.recipe)

    def step(self, session: Session, images: Tensor, targets: Tensor) -> list[Tensor]:
        network = cast(Supernet, session.network)
        self._generator.manual_seed(derive_seed(session.seed, "sandwich", session.updates))  # the same in every process
        subnets = (
            network.all_keep(),
            network.sample(self._generator, None, self.recipe),
            network.sample(self._generator, None, self.recipe),
            network.all_pruned(self.recipe),
        )
        losses = []
        for number, subnet in enumerate(subnets, start=1):
            network.set_subnet(subnet)
            losses.append(session.run_pass(images, targets, last=number == len(subnets)))
        return losses

    def after_training(self, session: Session) -> None:
        for network in cast(list[Supernet], session.networks()):
            network.set_subnet(network.all_keep())


class Progressive(Policy):
    """From baseline blocks to pruned blocks, while training: ``o = (1 - blend) Bb(x) + blend Bp(x)`` (eq. 2).

    The blend follows `blend_at`. New norms are calibrated before training. When the blend reaches 1 the
    baseline branches go; a kernel change comes at its moment, and norms are calibrated again. The network's
    average goes through the same changes: a crop of averaged weights is the average of cropped weights.
    """

    title: ClassVar[str] = "finetune"

    def __init__(
        self,
        subnet: SubnetConfig,
        settings: BlendSettings,
        calibration: Iterable[Tensor],
        teacher: Teacher | None = None,
    ) -> None:
        """Prepare.

        Args:
            subnet: what is pruned; the supernet holds the baseline's weights.
            settings: the blend's course.
            calibration: batches of images, eval-transformed; iterated at every calibration.
            teacher: gives a second target, or None.
        """
        self.subnet = subnet
        self.settings = settings
        self.calibration = calibration
        self.teacher = teacher
        self.blend = 0.0
        self._freed = False

    def before_training(self, session: Session) -> None:
        cast(Supernet, session.network).reduce(self.subnet)
        self._set_blend(session, 0.0)
        self._swap(session, 0.0)
        self._calibrate(session)

    def resume(self, session: Session, position: float) -> None:
        cast(Supernet, session.network).reduce(self.subnet)
        for moment in (0.0, position):
            self._set_blend(session, moment)
            self._swap(session, moment)

    def key(self) -> str:
        return f"{self.subnet} {self.settings} {self.teacher and self.teacher.settings}"

    def step(self, session: Session, images: Tensor, targets: Tensor) -> list[Tensor]:
        criterion = None if self.teacher is None else self.teacher.criterion(session, images)
        return [session.run_pass(images, targets, criterion=criterion)]

    def before_step(self, session: Session, position: float) -> None:
        changed = self._set_blend(session, position)
        swapped = self._swap(session, position)
        if changed or swapped:
            session.connect()
        if swapped:
            self._calibrate(session)

    def after_training(self, session: Session) -> None:
        """Whatever the settings say, what is merged is the pruned network in its final shape."""
        self._set_blend(session, math.inf)
        if self._swap(session, math.inf):
            self._calibrate(session)

    def record(self) -> dict[str, float]:
        return {"blend": self.blend}

    def _set_blend(self, session: Session, position: float) -> bool:
        """Set the blend for this position; True if baseline branches went with it."""
        if self._freed:
            return False
        epochs = session.settings.epochs
        self.blend = 1.0 if position >= epochs else blend_at(position, epochs, self.settings)
        self._freed = self.blend == 1.0
        for network in cast(list[Supernet], session.networks()):
            network.set_blend(self.blend)
            if self._freed:
                network.free_baseline()
        return self._freed

    def _swap(self, session: Session, position: float) -> bool:
        """Make the kernel changes that are due; True if there were any."""
        progress = min(1.0, position / max(session.settings.epochs, 1))
        swapped = [network.resize(progress) for network in cast(list[Supernet], session.networks())]
        return any(swapped)

    def _calibrate(self, session: Session) -> None:
        session.calibrate(self.calibration)


class Distillation(Policy):
    """A pruned network learns its baseline's features, without labels.

    The loss is the mean square error of the pooled features that the classifier is given, plus that of what the blocks
    give (the mean of all blocks), each relative to the variance of the baseline's. (Few images are soon learnt by
    heart. Answers hold less than features, and what blocks give holds more: on some hundreds of images, an ImageNet
    network became worse when it learnt answers, better with features, best with features and blocks.) Norms keep
    their statistics, and nothing is dropped: what is trained is what is merged.
    """

    title: ClassVar[str] = "distillation"
    passes: ClassVar[tuple[str, ...]] = ("loss_features",)

    def __init__(self, teacher: nn.Module, blocks: Sequence[str] = ()) -> None:
        """Prepare.

        Args:
            teacher: the baseline; it stays as it is.
            blocks: names of the blocks that are compared, in both networks.
        """
        self.teacher = teacher
        self.blocks = tuple(blocks)

    def before_training(self, session: Session) -> None:
        # On a CPU, convolutions of maps with channels last are several times as fast.
        self.teacher.to(session.accelerator.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        session.network.to(memory_format=torch.channels_last)

    def before_epoch(self, session: Session, epoch: int) -> None:
        session.network.eval()

    def step(self, session: Session, images: Tensor, targets: Tensor) -> list[Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), session.accelerator.autocast(), Features(self.teacher, self.blocks) as theirs:
            self.teacher(images)
            wanted = theirs.take()
        with Features(session.network, self.blocks) as ours:
            criterion: Criterion = lambda answers, _: _feature_loss(ours.take(), wanted)  # noqa: E731
            return [session.run_pass(images, targets, criterion=criterion)]

    def after_training(self, session: Session) -> None:
        session.network.to(memory_format=torch.contiguous_format)


def _feature_loss(seen: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The error of the features, which come first, and the mean error of the maps."""
    errors = [_relative_error(ours.float(), theirs.float()) for ours, theirs in zip(seen, wanted, strict=True)]
    return errors[0] + (torch.stack(errors[1:]).mean() if errors[1:] else 0.0)


def _relative_error(seen: Tensor, wanted: Tensor) -> Tensor:
    variance = wanted.var(unbiased=False).clamp_min(torch.finfo(wanted.dtype).tiny)
    return functional.mse_loss(seen, wanted) / variance


def blend_at(position: float, epochs: int, settings: BlendSettings) -> float:
    """The blend (the paper's lambda) at a position in training.

    ``1 - cos(pi/2 * C*K/T)`` for ``C <= T/K``, then 1 (UPDP eq. 3): flat at first, steep at its end.

    Args:
        position: epochs trained so far (fractional); C is this, or its whole part with ``per: epoch``.
        epochs: T, the length of training.
        settings: K and the mode; ``direct`` is 1 from the start.
    """
    if settings.mode == "direct" or epochs <= 0:
        return 1.0
    current = math.floor(position) if settings.per == "epoch" else position
    if current * settings.K >= epochs:
        return 1.0
    return 1.0 - math.cos(math.pi / 2 * current * settings.K / epochs)
