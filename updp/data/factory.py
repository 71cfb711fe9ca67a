"""Every data set of timm's factory: torchvision's, Hugging Face's, TensorFlow's, web data sets, tar files.

A name is ``NAME[,OPTION...][@ROOT]``, for example ``torch/cifar10@/data``, ``torch/cifar10,download@/data``
or ``hfds/user/set,download,val=test,input_key=img``. Nothing is fetched from the network without ``download``.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from updp.data.sources import ImageError, Source
from updp.errors import InputError, suggest

OPTIONS = ("download", "train", "val", "input_key", "target_key", "classes")
PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_STREAMS = ("hfids", "tfds", "wds")
_NEEDS_ROOT = ("torch", "wds")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class FactoryName:
    """The parts of a name; ``options`` has True for an option without a value."""

    text: str
    name: str
    options: dict[str, Any]
    root: str | None

    @property
    def prefix(self) -> str:
        return self.name.partition("/")[0].lower() if "/" in self.name else ""


class FactoryImages:
    """A data set of timm or torchvision with random access."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.reader = getattr(dataset, "reader", None)
        self.labels: Sequence[int] | None = _labels(self.reader or dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        with contextlib.suppress(Exception):  # not every reader knows a file name
            return str(self.reader.filename(index, absolute=True)) if self.reader else f"image {index}"
        return f"image {index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            image, label = self.dataset[index]
            return image, int(label)
        # Not through timm's own data set, which puts another image in the place of a broken one.
        file, label = self.reader[index]
        with file, Image.open(file) as image:
            image.load()
        if label is None or int(label) < 0:
            raise ValueError("it has no label")
        return image, int(label)


class FactoryStream:
    """A data set that timm reads from the beginning to the end. It is opened anew for every epoch.

    So the order of an epoch depends on nothing that happened before it.
    """

    def __init__(self, name: FactoryName, split: str, length: int) -> None:
        self.name = name
        self.split = split
        self.length = length

    def __len__(self) -> int:
        return self.length

    def read(
        self, *, shuffle: bool, epoch: int, workers: int, process: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Image.Image, int]]:
        try:
            dataset = _create(self.name, self.split, is_training=shuffle, seed=epoch)
            # Of itself a reader takes each process's part, also where all processes are to see the same images.
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = process
            dataset.set_loader_cfg(num_workers=workers)
            for image, label in dataset:
                yield image, int(label)
        except Exception as error:  # as in _split
            raise ImageError(f"data {self.name.text!r}: cannot be read: {error}") from error


def parse_name(text: str) -> FactoryName:
    """Take a name apart.

    Raises:
        InputError: an unknown option, one without its value, or a name that needs a root and has none.
    """
    head, at, root = text.partition("@")
    name, *parts = head.split(",")
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in OPTIONS:
            raise InputError(f"data {text!r}: option {suggest(key, OPTIONS)}")
        if bool(equals and value) == (key == "download"):
            allowed = "download without a value" if equals and key == "download" else f"{key}=VALUE"
            raise InputError(f"data {text!r}: got {part!r}, allowed: {allowed}")
        options[key] = value if equals else True
    if not str(options.get("classes", 1)).isdecimal() or not int(options.get("classes", 1)):
        raise InputError(f"data {text!r}: got classes={options['classes']}, allowed: a number above 0")
    parsed = FactoryName(text, name, options, os.path.expanduser(root) if at else None)
    _check_name(parsed)
    return parsed


def open_factory(text: str) -> Source:
    """Open the training and the validation split of a data set of timm's factory.

    Raises:
        InputError: neither split can be opened, with the reason that the factory gives.
    """
    name = parse_name(text)
    train, why = _split(name, str(name.options.get("train", "train")))
    val, why_not = _split(name, str(name.options.get("val", "validation")))
    if not name.prefix or _same(train, val):  # without folders for the splits the factory gives all of it twice
        train, why = None, "there is one set of images, which is to judge on"
    if train is None and val is None:
        raise InputError(f"data {text!r}: {why_not}")
    classes = _common_classes(text, train, val)
    count = int(name.options.get("classes", 0)) or (len(classes) if classes else _count(train, val))
    if not count:
        hint = f"write {name.name},classes=N"
        raise InputError(f"data {text!r}: does not say how many classes it has; {hint}")
    if classes is not None and len(classes) != count:
        classes = None
    return Source(text, train, val, classes, count, why=why if train is None else why_not)


def _check_name(name: FactoryName) -> None:
    if name.prefix not in ("", *PREFIXES):
        allowed = [f"{prefix}/" for prefix in PREFIXES]
        raise InputError(f"data {name.text!r}: {suggest(name.prefix + '/', allowed)}")
    if not name.prefix and (name.root is None or not os.path.isfile(name.root)):
        allowed = ["digits", "folder:PATH", "npz:PATH", "tar@FILE", *(f"{prefix}/..." for prefix in PREFIXES)]
        raise InputError(f"data {name.text!r}: {suggest(name.name, allowed)}")
    if name.prefix in _NEEDS_ROOT and not name.root:
        raise InputError(f"data {name.text!r}: say where it is: {name.name}@FOLDER")
    if name.root and name.root.startswith("pipe:"):
        raise InputError(f"data {name.text!r}: the root is a command, allowed: a folder or an address")
    if name.options.get("download"):
        return
    if name.prefix in ("hfds", "hfids") and not any(map(os.environ.get, _OFFLINE)):
        hint = f"write {name.name},download if you want that, or set {_OFFLINE[0]}=1"
        raise InputError(f"data {name.text!r}: is fetched from the network; {hint}")
    if name.root and not Path(name.root).exists():
        raise InputError(f"data {name.text!r}: {name.root}: no such folder")


def _create(name: FactoryName, split: str, *, is_training: bool = False, seed: int = 0) -> Any:
    keys = {key: name.options[key] for key in ("input_key", "target_key") if key in name.options}
    with contextlib.redirect_stdout(io.StringIO()):  # some readers print before they raise
        return create_dataset(name.name, root=name.root, split=split, is_training=is_training, seed=seed,
                              download=bool(name.options.get("download")), **keys)  # fmt: skip


def _split(name: FactoryName, split: str) -> tuple[FactoryImages | FactoryStream | None, str]:
    """A split and, where there is none, why."""
    try:
        dataset = _create(name, split)
        length = len(dataset)
    except ModuleNotFoundError as error:
        return None, f"needs the package {error.name}, which is not installed"
    except Exception as error:  # readers raise what their library does, assertions too
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return None, f"split {split!r}: {reason}"
    if not length:
        return None, f"split {split!r} has no images, or does not say how many"
    if name.prefix in _STREAMS:
        return FactoryStream(name, split, length), ""
    return FactoryImages(dataset), ""


def _labels(holder: Any) -> list[int] | None:
    """Labels without decoding an image, where the data set has them at hand."""
    found = getattr(holder, "targets", None)
    if found is None and (samples := getattr(holder, "samples", None)):
        found = [sample[1] for sample in samples]
    if found is None and hasattr(holder, "label_key") and holder.label_key in holder.dataset.column_names:
        found = holder.dataset[holder.label_key]
    try:
        return [int(label) for label in found] if found is not None else None
    except (TypeError, ValueError):
        return None


def _same(train: FactoryImages | FactoryStream | None, val: FactoryImages | FactoryStream | None) -> bool:
    """Whether two splits are the same files."""
    learned, judged = (getattr(getattr(images, "dataset", None), "samples", None) for images in (train, val))
    return learned is not None and bool(learned == judged)


def _common_classes(text: str, *splits: FactoryImages | FactoryStream | None) -> tuple[str, ...] | None:
    sets = [images for images in splits if isinstance(images, FactoryImages)]
    found = {_classes(images.reader or images.dataset) for images in sets}
    if len(found) > 1:
        raise InputError(f"data {text!r}: the class lists of its two splits differ")
    return next(iter(found), None)


def _classes(holder: Any) -> tuple[str, ...] | None:
    names = getattr(holder, "classes", None)
    if names is None and (numbers := getattr(holder, "class_to_idx", None)):
        names = sorted(numbers, key=numbers.__getitem__)
    return tuple(map(str, names)) if names else None


def _count(*splits: FactoryImages | FactoryStream | None) -> int:
    labels = [images.labels for images in splits if isinstance(images, FactoryImages) and images.labels]
    return 1 + max(map(max, labels)) if labels else 0
