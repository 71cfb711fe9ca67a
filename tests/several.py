"""Commands in several processes: what ``torch.distributed.run`` runs, and calling it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
QUICK = {"_NETWORK_SECONDS": 0.01, "_BLOCK_SECONDS": 0.001}


def commands(*lines: list[object]) -> subprocess.CompletedProcess[str]:
    """Command lines one after the other, in two processes that stay the same; timing in the stage merge is short."""
    text = json.dumps([[str(word) for word in line] for line in lines])
    return subprocess.run([*LAUNCH, __file__, text], capture_output=True, text=True, check=False, cwd=ROOT)


def fault(kind: str, directory: Path) -> list[subprocess.CompletedProcess[str]]:
    """``updp train`` in two processes, of which one fails as `_fail` says.

    They find what torchrun gives them, its store included, but nobody ends them.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, __file__, kind, str(directory)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=ROOT, env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=1200) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def _fail(kind: str) -> None:
    """Make one process fail in the stage supernet, while the other waits for it or trains."""
    from updp.errors import InputError, TrainingError
    from updp.pipeline.directory import RunDirectory
    from updp.train.session import Session

    first = os.environ["RANK"] == "0"

    def fails(self: object, *args: object) -> None:
        if kind == "full disk":
            raise InputError("disk: No space left on device")
        if kind == "no number":
            raise TrainingError("loss is nan")
        os.kill(os.getpid(), 9)

    if kind == "full disk" and first:
        RunDirectory.begin = fails  # type: ignore[method-assign]
    elif kind != "full disk" and not first:
        Session.update = fails  # type: ignore[method-assign]


def main(arguments: list[str]) -> None:
    from updp.cli import main as updp
    from updp.pipeline import finish
    from updp.processes import together

    if len(arguments) == 2:
        _fail(arguments[0])
        updp(["train", arguments[1]])
    for name, seconds in QUICK.items():
        setattr(finish, name, seconds)
    finish.find_spec = lambda name: None  # type: ignore[assignment]  # no ONNX, which is tested elsewhere
    with together():
        for line in json.loads(arguments[0]):
            try:
                updp(line)
            except SystemExit as ended:
                if ended.code:
                    raise


if __name__ == "__main__":
    main(sys.argv[1:])
