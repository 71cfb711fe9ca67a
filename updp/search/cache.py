"""Scores on disk, so that a search that was stopped is replayed up to there without scoring anything twice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from updp import processes
from updp.errors import InputError
from updp.oracle import Score
from updp.subnet import SubnetConfig


class Oracle(Protocol):
    """Whatever can score subnets; the score of a subnet must not depend on what else is scored."""

    def score(self, configs: Sequence[SubnetConfig]) -> list[Score]:
        """One score per config, in their order."""
        ...


class CachedOracle:
    """An oracle that remembers, in memory and in a file of one JSON object a line.

    Of several processes only the first has the file; what it holds, all know.

    A line is written in one piece and synced before the score is used. Lines that cannot be read (a write cut short)
    and lines for other data are passed over.

    Args:
        path: the file; made when it is missing. None: remember in memory only.
        data_key: names the images, the weights and whatever else the scores depend on.

    Attributes:
        scored: how many subnets the oracle itself was asked for.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, oracle: Oracle, path: str | Path | None, data_key: str) -> None:
        self._oracle = oracle
        self._path = None if path is None else Path(path)
        self._data_key = data_key
        known = {} if self._path is None else _read(self._path, data_key)
        told = processes.agreed({key: _to_json(score) for key, score in known.items()})
        self._scores = {key: _from_json(entry) for key, entry in told.items()}
        self.scored = 0

    def score(self, configs: Sequence[SubnetConfig]) -> list[Score]:
        new = {config.key(): config for config in configs if config.key() not in self._scores}
        if new:
            scores = self._oracle.score(list(new.values()))
            self._write(list(new.values()), scores)
            self._scores.update(zip(new, scores, strict=True))
            self.scored += len(new)
        return [self._scores[config.key()] for config in configs]

    def _write(self, configs: Sequence[SubnetConfig], scores: Sequence[Score]) -> None:
        if self._path is None:
            return
        lines = [
            {"key": config.key(), "data": self._data_key, **_to_json(score), "choices": dict(config.choices)}
            for config, score in zip(configs, scores, strict=True)
        ]
        data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
        try:
            with self._path.open("ab+") as stream:
                if stream.tell() and not _ends_a_line(stream):
                    data = b"\n" + data
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise InputError(f"cannot write the scores: {error.strerror}: {self._path}") from None


def _ends_a_line(stream: Any) -> bool:
    stream.seek(-1, os.SEEK_END)
    return bool(stream.read(1) == b"\n")


def _read(path: Path, data_key: str) -> dict[str, Score]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"cannot read the scores: {error.strerror}: {path}") from None
    scores = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if entry["data"] == data_key:
                scores[str(entry["key"])] = _from_json(entry)
        except (ValueError, KeyError, TypeError):  # cut short, or not ours: it is scored again
            continue
    return scores


def _to_json(score: Score) -> dict[str, Any]:
    """JSON knows no NaN or infinity: a loss that is not finite is written as a string."""
    return {**asdict(score), "loss": score.loss if abs(score.loss) < float("inf") else str(score.loss)}


def _from_json(entry: dict[str, Any]) -> Score:
    return Score(float(entry["top1"]), float(entry["top5"]), float(entry["loss"]), int(entry["images"]))
