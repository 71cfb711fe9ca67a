"""Which form each chain of a network runs in: measured once, kept for the machine, saved with a network on request."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from updp import ops
from updp.deployment.tune import Problem
from updp.errors import InputError, Place
from updp.errors import Problem as Complaint
from updp.files import read_json, write_text
from updp.measure import environment

VERSION = 3
"""Plans of version 1 do not speak of attention, those of version 2 not of layer norms."""


@dataclass(frozen=True)
class Choice:
    """One chain, attention or layer norm, the form it runs in, and what was measured.

    Attributes:
        name: of the layer in the network.
        problem: what is computed.
        input: shape of the first input it was measured on.
        times: form -> median milliseconds inside the network; empty where there was no choice.
    """

    name: str
    problem: str
    input: tuple[int, ...]
    form: str
    times: Mapping[str, float]

    @property
    def gain(self) -> float | None:
        """How many times faster than the best of torch's forms; None if that is not known."""
        torch_times = [ms for form, ms in self.times.items() if form in ("torch", "onednn")]
        return min(torch_times) / self.times[self.form] if torch_times and self.form in self.times else None


@dataclass(frozen=True)
class Plan:
    """The choices of a network, and the environment that they were measured in."""

    environment: Mapping[str, Any]
    choices: tuple[Choice, ...]
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "environment": dict(self.environment),
            "choices": [asdict(each) for each in self.choices],
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan.

        Raises:
            InputError: it is not one.
        """
        data = read_json(Path(path))
        try:
            if data["version"] not in range(1, VERSION + 1):
                raise ValueError(f"version: got {data['version']!r}, allowed: 1 to {VERSION}")
            choices = tuple(Choice(**{**row, "input": tuple(map(int, row["input"]))}) for row in data["choices"])
            for each in choices:
                if not all(isinstance(text, str) for text in (each.name, each.problem, each.form)):
                    raise TypeError(f"names, problems and forms are texts, got {each!r}")
                {form: float(ms) for form, ms in each.times.items()}
            return cls(dict(data["environment"]), choices, data["version"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError([Complaint(Place(str(path)), "", f"not a plan: {error}")]) from None


def here(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What measured times depend on, shapes aside."""
    kernels = [row.name for row in ops.kernel_rows() if row.available]
    return {**environment(device, dtype=dtype), "kernels": _digest(kernels)}


class Cache:
    """What was measured on this machine: a file for each environment, entries by problem and shape.

    Args:
        folder: where the files are; ``$UPDP_CACHE``, else ``updp`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """

    def __init__(self, environment: Mapping[str, Any], folder: Path | None = None) -> None:
        self._environment = dict(environment)
        self.file = (folder or cache_folder()) / "plans" / f"{_digest(self._environment)}.json"
        self._entries: dict[str, dict[str, float]] = self._read()
        self._new: dict[str, dict[str, float]] = {}

    def get(self, problem: Problem, shape: Sequence[int], forms: Sequence[str]) -> dict[str, float] | None:
        """Times of exactly these forms, if they were measured."""
        times = self._entries.get(_key(problem, shape))
        return times if times is not None and set(times) == set(forms) else None

    def put(self, problem: Problem, shape: Sequence[int], times: Mapping[str, float]) -> None:
        self._entries[_key(problem, shape)] = self._new[_key(problem, shape)] = dict(times)

    def save(self) -> None:
        """Add what is new to the file; where that is not possible, it will be measured again."""
        if not self._new:
            return
        entries = self._read() | self._new
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps({"environment": self._environment, "entries": entries}, indent=1) + "\n")
        except (OSError, InputError):
            return
        self._new = {}

    def _read(self) -> dict[str, dict[str, float]]:
        """The entries on disk; a file that is damaged or of another environment has none."""
        try:
            data = json.loads(self.file.read_bytes())
            if data["environment"] != self._environment:
                return {}
            entries = data["entries"].items()
            return {str(key): {str(f): float(ms) for f, ms in times.items()} for key, times in entries}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def cache_folder() -> Path:
    """Where measured times are kept."""
    if own := os.environ.get("UPDP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "updp"


def planned(plan: Plan, name: str, problem: Problem) -> Choice | None:
    """What a plan says of a part of a network; None if it is too old, or of another machine, to speak of such.

    Raises:
        InputError: the plan is of another network.
    """
    found = next((each for each in plan.choices if each.name == name), None)
    if problem.since is None and (found is None or found.problem != str(problem)):
        return None
    if found is None and problem.since is not None and plan.version < problem.since:
        return None
    if found is None or found.problem != str(problem):
        was = "nothing" if found is None else found.problem
        raise InputError(f"the plan is of another network: for {name} it has {was}, the network {problem}")
    return found


def _key(problem: Problem, shape: Sequence[int]) -> str:
    return f"{problem} on {'x'.join(map(str, shape))}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
