"""Kills at random moments: runs of the small specs must end with the bits of runs that were never killed.

    python tests/soak.py --kills 40

Each run is the command itself, in a process of its own, killed with SIGKILL after a random time and started again until
it is done; then the next begins. The exit status is 1 if a run ends otherwise than the undisturbed one.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from kills import leftovers, outcome

ROOT = Path(__file__).parents[1]
SPECS = {"convnext_digits": 4, "deit_digits": 2}
SETTINGS = (
    "held_out=0.5", "train.warmup_epochs=0", "baseline.epochs=6", "supernet.epochs=4", "finetune.epochs=8",
    "finetune.ema=0.99", "search.population=8", "search.generations=4", "search.images=256",
    "search.calibration_images=64",
)  # fmt: skip


def command(spec: str, out: Path) -> list[str]:
    """A run of about half a minute, whose trainings keep their state every five steps."""
    changes = [word for setting in SETTINGS for word in ("--set", setting)]
    return [
        sys.executable, "-m", "updp", "run", spec, "--data", "digits", "--prune", str(SPECS[spec]), "--out", str(out),
        "--threads", "1", "--save-every", "5", *changes,
    ]  # fmt: skip


def killed_after(words: Sequence[str], seconds: float | None) -> int:
    """Run a command, killed with all its children if it takes longer; its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, text=True, **quiet)  # type: ignore[call-overload]
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return -signal.SIGKILL
    if process.returncode:
        print(said)
    return int(process.returncode)


def differences(found: Path, expected: Path) -> list[str]:
    """Names of products that are not the same, or should not be there."""
    ours, theirs = outcome(found), outcome(expected)
    return [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)] + leftovers(found)


def main() -> int:
    """Kill runs until there were enough kills, and their runs are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "soak")
    asked = parser.parse_args()
    shutil.rmtree(asked.work, ignore_errors=True)
    asked.work.mkdir(parents=True)
    drawn, kills, durations = random.Random(asked.seed), 0, {}
    for spec in SPECS:
        start = time.monotonic()
        if killed_after(command(spec, asked.work / spec), None):
            return 1
        durations[spec] = time.monotonic() - start
        print(f"{spec}: undisturbed in {durations[spec]:.0f} s", flush=True)
    for number, spec in enumerate(cycle(SPECS)):
        out, here = asked.work / f"killed-{number}", 0
        # Once the kills are done, the last run is let go to its end.
        while status := killed_after(
            command(spec, out), drawn.uniform(0.05, 0.6) * durations[spec] if kills < asked.kills else None
        ):
            if status != -signal.SIGKILL:
                return 1
            kills, here = kills + 1, here + 1
        if wrong := differences(out, asked.work / spec):
            print(f"{out}: after {here} kills not the same: {', '.join(sorted(wrong))}")
            return 1
        print(f"{spec}: {here} kills, the same bits ({kills} of {asked.kills})", flush=True)
        shutil.rmtree(out)
        if kills >= asked.kills:
            break
    shutil.rmtree(asked.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
