"""From a PIL image to a tensor: the model's own settings, and timm's transforms made from them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from updp.errors import InputError
from updp.spec import DataSettings, TrainSettings

Transform = Callable[[Image.Image], Tensor]
MODES = {1: "L", 3: "RGB"}  # PIL's name of an image with that many channels


@dataclass(frozen=True)
class DataConfig:
    """How a network wants its images.

    Attributes:
        mean: of each channel, for pixels between 0 and 1.
        std: of each channel.
        crop_pct: the part of the resized image that the centre crop keeps, when judging.
        interpolation: how images are resized.
        crop_mode: timm's ``center``, ``squash`` or ``border``.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"


def data_config(model: nn.Module, settings: DataSettings | None = None) -> DataConfig:
    """What timm says about a model's images, changed by a spec's ``data`` section.

    Args:
        model: a model made by ``timm.create_model``; any other needs settings that say everything.
        settings: what to change; None leaves all as it is.
    """
    changes = {key: value for key, value in vars(settings or DataSettings()).items() if value is not None}
    if not hasattr(model, "pretrained_cfg"):
        if len(changes) < len(fields(DataSettings)):
            raise TypeError(f"{type(model).__name__} was not made by timm: its data settings are unknown")
        return DataConfig(**changes)
    resolved: dict[str, Any] = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    config = DataConfig(
        mean=tuple(resolved["mean"]),
        std=tuple(resolved["std"]),
        crop_pct=float(resolved["crop_pct"]),
        interpolation=str(resolved["interpolation"]),
        crop_mode=str(resolved["crop_mode"]),
    )
    return replace(config, **changes)


def fit_channels(config: DataConfig, channels: int) -> DataConfig:
    """The settings for a network of so many input channels.

    Raises:
        InputError: images cannot have so many channels, or the mean and std are for another number.
    """
    if channels not in MODES:
        raise InputError(f"got input with {channels} channels, allowed: 1 (grey) or 3 (colour)")

    def fit(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) == 1:
            return values * channels
        if channels == 1:
            return (sum(values) / len(values),)
        if len(values) != channels:
            raise InputError(f"data.{name} has {len(values)} values, but the input has {channels} channels")
        return values

    return replace(config, mean=fit("mean", config.mean), std=fit("std", config.std))


def eval_transform(size: tuple[int, int, int], config: DataConfig) -> Transform:
    """Resize, centre crop, normalise."""
    made: Transform = create_transform(size, is_training=False, **vars(config))
    return made


def train_transform(size: tuple[int, int, int], config: DataConfig, settings: TrainSettings) -> Transform:
    """What ``settings`` names and nothing else; without ``scale`` the largest centred square is resized."""
    options: dict[str, Any] = {
        "scale": settings.scale or (1.0, 1.0),
        "ratio": None if settings.scale else (1.0, 1.0),
        "hflip": settings.hflip,
        "color_jitter": None,
        "auto_augment": settings.auto_augment,
        "re_prob": settings.reprob,
        "re_mode": "pixel",
        "interpolation": config.interpolation,
        "mean": config.mean,
        "std": config.std,
    }
    made: Transform = create_transform(size, is_training=True, **options)
    return made


def draws(settings: TrainSettings) -> bool:
    """Whether the transform made from these settings depends on chance."""
    return bool(settings.scale or settings.hflip or settings.auto_augment or settings.reprob)


def mixed(*numbers: int) -> int:
    """One 63-bit number out of several, the same on every machine."""
    text = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run augmentation on a random state of its own; the generators are put back afterwards.

    So an image's augmentation depends on nothing but the seed: not on the order of images nor on the number
    of worker processes. Transforms draw from three generators.
    """
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
