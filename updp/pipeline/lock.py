"""One run at a time in a run directory.

The lock is the kernel's (``flock``): it goes with the process that holds it, however that ends, so no lock is ever left
behind. The file says who holds it, for the message to others, and is removed with the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from updp.errors import InputError
from updp.pipeline.program import command_line, is_first
from updp.pipeline.watch import Watch

NAME = "lock"
_HELD = (errno.EAGAIN, errno.EACCES)
_TRIES, _PAUSE = 5, 0.1  # who only looks whether a run is locked holds the lock for a moment


@dataclass(frozen=True)
class Holder:
    """Who works on a run; None is what the file does not say."""

    host: str | None = None
    pid: int | None = None
    command: str | None = None
    since: str | None = None

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), command_line(), now)

    def __str__(self) -> str:
        if self.pid is None:
            return "another process"
        return f"process {self.pid} on {self.host}, since {self.since}: {self.command}"


@contextmanager
def locked(directory: Path, watch: Watch) -> Iterator[None]:
    """Hold the lock of a run directory; of several processes of one launch the first holds it for all.

    Where the file system has no locks, a note says so, and the work goes on.

    Raises:
        InputError: another process holds it, or the directory cannot be written.
    """
    file = directory / NAME
    descriptor = _acquire(file, watch) if is_first() else None
    if descriptor is None:
        yield
        return
    _ours.add(descriptor)
    try:
        yield
    finally:
        _ours.discard(descriptor)
        with suppress(OSError):
            file.unlink()  # still locked: whoever opened it before sees that it is not the run's lock any more
        os.close(descriptor)


def check_free(directory: Path) -> None:
    """Refuse early what would be refused when the work begins.

    Raises:
        InputError: a process holds the lock.
    """
    if is_first() and (held := holder(directory)) is not None:
        raise _refusal(directory, held)


def holder(directory: Path) -> Holder | None:
    """Who works on a run directory now; None where nobody does, or it cannot be known."""
    try:
        descriptor = os.open(directory / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _read(descriptor) if error.errno in _HELD else _alive(_read(descriptor))
    finally:
        os.close(descriptor)
    return None


def _acquire(file: Path, watch: Watch) -> int | None:
    """A descriptor that holds the lock, or None where there are no locks."""
    try:
        for attempt in range(_TRIES):
            time.sleep(_PAUSE if attempt else 0)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if _lock(descriptor, file):
                    return descriptor
            except OSError as error:
                os.close(descriptor)
                watch.on_note(f"no lock: {error.strerror}: {file}; see to it that no other run works there")
                return None
            held = _read(descriptor)
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"{file.parent}: cannot be written: {error.strerror or error}") from None
    raise _refusal(file.parent, held)


def _lock(descriptor: int, file: Path) -> bool:
    """Whether the lock was free, and the file is the one that is there; it says then that it is ours."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    try:
        if not os.path.samestat(os.fstat(descriptor), os.stat(file)):
            return False
    except FileNotFoundError:
        return False
    with suppress(OSError):  # a full disk keeps nobody's name, but the lock holds
        os.ftruncate(descriptor, 0)
        os.write(descriptor, (json.dumps(asdict(Holder.here()), ensure_ascii=False) + "\n").encode())
    return True


def _read(descriptor: int) -> Holder:
    try:
        data = json.loads(os.pread(descriptor, 1 << 16, 0))
        host, pid, command, since = (data[name] for name in ("host", "pid", "command", "since"))
    except (OSError, ValueError, KeyError, TypeError):  # who holds it is about to write, or has no space to
        return Holder()
    return Holder(str(host), pid, str(command), str(since)) if isinstance(pid, int) else Holder()


def _alive(held: Holder) -> Holder | None:
    """The holder where there are no locks to ask: if it is a process of this machine that is there."""
    if held.pid is None or held.host != socket.gethostname():
        return None
    return held if Path(f"/proc/{held.pid}").exists() else None


def _refusal(directory: Path, held: Holder) -> InputError:
    return InputError(f"{directory}: another run is at work here ({held}); wait for its end, or end it")


_ours: set[int] = set()


def _let_go() -> None:
    """Worker processes must not hold the lock when the run is dead: they close what they inherited."""
    for descriptor in _ours:
        with suppress(OSError):
            os.close(descriptor)
    _ours.clear()


os.register_at_fork(after_in_child=_let_go)
