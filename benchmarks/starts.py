"""Two ways to begin finetuning a pruned network: as the papers do, and from solved operators.

For each network and seed, a baseline is trained, half of its blocks are drawn at random, and the same subnet is
finetuned under the same settings from every start:

- papers: the baseline's weights, operators merged in the end, blend from 0 to 1 (UPDP's progressive training).
- papers, direct: the same, with blend 1 from the first step.
- calibrated: operators merged at the start and solved for on training images without labels, blend from 0 to 1.
- calibrated, direct: the same, with blend 1 from the first step.

Along the way, copies of the network are taken, brought to blend 1, given norm statistics of the images that finetuning
calibrates on, and scored: the network that one would have on stopping there. Training does not notice. Trained
baselines and finished rows are kept; the same command goes on where it was stopped.

    python benchmarks/starts.py --out benchmarks/results/starts
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from starts_page import write_pages
from torch import Tensor, nn

from updp.artefact import load_state, load_tensors, save_tensors
from updp.calibrate import SolveSettings, solve_subnet
from updp.data import Data, data_config, loader, open_data
from updp.files import json_text, read_json, write_text
from updp.frozen import FrozenMap
from updp.measure import environment
from updp.oracle import evaluate
from updp.spec import ArchSpec, load_spec
from updp.structure import create_model
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, build_supernet
from updp.train import Plain, Progressive, create_accelerator, fit
from updp.train.session import Session, derive_seed

NETWORKS = {"convnext_digits": 5, "deit_digits": 3}
"""Network -> how many of its blocks are pruned: half of them, as `make demo` does."""
STARTS = ("papers", "papers, direct", "calibrated", "calibrated, direct")
PARTS = (0.0, 0.01, 0.05, 0.2, 1.0)
"""Of the optimizer steps of finetuning: where the network is scored."""
_BATCH = 128
_SOLVE_BATCH = 64


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results: OUT.json, OUT.md, OUT.svg and OUT.png")
    parser.add_argument("--work", type=Path, default=Path("runs/starts"), help="where trained baselines are kept")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--recipe", help="instead of each block's default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pages-only", action="store_true", help="write table and picture from OUT.json again")
    return parser


def main() -> None:
    """Do what is not done yet, then write the pages."""
    asked = arguments().parse_args()
    torch.set_num_threads(1)
    file = asked.out.with_suffix(".json")
    result = read_json(file) if file.is_file() else {"version": 1, "rows": []}
    done = {(row["network"], row["recipe"], row["seed"], row["start"]) for row in result["rows"]}
    if not asked.pages_only:
        result["environment"] = environment("cpu")
        for seed in asked.seeds:
            for name in asked.networks:
                study = Study(name, asked.recipe, seed, asked.work)
                for start in asked.starts:
                    if (name, study.recipe, seed, start) not in done:
                        result["rows"].append(study.run(start))
                        write_text(file, json_text(result))
                        print(json.dumps(result["rows"][-1]), flush=True)
    write_pages(result, asked.out)


class Study:
    """One network under one seed: its baseline, the blocks that are pruned, and the images."""

    def __init__(self, name: str, recipe: str | None, seed: int, work: Path) -> None:
        self.name, self.seed = name, seed
        self.spec = load_spec(name)
        self.data: Data = open_data("digits", input=self.spec.input, config=data_config(self._new(), self.spec.data))
        # Collected once: what a loader draws from the global random state must not depend on who is scored.
        self.judged = list(loader(self.data.val(), _BATCH, train=False, workers=0))
        search, held_out = self.spec.schedule.search, self.spec.schedule.held_out
        images = self.data.calibration(search.calibration_images, seed, held_out=held_out)
        self.calibration = [x for x, _ in loader(images, _BATCH, train=False, workers=0)]
        images = self.data.calibration(1 << 30, seed, held_out=held_out)
        self.training = [x for x, _ in loader(images, _SOLVE_BATCH, train=False, workers=0)]
        self.baseline = self._baseline(work / f"{name}-{seed}.safetensors")
        self.subnet = self._draw(recipe)
        (self.recipe,) = set(self.subnet.choices.values())

    def _new(self) -> nn.Module:
        return create_model(self.spec, num_classes=10, seed=self.seed)

    def _baseline(self, file: Path) -> dict[str, Tensor]:
        if not file.is_file():
            model = self._new()
            self.fit(model, "baseline", Plain())
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, model.state_dict())
        return load_tensors(file)[0]

    def _draw(self, recipe: str | None) -> SubnetConfig:
        """Blocks at random: neither start has chosen them."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "starts"))
        return self.supernet(self.spec).sample(generator, NETWORKS[self.name], recipe)

    def supernet(self, spec: ArchSpec, *, resized: bool = False) -> Supernet:
        """Of the trained baseline."""
        model = self._new()
        load_state(model, self.baseline, Path(self.name))
        torch.manual_seed(derive_seed(self.seed, "supernet"))
        return build_supernet(spec, model, resized=resized)

    def fit(self, network: nn.Module, stage: str, policy: Any) -> None:
        """As the stage of a run does."""
        schedule = self.spec.schedule
        settings = getattr(schedule, stage)
        images = self.data.train(settings, seed=self.seed, held_out=schedule.held_out)
        seed = derive_seed(self.seed, stage)
        batches = loader(images, settings.batch_size, train=True, seed=seed, workers=0)
        accelerator: Accelerator = create_accelerator(cpu=True)
        fit(network, batches, settings, policy, accelerator=accelerator, seed=seed)

    def top1(self, network: nn.Module) -> float:
        """In percent."""
        return evaluate(network, self.judged).top1

    def run(self, start: str) -> dict[str, Any]:
        """Finetune from one start; a row of the results."""
        begun = time.perf_counter()
        network = self.calibrated() if start.startswith("calibrated") else self.supernet(self.spec)
        solved = time.perf_counter() - begun
        blend = self.spec.schedule.blend
        if start.endswith("direct"):
            blend = dataclasses.replace(blend, mode="direct")
        network.set_subnet(network.all_keep())
        baseline = self.top1(network)
        network.set_subnet(self.subnet)
        policy = Watched(self, Progressive(self.subnet, blend, self.calibration))
        points = {"0": policy.score(network, calibrate=False)} if start.startswith("calibrated") else {}
        self.fit(network, "finetune", policy)
        return {
            "network": self.name, "recipe": self.recipe, "seed": self.seed, "start": start, "baseline": baseline,
            "blocks": list(self.subnet.pruned), "solve_seconds": solved, "points": {**policy.points, **points},
            "top1": self.top1(network), "seconds": time.perf_counter() - begun,
        }  # fmt: skip

    def calibrated(self) -> Supernet:
        """The subnet's operators solved for, on all training images, without labels."""
        recipes = {name: dataclasses.replace(recipe, compose="start") for name, recipe in self.spec.recipes.items()}
        network = self.supernet(dataclasses.replace(self.spec, recipes=FrozenMap(recipes)), resized=True)
        solve_subnet(network, self.subnet, lambda: iter(self.training), SolveSettings(seed=self.seed))
        return network


class Watched(Progressive):
    """Progressive training, with a look at the network at some of its steps."""

    def __init__(self, study: Study, policy: Progressive) -> None:
        super().__init__(policy.subnet, policy.settings, policy.calibration)
        self.study = study
        self.points: dict[str, float] = {}

    def before_step(self, session: Session, position: float) -> None:
        super().before_step(session, position)
        total = session.settings.epochs * session.steps_per_epoch
        for part in PARTS[:-1]:
            if session.updates == round(part * total) and f"{part:g}" not in self.points:
                self.points[f"{part:g}"] = self.score(cast(Supernet, session.result))

    def after_training(self, session: Session) -> None:
        super().after_training(session)
        self.points["1"] = self.score(cast(Supernet, session.result), calibrate=False)

    def score(self, network: Supernet, *, calibrate: bool = True) -> float:
        """Top-1 of the network as it would be if training stopped here."""
        with torch.random.fork_rng():
            network = copy.deepcopy(network).eval()
            network.set_blend(1.0)
            network.resize(1.0)
            if calibrate:
                network.calibrate(self.calibration)
            return self.study.top1(network)


if __name__ == "__main__":
    main()
