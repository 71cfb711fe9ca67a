"""The state of a training on disk: stopped at any moment, it goes on with the bits that it would have had."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from updp.artefact import load_tensors, save_tensors
from updp.errors import InputError

_KEPT = 2  # if the newest is damaged, the one before it is still there
_TENSOR = "tensor:"


@dataclass(frozen=True)
class Every:
    """How often a state is kept: whichever comes first, so many seconds or so many optimizer steps."""

    seconds: float | None = 300.0
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """What ``90s``, ``10m``, ``2h`` or a number of steps says.

        Raises:
            InputError: none of these.
        """
        match = re.fullmatch(r"(\d{1,9})([smh]?)", text.strip())
        if match is None or not int(match[1]):
            raise InputError(f"got {text!r}, allowed: a time such as 90s, 10m or 2h, or a number of steps")
        number, unit = int(match[1]), match[2]
        return cls(None, number) if not unit else cls(number * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit])


USUAL = Every()


class Checkpoints:
    """The last two states of one training, a file each: tensors, and in the metadata everything else as JSON.

    A file has the checksum of its own content: one that was damaged is passed over, for the one before it.

    Args:
        folder: theirs alone; made when the first is written.
        every: how often one is due.
        note: told what the user should know.
    """

    def __init__(self, folder: Path, every: Every = USUAL, note: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder
        self.every = every
        self._note = note
        self._last_time, self._last_updates = time.monotonic(), 0

    def due(self, updates: int) -> bool:
        """Whether it is time for the next, after so many optimizer steps."""
        seconds, steps = self.every.seconds, self.every.steps
        late = seconds is not None and time.monotonic() - self._last_time >= seconds
        return late or (steps is not None and updates - self._last_updates >= steps)

    def save(self, key: str, state: Mapping[str, Any]) -> None:
        """Write a state; older ones than the one before go.

        Args:
            key: names the training.
            state: ``updates``, and whatever else; tensors, and what JSON has, in dicts and lists.

        Raises:
            InputError: it cannot be written. What was there stays.
        """
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_pack(state, "", tensors), allow_nan=True)
        updates = int(state["updates"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be made: {error.strerror or error}") from None
        metadata = {"state": text, "key": key, "digest": _digest(tensors, text)}
        save_tensors(self.folder / f"{updates:010}.safetensors", tensors, metadata)
        files = self._files()
        kept = [file for file in files if int(file.stem) <= updates][:_KEPT]  # later ones were damaged and passed over
        for file in set(files) - set(kept):
            file.unlink(missing_ok=True)
        self.waited(updates)

    def waited(self, updates: int) -> None:
        """Count time and steps from here."""
        self._last_time, self._last_updates = time.monotonic(), updates

    def latest(self, key: str) -> dict[str, Any] | None:
        """The newest state that is whole; None where there is none.

        Raises:
            InputError: it is another training's: going on would waste what it has, and so would beginning anew.
        """
        for file in self._files():
            try:
                tensors, metadata = load_tensors(file)
                text = metadata.get("state", "")
                if metadata.get("digest") != _digest(tensors, text):
                    raise InputError(f"{file}: its content is not what its checksum says")
            except InputError as error:
                self._note(f"{error}; what was kept before it is used")
                continue
            if metadata.get("key") != key:
                raise InputError(
                    f"{self.folder}: got the state of another training: the images, the weights that it starts from or "
                    "its settings have changed since; put them back, or remove the folder and the stage begins anew"
                )
            state: dict[str, Any] = _unpack(json.loads(text), tensors)
            self.waited(int(state["updates"]))
            return state
        return None

    def clear(self) -> None:
        """Remove all: the training is done, or not wanted any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("[0-9]*.safetensors"), reverse=True)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The same tree with names in the place of tensors, which go to ``tensors``."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return _TENSOR + path
    if isinstance(value, Mapping):
        return {str(key): _pack(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float) or (
        isinstance(value, str) and not value.startswith(_TENSOR)
    ):  # fmt: skip
        return value
    raise InputError(f"{path}: a {type(value).__name__} of the optimizer's cannot be kept: choose another optimizer")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {key: _unpack(item, tensors) for key, item in value.items()}
    return [_unpack(item, tensors) for item in value] if isinstance(value, list) else value


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor], *parts: object) -> str:
    """A key for a training that starts from these tensors and depends on these other things."""
    return _digest(tensors, repr(parts))


def _bytes(tensor: Tensor) -> Any:
    """A tensor's elements in their order, whatever their type and place in memory."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else b""
