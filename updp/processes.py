"""The processes of one run, as launchers start them: who is first, what all agree on, how all end.

Everything here is nothing with one process. What training shares goes through the default process group (gloo for
tensors on CPUs, NCCL for those on GPUs), where `PATIENCE` is enough. The rest goes through a group of its own, always
gloo, in which processes may wait for very long while the first does what is not shared out: a process that died is
noticed at once all the same, since its connections close. Values travel as JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from updp.errors import InputError, ProcessError

PATIENCE = timedelta(minutes=30)
"""How long training waits for another process that neither answers nor closes its connections."""
_WAIT = timedelta(days=7)  # for the first process, alone at work
_JOIN = timedelta(minutes=10)  # for all to be there
_SEEN = 120.0  # seconds until a file of another host shows on a shared file system
_END = "updp/end"
_IDLE_WARNINGS = ("`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides")
"""What torch says of its own wrapper at every training, and nobody need act on."""

_store: Any = None
_group: Any = None
_alone = False


def count() -> int:
    """How many processes there are; before they have met, how many the launcher says."""
    if _alone:
        return 1
    return dist.get_world_size() if _met() else int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process does what is not shared out, as if there were no others; they wait."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def number() -> int:
    """Which one this is, from 0."""
    if _alone:
        return 0
    return dist.get_rank() if _met() else int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the one that writes."""
    return number() == 0


def _met() -> bool:
    return bool(dist.is_available() and dist.is_initialized())


@contextmanager
def together() -> Iterator[None]:
    """The body runs in all processes that a launcher started, and ends in all if it ends in one.

    Raises:
        ProcessError: another process ended, or does not answer.
    """
    if count() == 1 or _met():
        yield
        return
    try:
        _join()
        yield
        wait()
        _leave()
    except RuntimeError as error:
        if not _is_of_processes(error):
            raise
        reason = str(error).splitlines()[0].partition("] ")
        raise ProcessError(
            f"a process of this run died or does not answer any more ({(reason[2] or reason[0]).partition('. ')[0]})"
        ) from None


def _join() -> None:
    """Meet the others. Both groups are made by all, at once."""
    global _store, _group
    for message in _IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message)
    store, rank, world = next(iter(rendezvous("env://", timeout=_JOIN)))
    _store = dist.PrefixStore("updp", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local if local < torch.cuda.device_count() else 0)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    _group = dist.new_group(backend="gloo", timeout=_WAIT)


def _leave() -> None:
    global _store, _group
    _store = _group = None
    dist.destroy_process_group()


def _is_of_processes(error: RuntimeError) -> bool:
    """Whether torch says that talking to another process failed; gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo", "NCCL"))


def verdict(status: int) -> tuple[bool, int]:
    """How this process is to end: whether it tells the user why, and with which exit status.

    The first process that asks tells, and all end with its status. From now on the launcher's request to end, which
    comes as soon as one process has, is not needed any more.
    """
    if count() == 1:
        return True, status
    with suppress(ValueError):  # in a thread that is not the first, as in some tests
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _store is None:  # they had not met: what is wrong is wrong with the command
        return is_first(), status
    try:
        _store.set_timeout(timedelta(seconds=10))
        own = f"{number()} {status}"
        teller, agreed = _store.compare_set(_END, "", own).decode().split()
    except RuntimeError:  # whoever kept the store is gone
        return True, status
    return int(teller) == number(), int(agreed)


def check_device(device: str) -> None:
    """Find out whether this process has a device of its own.

    Raises:
        InputError: the host has fewer GPUs than processes.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and count() > 1 and local >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        allowed = f"allowed: {gpus} processes on this host, or --device cpu"
        raise InputError(f"--device: got cuda, but process {local + 1} of this host finds {gpus} GPUs; {allowed}")


def wait() -> None:
    """Wait until all processes are here, for as long as it takes."""
    if count() > 1:
        dist.barrier(group=_waiting())


def agreed(value: Any) -> Any:
    """The first process's value, in all: plain JSON."""
    return value if count() == 1 else gathered(value if is_first() else None)[0]


def gathered(value: Any) -> list[Any]:
    """Every process's value, in the order of the processes, in all: plain JSON, and numbers keep their bits."""
    if count() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=_waiting())
    longest = max(int(size) for size in sizes)
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(parts, torch.cat([data, data.new_zeros(longest - len(data))]), group=_waiting())
    return [
        json.loads(bytes(part[: int(size)].tolist()).decode()) for part, size in zip(parts, sizes, strict=True)
    ]  # fmt: skip


def share_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if count() == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            data = tensor.detach().cpu().contiguous()
            dist.broadcast(data, 0, group=_waiting())
            if not is_first():
                tensor.copy_(data)


def share_of(items: int, process: tuple[int, int] | None = None) -> slice:
    """The part of one process among all, this one if left out: neighbours stay together, parts differ by at most 1."""
    which, of = process or (number(), count())
    return slice(items * which // of, items * (which + 1) // of)


def until_seen(file: Path) -> None:
    """Wait for a file that the first process wrote: a shared file system may show it to other hosts a little later.

    Raises:
        InputError: it does not appear.
    """
    end = time.monotonic() + (_SEEN if count() > 1 and not is_first() else 0.0)
    while not file.is_file():
        if time.monotonic() > end:
            allowed = "allowed: a directory on a file system that all hosts share"
            raise InputError(f"{file}: the first process wrote it, but it cannot be seen here; {allowed}")
        time.sleep(0.2)
        with suppress(OSError):
            os.listdir(file.parent)  # makes network file systems look again


def _waiting() -> Any:
    """The group for what is not training; made by all at the first use, if a caller of the library made the other."""
    global _group
    if _group is None:
        _group = dist.new_group(backend="gloo", timeout=_WAIT)
    return _group
