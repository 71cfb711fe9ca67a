"""Calling the commands as a shell would, in this process."""

import hashlib
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from updp.cli import main

ROOT = Path(__file__).parents[1]
SPEC = "convnext_digits"
TINY = [
    "held_out=0.8", "train.warmup_epochs=0", "baseline.epochs=2", "supernet.epochs=1", "finetune.epochs=2",
    "search.population=4", "search.generations=2", "search.images=64", "search.calibration_images=64",
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


class Caller:
    """Runs a command line and gives its exit status and what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self.capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        seen = self.capsys.readouterr()
        return Outcome(status, seen.out, seen.err)

    def refuses(self, *arguments: object, names: tuple[str, ...]) -> str:
        """The command must end with status 2 and one message on stderr that names all this."""
        done = self(*arguments)
        assert done.status == 2, done
        assert done.err.startswith("error: "), done
        assert done.err.count("error: ") == 1
        assert "Traceback" not in done.err
        assert [name for name in names if name not in done.err] == [], done.err
        return done.err


def started(arguments: list[object]) -> subprocess.Popen[str]:
    """The command in a process of its own, whose lines come as they are written.

    Whoever started the tests in the background may have had signals ignored, and children inherit that.
    """

    def heed() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-u", "-m", "updp", *map(str, arguments)], cwd=ROOT, text=True, bufsize=1,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed,
    )  # fmt: skip


def options(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def tiny_run(out: Path, *more: object, prune: int | None = 4) -> list[object]:
    """The arguments of a run of seconds."""
    choice = [] if prune is None else ["--prune", prune]
    return ["run", SPEC, "--data", "digits", *choice, "--out", out, "--threads", 1, *options(TINY), *more]


def contents(directory: Path) -> dict[str, str]:
    """Every file below a directory with the checksum of its bytes."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
