"""From `TrainSettings` to timm's optimizer, scheduler, mixup, loss and weight average; the accelerator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from updp.errors import InputError, suggest
from updp.spec import TrainSettings

PRECISIONS = ("no", "bf16")
"""What ``create_accelerator`` takes: float32 throughout, or matrix products and convolutions in bfloat16."""

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def create_accelerator(precision: str = "no", *, cpu: bool = False) -> Accelerator:
    """Devices, processes and precision for `fit`.

    Under several processes every step may leave other parameters without gradient, so that is declared here. Buffers
    are not sent around: they are the same in all, as the statistics are (`updp.train.statistics`).

    Raises:
        InputError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision: {suggest(precision, PRECISIONS)}")
    processes = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[processes])


def make_optimizer(network: nn.Module, settings: TrainSettings) -> Optimizer:
    """Make timm's optimizer; norms, biases and what the model itself exempts are not decayed.

    Raises:
        InputError: timm has no such optimizer, or it refuses the settings.
    """
    name = settings.optimizer.lower()
    known = [str(optimizer) for optimizer in list_optimizers()]
    if name.removeprefix("lookahead_") not in known:
        raise InputError(f"optimizer: {suggest(settings.optimizer, known)}")
    groups = param_groups_weight_decay(network, settings.weight_decay, no_weight_decay_list=_undecayed(network))
    try:
        optimizer: Optimizer = create_optimizer_v2(
            groups, opt=name, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum
        )
    except (ValueError, ImportError, AssertionError) as error:
        raise InputError(f"optimizer {settings.optimizer}: {str(error) or type(error).__name__}") from error
    return optimizer


def _undecayed(network: nn.Module) -> set[str]:
    """Parameters that a model's own ``no_weight_decay`` names, wherever in the network that model sits."""
    names = set()
    for prefix, module in network.named_modules():
        if callable(exempt := getattr(module, "no_weight_decay", None)):
            names |= {f"{prefix}.{name}" if prefix else name for name in exempt()}
    return names


def carry_state(old: Optimizer, new: Optimizer) -> None:
    """Give ``new`` what ``old`` knows of the parameters that both have (a swapped weight is another one).

    Rates are the scheduler's; whatever else groups count goes along.
    """
    old, new = _inner(old), _inner(new)
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]
    if len(new.param_groups) == len(old.param_groups):
        for group, before in zip(new.param_groups, old.param_groups, strict=True):
            group |= {key: value for key, value in before.items() if key not in ("params", "lr", "initial_lr")}


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer that has the state: timm's Lookahead keeps its own with the one that it wraps."""
    inner: Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return inner


def optimizer_state(optimizer: Optimizer, network: nn.Module) -> dict[str, Any]:
    """What an optimizer knows, by the names of parameters: ``{"state", "groups"}``."""
    optimizer = _inner(optimizer)
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"state": {names[p]: dict(known) for p, known in optimizer.state.items() if known}, "groups": groups}


def restore_optimizer(optimizer: Optimizer, network: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give a fresh optimizer of the same network what `optimizer_state` told."""
    optimizer, parameters = _inner(optimizer), dict(network.named_parameters())
    for name, known in saved["state"].items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: _like(value, parameter, key) for key, value in known.items()}
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group |= {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _like(value: Any, parameter: Tensor, key: str) -> Any:
    """A value on its parameter's device, and as large ones lie in memory; steps are counted on the CPU."""
    if not isinstance(value, Tensor) or key == "step":
        return value
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)


def make_scheduler(optimizer: Optimizer, settings: TrainSettings, steps_per_epoch: int) -> Scheduler | None:
    """Make timm's scheduler, to be stepped after every optimizer step; None for ``none`` or no epochs.

    Warm-up starts from ``min_lr``.

    Raises:
        InputError: timm has no such scheduler, or it cannot be stepped so.
    """
    name = settings.scheduler
    if name == "none" or not settings.epochs:
        return None
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=settings.epochs,
            min_lr=settings.min_lr,
            warmup_lr=min(settings.min_lr, settings.lr),
            warmup_epochs=settings.warmup_epochs,  # type: ignore[arg-type]  # a fraction works too
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise InputError(f"scheduler {name}: {str(error) or type(error).__name__}") from error
    if not isinstance(scheduler, Scheduler):  # some versions of timm return None for a name they do not know
        raise InputError(f"scheduler: got {name!r}, which timm does not have")
    return scheduler


def make_mixer(network: nn.Module, settings: TrainSettings) -> Mixer | None:
    """Make timm's mixup and cutmix of a batch, or None where the settings have neither."""
    if not (settings.mixup or settings.cutmix):
        return None
    mixup = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.smoothing,
        num_classes=_num_classes(network),
    )

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) == 1:
            images, targets = images.repeat(2, 1, 1, 1), targets.repeat(2)
        even = len(images) - len(images) % 2  # timm mixes pairs
        mixed: tuple[Tensor, Tensor] = mixup(images[:even], targets[:even])
        return mixed

    return mix


def _num_classes(network: nn.Module) -> int:
    for module in network.modules():
        if isinstance(number := getattr(module, "num_classes", None), int):
            return number
    raise InputError("mixup and cutmix need a network that says its num_classes")


def make_loss(settings: TrainSettings) -> nn.Module:
    """Cross-entropy, against mixed targets or smoothed labels where the settings ask for it."""
    if settings.mixup or settings.cutmix:
        return SoftTargetCrossEntropy()  # timm's Mixup has smoothed the targets
    return LabelSmoothingCrossEntropy(settings.smoothing) if settings.smoothing else nn.CrossEntropyLoss()


def make_average(network: nn.Module, settings: TrainSettings) -> Any | None:
    """Make timm's exponential moving average of weights and buffers, or None.

    Its decay grows to ``settings.ema`` over the first steps: a constant one would tie a short run to its
    start.
    """
    if settings.ema is None:
        return None
    return ModelEmaV3(network, decay=settings.ema, use_warmup=True)
