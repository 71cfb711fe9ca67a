"""What a data set is before anything is resized or drawn at random, and the embedded one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from updp.errors import InputError, Problem

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "eval", "evaluation", "test")  # the first that is there is used
_DIGITS_TEST = 360  # a fifth


class ImageError(InputError):
    """An image that cannot be read. The message stays one line when a worker process hands it over."""

    def __init__(self, problems: str | Sequence[Problem]) -> None:
        if isinstance(problems, str):  # torch rebuilds a worker's error from the text of its whole traceback
            problems = problems.rsplit("ImageError: ", 1)[-1].strip()
        super().__init__(problems)


class Images(Protocol):
    """Labelled images in a fixed order. ``labels`` is None where only decoding an image would tell."""

    labels: Sequence[int] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls this image."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its label; any error means that it cannot be read."""


@runtime_checkable
class Stream(Protocol):
    """Labelled images that can only be read from the beginning to the end."""

    def __len__(self) -> int: ...

    def read(
        self, *, shuffle: bool, epoch: int, workers: int, process: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Image.Image, int]]:
        """All images once, or those of one process; ``shuffle`` asks for the stream's own order of that epoch."""


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        name: as the user gave it.
        train: the training images, if there are any.
        val: the images to judge on, if there are any.
        classes: the names of all classes; None where labels are plain indices and not every class need occur.
        num_classes: how many classes there are; without names, the largest label plus one, or 0 if unknown.
        whole: the images fill their frame, so that a centre crop would only cut into them.
        why: why one of ``train`` and ``val`` is missing, if that needs saying.
    """

    name: str
    train: Images | Stream | None
    val: Images | Stream | None
    classes: tuple[str, ...] | None
    num_classes: int
    whole: bool = False
    why: str = ""


class DigitImages:
    """Handwritten digits of scikit-learn, 8x8 grey, drawn at 32x32."""

    def __init__(self, indices: Sequence[int]) -> None:
        pixels, labels = _digits()
        self.labels: Sequence[int] | None = [labels[index] for index in indices]
        drawn = (Image.fromarray(pixels[index]) for index in indices)
        self.images = [image.resize((32, 32), Image.Resampling.BICUBIC) for image in drawn]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"digit {index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        assert self.labels is not None
        return self.images[index], self.labels[index]


def open_digits() -> Source:
    """The embedded digits: 1,437 images to train on, 360 to judge on; no seed changes which."""
    order = stratified_order(_digits()[1], seed=0)
    test, train = sorted(order[:_DIGITS_TEST]), sorted(order[_DIGITS_TEST:])
    classes = tuple(str(digit) for digit in range(10))
    return Source("digits", DigitImages(train), DigitImages(test), classes, len(classes), whole=True)


def stratified_order(labels: Sequence[int], seed: int) -> list[int]:
    """A random order of ``range(len(labels))`` every beginning of which has the classes in proportion.

    It depends on nothing but its arguments: of all generators at hand, only ``random.Random.random``
    promises the same numbers in every version.
    """
    draw = Random(seed).random
    members: dict[int, list[tuple[float, int]]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append((draw(), index))
    places: list[tuple[float, int]] = []
    for label in sorted(members):
        shift, ranked = draw(), sorted(members[label])
        places += [((rank + shift) / len(ranked), index) for rank, (_, index) in enumerate(ranked)]
    return [index for _, index in sorted(places)]


def read_image(images: Images, index: int, mode: str) -> tuple[Image.Image, int]:
    """An image in PIL's ``mode`` and its label.

    Raises:
        ImageError: naming the image, whatever went wrong in decoding it.
    """
    try:
        image, label = images.load(index)
        return image.convert(mode), label
    except Exception as error:  # decoders raise anything from OSError to SyntaxError and struct.error
        if isinstance(error, OSError) and error.strerror:  # the file system's word, which names the file once more
            raise ImageError(f"{images.name(index)}: cannot be read: {error.strerror}") from error
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ImageError(f"{images.name(index)}: cannot be read as an image: {reason}") from error


def check_directory(path: Path) -> None:
    """Raise InputError unless ``path`` is a folder."""
    if not path.exists():
        raise InputError(f"{path}: no such folder")
    if not path.is_dir():
        raise InputError(f"{path}: is a file, allowed: a folder")


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray[Any, Any], list[int]]:
    """All digits as bytes ``(1797, 8, 8)`` and their labels."""
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    return pixels, [int(label) for label in digits.target]
