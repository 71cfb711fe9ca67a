"""The schedule of a spec: how each stage trains and searches.

``specs/schema.json`` says what the settings mean and which values they may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STAGES = ("baseline", "supernet", "finetune")
"""The stages that train; settings under ``train`` are defaults for all three."""


@dataclass(frozen=True)
class TrainSettings:
    """How one stage trains."""

    epochs: int
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    scheduler: str = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 1e-5
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    auto_augment: str | None = None
    reprob: float = 0.0
    hflip: float = 0.0
    scale: tuple[float, float] | None = None
    ema: float | None = None
    clip_grad: float | None = None


@dataclass(frozen=True)
class BlendSettings:
    """How finetuning goes from the baseline block (blend 0) to the pruned block (blend 1)."""

    K: float = 3.0
    per: Literal["iteration", "epoch"] = "iteration"
    mode: Literal["progressive", "direct"] = "progressive"


@dataclass(frozen=True)
class TeacherSettings:
    """How much of finetuning's loss is the baseline's answers; their temperature."""

    weight: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class SearchSettings:
    """How large the genetic search is and on how many images it scores."""

    population: int = 32
    generations: int = 10
    images: int = 512
    calibration_images: int = 256
    chunk: int = 64


DISTILL = TrainSettings(
    epochs=4, batch_size=32, lr=3e-4, weight_decay=0.0, warmup_epochs=0.5, min_lr=1e-6, hflip=0.5, scale=(0.7, 1.0)
)
"""Few steps at a small rate: there are some hundreds of images, and what is learnt must hold for others."""


@dataclass(frozen=True)
class Schedule:
    """Settings of all stages; ``held_out`` is the part of the training images that the search scores on."""

    seed: int = 0
    held_out: float = 0.1
    baseline: TrainSettings = TrainSettings(epochs=300)
    supernet: TrainSettings = TrainSettings(epochs=10)
    finetune: TrainSettings = TrainSettings(epochs=300)
    distill: TrainSettings = DISTILL
    search: SearchSettings = SearchSettings()
    blend: BlendSettings = BlendSettings()
    teacher: TeacherSettings = TeacherSettings()


DEFAULT_SCHEDULE = Schedule()
"""The schedule of a spec that says nothing about it."""
