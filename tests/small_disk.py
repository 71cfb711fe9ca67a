"""Run by test_faults.py in a mount namespace of its own: commands on a disk of a few megabytes, full or read-only.

Prints a JSON object: what each command ended with, and what was on the disk then.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from commands import contents, options, tiny_run

from updp.cli import main

QUICK = options(["baseline.epochs=1", "supernet.epochs=0"])
SIZE, FREE = 6 << 20, 300_000  # bytes; less is free than the weights of a stage take


class Disk:
    """A small file system, and the commands of one run on it."""

    def __init__(self, place: Path) -> None:
        self.place, self.out = place, place / "run"
        self.seen: dict[str, dict[str, Any]] = {}
        self.mount("-t", "tmpfs", "-o", f"size={SIZE}", "none")

    def mount(self, *how: str) -> None:
        subprocess.run(["mount", *how, str(self.place)], check=True)

    def fill(self) -> None:
        free = os.statvfs(self.place)
        (self.place / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - FREE))

    def run(self, name: str, *arguments: object) -> None:
        """Run a command, and remember its end under a name."""
        out, err = io.StringIO(), io.StringIO()
        status: Any = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as ended:
                status = ended.code or 0
        files = contents(self.out) if self.out.is_dir() else {}
        self.seen[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "files": files}

    def until(self, stage: str) -> list[object]:
        return tiny_run(self.out, *QUICK, "--until", stage)


def full(disk: Disk) -> None:
    """Too little space for a run, then for a stage, then enough."""
    disk.fill()
    (disk.place / "more").write_bytes(bytes(FREE - 8192))
    disk.run("no space at all", *disk.until("baseline"))
    (disk.place / "ballast").unlink()
    disk.run("begun", *disk.until("baseline"))
    disk.fill()
    disk.run("failed", *disk.until("supernet"))
    disk.run("status", "status", disk.out)
    (disk.place / "ballast").unlink()
    disk.run("again", *disk.until("supernet"))


def readonly(disk: Disk) -> None:
    """The file system becomes read-only, as the kernel makes it after errors, and writable again."""
    disk.run("begun", *disk.until("baseline"))
    disk.mount("-o", "remount,ro")
    disk.run("failed", *disk.until("supernet"))
    disk.run("nothing to do", *disk.until("baseline"))
    disk.run("status", "status", disk.out)
    disk.mount("-o", "remount,rw")
    disk.run("again", *disk.until("supernet"))


if __name__ == "__main__":
    disk = Disk(Path(sys.argv[2]))
    {"full": full, "readonly": readonly}[sys.argv[1]](disk)
    print(json.dumps(disk.seen))
