"""Image files: a folder per class, or images beside a csv file with their labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from timm.utils import natural_key

from updp.data.sources import TRAIN, VALIDATION, Source, check_directory
from updp.errors import InputError, Place, Problem

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FILE_COLUMNS = ("file", "filename", "path", "image")
LABEL_COLUMNS = ("label", "class", "target")
_SHOWN = 10  # problems of one file that are listed
_INDEX_DIGITS = 9  # a longer number is no class index


class FileImages:
    """Image files and their labels."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths = paths
        self.labels: Sequence[int] | None = labels

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        assert self.labels is not None
        with Image.open(self.paths[index]) as image:
            image.load()
        return image, self.labels[index]


def open_folder(name: str, path: Path) -> Source:
    """Image files below a folder.

    Either the folder has ``train`` and/or ``val`` (or another name of :data:`VALIDATION`) below it, or all
    of it is one set to judge on. A set is images beside a csv file, or one folder per class.

    In a csv file a column of :data:`FILE_COLUMNS` has paths relative to the csv file, and one of
    :data:`LABEL_COLUMNS` class indices (not every class need occur) or class names. Class names, of a csv
    file or of folders, are numbered in timm's order; those of ``train`` count for ``val`` too.

    Raises:
        InputError: no such folder, no images, or a csv file that does not fit, with all its problems.
    """
    check_directory(path)
    train, val = _child(path, TRAIN), _child(path, VALIDATION)
    if train is None and val is None:
        val = path
    learned = _Labelled(train) if train else None
    judged = _Labelled(val) if val else None
    sets = [files for files in (learned, judged) if files]
    classes = sets[0].classes
    if any((files.classes is None) != (classes is None) for files in sets):
        names = " and ".join(files.path.name for files in sets)
        raise InputError(f"{path}: the labels of {names} must both be class indices or both be class names")
    images = [FileImages(files.paths, files.indices(classes)) for files in sets]
    count = len(classes) if classes else 1 + max(max(each.labels or ()) for each in images)
    return Source(name, images[0] if learned else None, images[-1] if judged else None, classes, count)


def open_unlabelled(name: str, path: Path) -> Source:
    """All image files below a folder, whatever is said of them.

    Raises:
        InputError: no such folder, or no images below it.
    """
    check_directory(path)
    files = _images_below(path)
    if not files:
        raise InputError(f"{path}: no images; allowed: {', '.join(SUFFIXES)}")
    return Source(name, FileImages(files, [0] * len(files)), None, None, 0)


class _Labelled:
    """The image files of one set; ``classes`` is None where the labels are indices."""

    def __init__(self, path: Path) -> None:
        self.path = path
        table = _label_table(path)
        self.paths, self.labels = _read_table(table) if table else _read_class_folders(path)
        if not self.paths:
            raise InputError(f"{table or path}: no images; allowed: {', '.join(SUFFIXES)}")
        self.classes: tuple[str, ...] | None = None
        if isinstance(self.labels[0], str):
            self.classes = tuple(sorted(sorted({str(label) for label in self.labels}), key=natural_key))

    def indices(self, classes: tuple[str, ...] | None) -> list[int]:
        """The labels as indices into ``classes``."""
        if classes is None:
            return [int(label) for label in self.labels]
        unknown = sorted({str(label) for label in self.labels} - set(classes))
        if unknown:
            names = ", ".join(unknown[:_SHOWN])
            raise InputError(f"{self.path}: classes that the training images do not have: {names}")
        numbers = {label: number for number, label in enumerate(classes)}
        return [numbers[str(label)] for label in self.labels]


def _child(path: Path, names: Sequence[str]) -> Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


def _label_table(path: Path) -> Path | None:
    tables = sorted(path.glob("*.csv"))
    if len(tables) > 1 and path / "labels.csv" not in tables:
        names = ", ".join(table.name for table in tables)
        raise InputError(f"{path}: several csv files ({names}), allowed: one, or one called labels.csv")
    return path / "labels.csv" if len(tables) > 1 else next(iter(tables), None)


def _read_class_folders(path: Path) -> tuple[list[Path], Sequence[str | int]]:
    """Images in folders; the class is the folder directly below ``path``."""
    classes = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    files = [(file, folder.name) for folder in classes for file in _images_below(folder)]
    if not files and any(_is_image(child.name) for child in path.iterdir()):
        allowed = "allowed: one folder per class, or a labels.csv beside them"
        raise InputError(f"{path}: images without labels; {allowed}")
    return [file for file, _ in files], [label for _, label in files]


def _images_below(folder: Path) -> list[Path]:
    walk = os.walk(folder, followlinks=True)
    return sorted(Path(parent, file) for parent, _, files in walk for file in files if _is_image(file))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _read_table(table: Path) -> tuple[list[Path], Sequence[str | int]]:
    """Paths and labels of a csv file; all its problems are reported together."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            rows.fieldnames = header = [column.strip() for column in rows.fieldnames or ()]
            named, labelled = _column(table, header, FILE_COLUMNS), _column(table, header, LABEL_COLUMNS)
            cells = [(rows.line_num, row[named] or "", row[labelled] or "") for row in rows]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{table}: not a csv file: {error}") from None
    entries = [(line, name.strip(), label.strip()) for line, name, label in cells]
    indices = bool(entries) and _is_index(entries[0][2])
    problems = [
        Problem(Place(str(table), line), where, message)
        for line, name, label in entries
        for where, message in _row_problems(table.parent / name, name, label, indices)
    ]
    if problems:
        more = Problem(Place(str(table)), "", f"and {len(problems) - _SHOWN} more problems")
        raise InputError(problems[:_SHOWN] + ([more] if len(problems) > _SHOWN else []))
    paths = [table.parent / name for _, name, _ in entries]
    return paths, [int(label) if indices else label for _, _, label in entries]


def _column(table: Path, header: Sequence[str], names: Sequence[str]) -> str:
    found = next((name for name in names if name in header), None)
    if found is None:
        message = f"no column {' or '.join(names)}; got the columns {', '.join(header) or 'none'}"
        raise InputError([Problem(Place(str(table), 1), "", message)])
    return found


def _is_index(label: str) -> bool:
    return label.isascii() and label.isdecimal() and len(label) <= _INDEX_DIGITS


def _row_problems(path: Path, name: str, label: str, indices: bool) -> Iterator[tuple[str, str]]:
    if not name or not path.is_file():
        yield "file", f"got {name!r}, but there is no such file"
    if not label:
        yield "label", "is empty"
    elif _is_index(label) != indices:
        kind = "index" if indices else "name"
        yield "label", f"got {label!r}, allowed: a class {kind}, as in the first row"
