"""A data set opened for one network: its training, held-out, calibration and validation images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from updp.data.factory import open_factory
from updp.data.folders import open_folder, open_unlabelled
from updp.data.loading import ImageSet, StreamSet
from updp.data.packed import open_packed
from updp.data.sources import Images, Source, Stream, open_digits, stratified_order
from updp.data.transforms import MODES, DataConfig, draws, eval_transform, fit_channels, train_transform
from updp.errors import InputError
from updp.spec import TrainSettings


def open_data(name: str, *, input: tuple[int, int, int], config: DataConfig, labelled: bool = True) -> Data:
    """Open a data set.

    Args:
        name: ``digits``, ``folder:PATH``, ``npz:PATH`` or a name of timm's factory, ``NAME[,OPTION...][@ROOT]``.
        input: channels, height and width of the network's input.
        config: from :func:`data_config`.
        labelled: a folder without classes or labels is an error; if not, all images below it are taken.

    Raises:
        InputError: no such data set, no images in it, or files that are not what they should be.
    """
    config = fit_channels(config, input[0])
    try:
        source = _open(name, labelled)
    except OSError as error:  # folders that may not be read, and the like
        raise InputError(f"data {name!r}: {error.filename or ''}: {error.strerror or error}") from error
    return Data(source, input=input, config=replace(config, crop_pct=1.0) if source.whole else config)


def _open(name: str, labelled: bool) -> Source:
    kind, _, rest = name.partition(":")
    if name == "digits":
        return open_digits()
    if kind in ("folder", "npz") and "/" not in kind:
        if not rest:
            raise InputError(f"data {name!r}: say where it is: {kind}:PATH")
        path = Path(os.path.expanduser(rest))
        if kind == "folder":
            return open_folder(name, path) if labelled else open_unlabelled(name, path)
        return open_packed(name, path)
    return open_factory(name)


class Data:
    """One data set, opened for one network.

    Every part depends on nothing but the arguments. Under one seed and fraction, no image that is held out is
    trained on or calibrated with.
    """

    def __init__(self, source: Source, *, input: tuple[int, int, int], config: DataConfig) -> None:
        self.source = source
        self.input = input
        self.config = config
        self._mode = MODES[input[0]]

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def check_classes(self, model_classes: int) -> None:
        """Compare the number of classes with a model's.

        Named classes must be as many as the model's; labels that are plain indices must be below that.

        Raises:
            InputError: they do not fit.
        """
        source = self.source
        if source.classes is not None and len(source.classes) != model_classes:
            raise InputError(
                f"data {source.name!r} has {len(source.classes)} classes, but the model has {model_classes}; to judge "
                "on some of a model's classes, give the class indices in a labels.csv"
            )
        if source.num_classes > model_classes:
            labels = f"labels up to {source.num_classes - 1}"
            raise InputError(f"data {source.name!r} has {labels}, but the model has {model_classes} classes")

    def train(self, settings: TrainSettings, *, seed: int, held_out: float) -> ImageSet | StreamSet:
        """The training images that are not held out, augmented as ``settings`` say."""
        images = self._training()
        transform = train_transform(self.input, self.config, settings)
        if isinstance(images, Stream):
            return self._stream(images, (held_out, 1.0), seed, transform=transform, shuffle=True)
        count = _part(len(images), held_out)
        indices = sorted(_order(images, seed)[count:])
        if not indices:
            raise InputError(f"data {self.source.name!r}: held_out {held_out:g} leaves no image to train on")
        return ImageSet(images, indices, transform, self._mode, seed if draws(settings) else None)

    def held_out(self, fraction: float, seed: int) -> ImageSet | StreamSet:
        """A part of the training images to judge on, at least one. Any beginning has the classes in proportion."""
        images = self._training()
        if not 0 < fraction < 1:
            raise InputError(f"got held_out {fraction:g}, allowed: above 0 and below 1, to search on these images")
        if isinstance(images, Stream):
            return self._stream(images, (0.0, fraction), seed)
        return self._judged(images, _order(images, seed)[: _part(len(images), fraction)])

    def calibration(self, images: int, seed: int, *, held_out: float) -> ImageSet | StreamSet:
        """``images`` training images, or all there are, that are not held out; not augmented."""
        source = self._training()
        if isinstance(source, Stream):
            return self._stream(source, (held_out, 1.0), seed).first(images)
        start = _part(len(source), held_out)
        return self._judged(source, _order(source, seed)[start : start + images])

    def any_images(self, count: int, seed: int, settings: TrainSettings | None = None) -> ImageSet:
        """``count`` images, or all there are, of which labels are not asked: training images if there are any.

        They are the same ones with and without ``settings``, which say how to augment them.

        Raises:
            InputError: they can only be read as a stream.
        """
        images = self.source.train if self.source.train is not None else self.source.val
        if images is None or isinstance(images, Stream):
            raise InputError(f"data {self.source.name!r} can only be read from end to end; allowed: a folder, npz:PATH")
        indices = _order(images, seed)[:count]
        if settings is None:
            return self._judged(images, indices)
        transform = train_transform(self.input, self.config, settings)
        return ImageSet(images, indices, transform, self._mode, seed if draws(settings) else None)

    def val(self) -> ImageSet | StreamSet:
        """The images to judge on."""
        images = self.source.val
        if images is None:
            raise InputError(f"data {self.source.name!r} has no images to judge on{self._why()}")
        if isinstance(images, Stream):
            return self._stream(images, (0.0, 1.0), 0)
        return self._judged(images, range(len(images)))

    def describe(self) -> dict[str, Any]:
        """What a report says about the data, and what a cache of scores depends on; plain JSON."""
        train, val = self.source.train, self.source.val
        return {
            "name": self.source.name,
            "classes": self.num_classes,
            "train_images": 0 if train is None else len(train),
            "val_images": 0 if val is None else len(val),
            "input": list(self.input),
            "mean": list(self.config.mean),
            "std": list(self.config.std),
            "crop_pct": self.config.crop_pct,
            "crop_mode": self.config.crop_mode,
            "interpolation": self.config.interpolation,
        }

    def _why(self) -> str:
        return f": {self.source.why}" if self.source.why else ""

    def _training(self) -> Images | Stream:
        if self.source.train is None:
            raise InputError(f"data {self.source.name!r} has no training images{self._why()}")
        return self.source.train

    def _judged(self, images: Images, indices: Sequence[int]) -> ImageSet:
        return ImageSet(images, indices, eval_transform(self.input, self.config), self._mode)

    def _stream(
        self, stream: Stream, part: tuple[float, float], seed: int, *, transform: Any = None, shuffle: bool = False
    ) -> StreamSet:
        transform = transform or eval_transform(self.input, self.config)
        order = seed if shuffle else None
        return StreamSet(stream, transform, self._mode, part=part, part_seed=seed, seed=order)


def _part(length: int, fraction: float) -> int:
    """How many images a fraction is; a fraction above 0 is at least one."""
    return max(round(length * fraction), int(fraction > 0))


def _order(images: Images, seed: int) -> list[int]:
    """A random order; classes are in proportion in any beginning of it where the labels are at hand."""
    return stratified_order(images.labels if images.labels is not None else [0] * len(images), seed)
