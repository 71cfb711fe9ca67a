"""How the program is called, for messages that show a command to type, and which process of a launch this is."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_arguments: list[str] | None = None


def program() -> str:
    """``updp`` where a shell finds it, else what this process was started by."""
    started = Path(sys.argv[0])
    if shutil.which("updp") is not None:
        return "updp"
    if started.name == "__main__.py" and started.parent.name == "updp":
        return f"{_nearest(sys.executable)} -m updp"
    return _nearest(str(started)) if started.stem == "updp" else "updp"


def launched() -> str:
    """The program and what launched its processes, where they are on one host."""
    here, all_of_them = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    return f"torchrun --nproc-per-node {here} -m updp" if here == all_of_them > 1 else program()


def remember(arguments: Sequence[str] | None) -> None:
    """Keep the arguments that the program was called with; None are those of this process."""
    global _arguments
    _arguments = list(sys.argv[1:] if arguments is None else arguments)


def command_line() -> str:
    """The command that is running, as it would be typed."""
    return shlex.join(sys.argv) if _arguments is None else f"{launched()} {shlex.join(_arguments)}"


def is_first() -> bool:
    """Whether this is the only process of a launch, or the one that speaks and writes.

    Launchers number the processes; a program that has them meet by itself is asked. Nothing is imported for that:
    where nobody did, they have not met.
    """
    met = sys.modules.get("updp.processes")
    return os.environ.get("RANK", "0") == "0" if met is None else bool(met.is_first())


def _nearest(file: str) -> str:
    """A program's path, from here where that is shorter, as a shell takes it."""
    if shutil.which(os.path.basename(file)) == file:
        return os.path.basename(file)
    shortest = min(os.path.relpath(file), file, key=len)
    return shlex.quote(shortest if os.sep in shortest else os.path.join(os.curdir, shortest))
