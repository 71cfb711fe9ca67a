"""Files that are either whole or not there: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from updp.errors import InputError, Place, Problem


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it takes the place of ``path``, on failure it is removed.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()  # a folder that cannot be written shows now, and not in a library's own error
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a read-only file system refuses even what is not there, and hides why
            temporary.unlink()


def check_writable(path: str | Path) -> None:
    """Find out before long work whether a file can be written at its end.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    probe = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        InputError: it cannot be read or holds something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = Place(str(file), error.lineno, error.colno)
        raise InputError([Problem(place, "", f"not JSON: {error.msg}")]) from None
    except (OSError, RecursionError, ValueError) as error:  # also text that is not UTF-8, and endless numbers
        raise InputError([Problem(Place(str(file)), "", f"cannot be read: {error}")]) from None
    if not isinstance(data, dict):
        raise InputError([Problem(Place(str(file)), "", f"got {type(data).__name__}, allowed: an object")])
    return data


def sha256(path: str | Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def json_text(data: Any) -> str:
    """JSON for people and programs; numbers that JSON does not have become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_line(data: Any) -> str:
    """The same on one line, whatever the texts in it hold."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8") + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
