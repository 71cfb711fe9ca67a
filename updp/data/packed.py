"""Packed sets: JPEG files end to end in one npz file."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from updp.data.sources import TRAIN, VALIDATION, Source, check_directory
from updp.errors import InputError

_NAMES = ("data", "offset", "label", "classes")
_UNPACKED = 1 << 28  # of bytes, what a file may always hold; above that, no more than
_SHRUNK = 8  # times its own size: images hardly get smaller, and a few kilobytes of zeros must not fill the memory


class PackedImages:
    """One npz file with the arrays ``data``, ``offset``, ``label`` and ``classes``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data, self.offset, labels, self.classes = _read(path)
        self.labels: Sequence[int] | None = labels

    def __len__(self) -> int:
        return len(self.offset) - 1

    def __reduce__(self) -> tuple[type[PackedImages], tuple[Path]]:
        return type(self), (self.path,)  # a worker process that shares no memory reads the file again

    def name(self, index: int) -> str:
        return f"{self.path}: image {index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        assert self.labels is not None
        encoded = self.data[self.offset[index] : self.offset[index + 1]].tobytes()
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
        return image, self.labels[index]


def open_packed(name: str, path: Path) -> Source:
    """Packed images: one npz file to judge on, or a folder with ``train*.npz``, ``val*.npz`` or ``test*.npz``.

    Raises:
        InputError: no such file, one that is damaged or lacks an array, or class lists that differ.
    """
    train, val = (None, path) if path.is_file() else _find(path)
    learned, judged = (PackedImages(file) if file else None for file in (train, val))
    if learned and judged and learned.classes != judged.classes:
        raise InputError(f"{path}: the class lists of {learned.path.name} and {judged.path.name} differ")
    either = learned or judged
    assert either is not None
    return Source(name, learned, judged, either.classes, len(either.classes))


def _find(path: Path) -> tuple[Path | None, Path | None]:
    check_directory(path)
    found: list[Path | None] = []
    for names in (TRAIN, VALIDATION):
        files = next((files for name in names if (files := sorted(path.glob(f"{name}*.npz")))), [])
        if len(files) > 1:
            raise InputError(f"{path}: several files for one set: {', '.join(file.name for file in files)}")
        found.append(files[0] if files else None)
    if not any(found):
        raise InputError(f"{path}: no images; allowed: train*.npz and val*.npz or test*.npz")
    return found[0], found[1]


def _read(path: Path) -> tuple[np.ndarray[Any, Any], list[int], list[int], tuple[str, ...]]:
    """The arrays of a packed set, checked against each other."""
    data, offset, label, classes = _unpacked(path)
    kinds = (("data", data, "u"), ("offset", offset, "iu"), ("label", label, "iu"), ("classes", classes, "U"))
    # Of elements without a byte there can be any number in no space.
    wrong = [f"{name} is {array.ndim}-D {array.dtype}" for name, array, kind in kinds
             if array.ndim != 1 or array.dtype.kind not in kind or not array.itemsize]  # fmt: skip
    if wrong or data.itemsize != 1:
        wrong = wrong or [f"data is 1-D {data.dtype}"]
        allowed = "data 1-D uint8, offset and label 1-D integers, classes 1-D text"
        raise InputError(f"{path}: {', '.join(wrong)}; allowed: {allowed}")
    offsets, labels = offset.tolist(), label.tolist()
    if len(offsets) < 2 or len(labels) != len(offsets) - 1:
        counts = f"{len(labels)} labels and {len(offsets)} offsets"
        raise InputError(f"{path}: {counts}; allowed: one offset more than labels, and at least one label")
    if offsets[0] < 0 or offsets[-1] > len(data) or any(end < start for start, end in pairwise(offsets)):
        raise InputError(f"{path}: the offsets must rise and stay within the {len(data)} bytes of data")
    if min(labels) < 0 or max(labels) >= len(classes):
        raise InputError(f"{path}: labels from {min(labels)} to {max(labels)}, but {len(classes)} classes")
    return data, offsets, labels, _texts(path, classes)


def _texts(path: Path, classes: np.ndarray[Any, Any]) -> tuple[str, ...]:
    """The names of the classes; numpy takes any four bytes for a character until it is asked for the text."""
    characters = classes.view(np.dtype(np.uint32).newbyteorder(classes.dtype.byteorder))
    if characters.size and int(characters.max()) > sys.maxunicode:
        raise InputError(f"{path}: classes: character {int(characters.max()):#x}; allowed: those of Unicode")
    return tuple(classes.tolist())


def _unpacked(path: Path) -> list[np.ndarray[Any, Any]]:
    """The arrays of an npz file.

    Raises:
        InputError: it is damaged, lacks one, or would take far more memory than it has bytes.
    """
    try:
        # opened here: numpy leaves its own file open when it is damaged
        with path.open("rb") as file:
            _check_size(path, zipfile.ZipFile(file).infolist())
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                found = [arrays[key] for key in _NAMES]
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}; allowed: {', '.join(_NAMES)}") from None
    except Exception as error:  # zip and numpy's reader of headers raise what they met, syntax errors too
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: damaged, or not an npz file: {reason}") from None
    if others := [name for name, array in zip(_NAMES, found, strict=True) if not isinstance(array, np.ndarray)]:
        raise InputError(f"{path}: damaged, or not an npz file: {', '.join(others)}: not an array of numpy's")
    return found


def _check_size(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Raise `InputError` for a file that unpacks to far more than images can be packed to."""
    size, allowed = sum(member.file_size for member in members), max(_UNPACKED, _SHRUNK * path.stat().st_size)
    if size > allowed:
        raise InputError(
            f"{path}: unpacks to {size:,} bytes, allowed: {allowed:,}, {_SHRUNK} times the file's own size"
        )
