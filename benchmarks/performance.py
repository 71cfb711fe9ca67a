"""All results of docs/performance.md: `updp bench` on the papers' networks, one file each; resumable.

    python benchmarks/performance.py [runtimes] [papers] [layers] [--seconds S] [--out DIR] [--page]

``runtimes``: five networks against every runtime, batch 1 and 8, one and two threads. ``papers``: every shipped subnet
against its unpruned network in the same runtimes, batch 1, 8 and 32. ``layers``: every different layer of the merged
networks, batch 1 and 8. A result that is there is not measured again: delete it, or give another folder. Each network
has a process of its own; what `updp.deploy` measures is not taken from earlier plans unless UPDP_CACHE is set. Needs
`updp[bench]` and a quiet machine. In the end the page is written, from whatever results there are; --page does nothing
else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import performance_page

from updp.subnet import list_subnets

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"
PARTS = ("runtimes", "papers", "layers")
FIVE = [
    ("resnet34", "updp_p10"), ("mobilenetv2_140", "ds_f"), ("convnext_tiny", "all:full"), ("convnext_tiny", "updp_p9"),
    ("deit_tiny_patch16_224", "updp_p6"),
]  # fmt: skip
IN_SAME = "torch,deployed,onnxruntime,openvino"
"""Runtimes in which pruned networks are held against unpruned ones."""


@dataclass(frozen=True)
class Job:
    """One call of `updp bench`, and the file that it writes."""

    file: Path
    arguments: Sequence[str]


def jobs(part: str, out: Path, seconds: float, runtimes: str | None = None) -> Iterator[Job]:
    """What a part consists of."""
    shipped = [(spec, subnet) for spec, _, subnet in (name.partition("/") for name in list_subnets())]
    if part == "layers":
        for batch in (1, 8):
            for spec, subnet in [*shipped, FIVE[2]]:
                options = ["--layers", "--batch", str(batch), "--seconds", str(seconds / 60)]
                yield _job(out / part / f"batch{batch}", spec, subnet, options, ".layers")
        return
    batches, threads, chosen = ("1,8", "1,2", None) if part == "runtimes" else ("1,8,32", "1", IN_SAME)
    options = ["--batch", batches, "--threads", threads, "--seconds", str(seconds)]
    if named := runtimes or chosen:
        options += ["--runtimes", named]
    for spec, subnet in FIVE if part == "runtimes" else shipped:
        yield _job(out / part, spec, subnet, options)


def _job(folder: Path, spec: str, subnet: str, options: Sequence[str], suffix: str = "") -> Job:
    file = folder / f"{spec}-{subnet.replace(':', '_')}{suffix}.json"
    return Job(file, ["bench", spec, "--subnet", subnet, *options, "--out", str(folder)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, then the page; the number of calls that failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--seconds", type=float, default=30.0, help="roughly, of timing for each table")
    parser.add_argument("--runtimes", help="only these, with commas between")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"got {', '.join(sorted(unknown))}, allowed: {', '.join(PARTS)}")
    failed = 0
    if not options.page:
        with tempfile.TemporaryDirectory() as cache:
            environment = {"UPDP_CACHE": cache, **os.environ}
            for part in options.parts or PARTS:
                for job in jobs(part, options.out, options.seconds, options.runtimes):
                    failed += not _done(job, environment)
    page = PAGE if options.out == RESULTS else options.out / PAGE.name
    page.write_text(performance_page.page(options.out), encoding="utf-8")
    print(page)
    return min(failed, 1)


def _done(job: Job, environment: dict[str, str]) -> bool:
    """Whether the result is there, now or before."""
    if job.file.exists():
        print(f"{job.file}: is there")
        return True
    done = subprocess.run([sys.executable, "-m", "updp", *job.arguments], cwd=ROOT, env=environment)
    return done.returncode == 0 and job.file.exists()


if __name__ == "__main__":
    sys.exit(main())
