"""A very deep network through everything that updp does to a network, with time and memory of each step.

The network is ResNet-1202 of He et al. (2015) for CIFAR-10: 600 blocks, made by the function of examples/cifar_resnet.
Half of the blocks, drawn at random, are pruned. Weights and images are random: accuracy is not the question here.

    PYTHONPATH=examples/cifar_resnet python benchmarks/depth.py --out benchmarks/results/depth
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from updp import artefact
from updp.allowed import allow_modules
from updp.certificate import certify, merge
from updp.conformance import check_spec
from updp.files import json_text, write_text
from updp.measure import environment
from updp.pipeline.settings import resolve
from updp.search import PrefixEvaluator
from updp.spec import ArchSpec, TrainSettings, load_spec
from updp.supernet import build_supernet
from updp.train import Sandwich, create_accelerator
from updp.train.cost import Step

SPEC = Path(__file__).parents[1] / "examples" / "cifar_resnet" / "resnet56_cifar10.yaml"
MODULE = "cifar_resnet"
IMAGES, SUBNETS = 16, 4


@dataclass
class Row:
    """What a step took."""

    step: str
    seconds: float
    peak_gb: float


class Clock:
    """Keeps the time of steps, and the process's largest memory so far."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, step: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        self.rows.append(Row(step, time.perf_counter() - start, peak))
        print(f"{step:44} {self.rows[-1].seconds:7.1f} s   {peak:.2f} GB", flush=True)
        return result


def images() -> Tensor:
    """Random images of CIFAR's size."""
    return torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def work(spec: ArchSpec, clock: Clock) -> Iterator[str]:
    """Every step once; gives what should be said about the network."""
    report = clock("check: the spec against the network", lambda: check_spec(spec))
    network = clock("supernet: build", lambda: build_supernet(spec, seed=0))
    yield f"{len(network.available)} blocks as the spec declares them: largest difference {report.worst:.0e}"
    labels = torch.arange(IMAGES) % 10
    accelerator = create_accelerator(cpu=True)
    step = Step(network, Sandwich(), TrainSettings(1, lr=1e-3), (images(), labels), accelerator)
    clock(f"supernet: a sandwich step, {IMAGES} images", step)
    accelerator.free_memory()
    half = len(network.available) // 2
    subnets = [network.sample(torch.Generator().manual_seed(seed), half) for seed in range(SUBNETS)]
    batches = [images()]
    oracle = clock("search: prepare", lambda: PrefixEvaluator(network.eval(), [(images(), labels)], batches))
    yield f"prefixes are shared: {oracle.reason or 'yes'}"
    clock(f"search: score {SUBNETS} subnets on {IMAGES} images", lambda: oracle.score(subnets))
    network.set_subnet(subnets[0])
    clock(f"calibrate the norms of {half} pruned blocks", lambda: network.calibrate(batches))
    network.reduce(subnets[0])
    network.free_baseline()
    network.resize(1.0)
    merged, given = clock("merge, with the certificate of its weights", lambda: merge(network.cpu()))
    random = clock("certificate of random weights", lambda: certify(network, weights="random"))
    yield f"certificates hold: {given.ok and random.ok}; worst operator {max(given.worst, random.worst):.0e}"
    yield f"logits, random weights: {random.logits:.0e} (rounding alone: {random.rounding:.0e})"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "merged.safetensors"
        clock("save", lambda: artefact.save_network(file, merged, network, given, random))
        verified = clock("verify the saved file", lambda: artefact.verify(file))
    yield f"verified: {verified.ok}"


def main() -> None:
    """Do the work, and write OUT/resnet1202.json and OUT/resnet1202.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=200, help="of each of the three stages")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    layers = 6 * asked.blocks + 2
    clock = Clock()
    with allow_modules(MODULE):
        spec = resolve(load_spec(str(SPEC)), [f"model.blocks={asked.blocks}"])
        notes = list(work(spec, clock))
    machine = environment("cpu", threads=asked.threads)
    rows = [vars(row) for row in clock.rows]
    asked.out.mkdir(parents=True, exist_ok=True)
    write_text(asked.out / f"resnet{layers}.json", json_text({"environment": machine, "notes": notes, "rows": rows}))
    table = "\n".join(f"| {row.step} | {row.seconds:.1f} | {row.peak_gb:.2f} |" for row in clock.rows)
    said = "\n".join(f"- {note}" for note in notes)
    write_text(
        asked.out / f"resnet{layers}.md",
        f"# A network of {layers:,} layers\n\n| step | seconds | largest memory so far, GB |\n| --- | ---: | ---: |\n"
        f"{table}\n\n{said}\n- {machine['cpu']}, {machine['threads']} thread; updp {machine['updp']}, torch "
        f"{machine['torch']}, timm {machine['timm']}, Python {machine['python']}.\n",
    )


if __name__ == "__main__":
    main()
