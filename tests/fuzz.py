"""Thousands of files made wrong on purpose: each must be answered by success or one message, in time and in memory.

    python tests/fuzz.py --specs 20000 --subnets 5000 --artefacts 5000 --npz 5000 --runs 2000

Case N of a kind depends on the seed, the kind and N alone: `--specs 1 --first N` does it again. Each kind is read in a
process of its own, which is killed when it hangs. What another answer was given to is kept in the folder of findings
(and, once it is mended, in tests/corpus, where `make test` reads it again). The exit status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
SECONDS = 5.0  # of the processor; of the clock three times as many, as others may be at work
PATIENCE = 3
MEMORY = 1 << 30  # more than what the process had before
CEILING = 4 << 30  # of addresses, so that the machine lives
COUNTS = {"specs": 20_000, "subnets": 5_000, "artefacts": 5_000, "npz": 5_000, "runs": 2_000}


@dataclass
class Tally:
    """What became of the cases of one kind."""

    answers: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    largest: int = 0


# --- one case, in the process that reads ------------------------------------------------------------------------------


def answer(read: Callable[[str, bytes], None], name: str, content: bytes) -> tuple[str, float, int]:
    """What reading a file comes to: `read`, `refused`, or the words of a finding; seconds and bytes that it took."""
    from updp.errors import UpdpError

    before, start = _memory("VmRSS"), time.process_time()
    _forget_peak()
    try:
        read(name, content)
        word = "read"
    except UpdpError as error:
        word = "refused" if str(error).strip() else "refused without a word"
    except (Exception, RecursionError) as error:
        word = _words_of(error)
    seconds, memory = time.process_time() - start, max(0, _memory("VmHWM") - before)
    if seconds > SECONDS:
        word = f"took {seconds:.1f} s, allowed: {SECONDS:g}"
    elif memory > MEMORY:
        word = f"took {memory >> 20} MiB, allowed: {MEMORY >> 20}"
    return word, seconds, memory


def _words_of(error: BaseException) -> str:
    """An error and the last place in updp that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/updp/" in frame.filename]
    at = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {at}: {str(error)[:300]}"


def _memory(name: str) -> int:
    """A figure of /proc in bytes; 0 where there is none."""
    try:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    except (OSError, TypeError):
        return 0


def _forget_peak() -> None:
    """Let the largest memory so far be the present one."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def mutant(kind: Any, seed: int, number: int) -> tuple[str, bytes]:
    """The file of a case: its name and its content."""
    return kind.mutated(Random(f"{seed}/{kind.name}/{number}"))


def _work(make: Callable[[Path], Any], seed: int, numbers: range, pipe: Connection) -> None:
    """Read the files of these cases; said before each, which it is, and after each, what it came to."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    with tempfile.TemporaryDirectory() as folder:
        kind = make(Path(folder))
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + CEILING,) * 2)
        try:
            for number in numbers:
                name, content = mutant(kind, seed, number)
                pipe.send(number)
                pipe.send(answer(kind.read, name, content))
            pipe.send(None)
        except Exception:  # a mistake in here, not in what is tried
            pipe.send(traceback.format_exc())


# --- all cases --------------------------------------------------------------------------------------------------------


def fuzz(make: Callable[[Path], Any], seed: int, numbers: range, keep: Path) -> Tally:
    """Read the files of these cases in a process that is begun anew where one hangs or dies.

    Args:
        keep: where the files of findings are written to.
    """
    tally, start = Tally(), time.monotonic()
    while numbers:
        numbers = _until_it_dies(make, seed, numbers, keep, tally)
    tally.seconds = time.monotonic() - start
    return tally


def _until_it_dies(make: Callable[[Path], Any], seed: int, numbers: range, keep: Path, tally: Tally) -> range:
    """The cases that are left when the process has ended."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(make, seed, numbers, theirs), daemon=True)
    process.start()
    theirs.close()
    at = numbers.start - 1
    try:
        while (told := ours.recv()) is not None:
            if isinstance(told, str):
                raise RuntimeError(told)
            at = told
            if not ours.poll(PATIENCE * SECONDS):
                word, seconds, memory = f"hung for {PATIENCE * SECONDS:g} s", PATIENCE * SECONDS, 0
            else:
                word, seconds, memory = ours.recv()
            _note(make, seed, at, word, keep, tally)
            tally.slowest, tally.largest = max(tally.slowest, seconds), max(tally.largest, memory)
            if word.startswith("hung"):
                break
            if at % 2000 == 1999:
                print(f"... {at + 1}: {dict(tally.answers)}", flush=True)
    except EOFError:
        if at < numbers.start:
            raise RuntimeError("the process ended before it read anything") from None
        _note(make, seed, at, "the process died", keep, tally)
    finally:
        process.kill()
        process.join()
    return range(at + 1, numbers.stop)


def _note(make: Callable[[Path], Any], seed: int, number: int, word: str, keep: Path, tally: Tally) -> None:
    """Count an answer; of a finding, keep the file and say it."""
    tally.answers[word if word in ("read", "refused") else "finding"] += 1
    if word in ("read", "refused"):
        return
    alike = re.sub(r"\d+", "N", word.partition(": ")[0])
    seen = sum(alike in finding for finding in tally.findings)
    tally.findings.append(f"{alike} | case {number}: {word}")
    if seen < 3:  # three of a kind are enough to mend it
        with tempfile.TemporaryDirectory() as folder:
            name, content = mutant(make(Path(folder)), seed, number)
        keep.mkdir(parents=True, exist_ok=True)
        file = keep / f"{hashlib.sha256(content).hexdigest()[:8]}--{name}"
        file.write_bytes(content)
        print(f"FOUND case {number}: {word}\n      {file}", flush=True)


def main() -> int:
    """All kinds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"cases; {count} if no count is given, else none")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "fuzz", help="folder of findings")
    asked = parser.parse_args()
    from fuzz_kinds import KINDS

    counts = {name: getattr(asked, name) for name in COUNTS}
    if all(count is None for count in counts.values()):
        counts = COUNTS
    found = 0
    for name, count in counts.items():
        if count:
            tally = fuzz(KINDS[name], asked.seed, range(asked.first, asked.first + count), asked.keep / name)
            found += len(tally.findings)
            words = ", ".join(f"{number} {word}" for word, number in sorted(tally.answers.items()))
            print(f"{name}: {count} cases in {tally.seconds:.0f} s: {words}; the slowest {tally.slowest:.1f} s, "
                  f"the largest {tally.largest >> 20} MiB", flush=True)  # fmt: skip
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
