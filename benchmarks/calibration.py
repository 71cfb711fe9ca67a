"""Four ways of taking the same blocks out of a trained network, without training, compared at measured latency.

For each K, ``updp calibrate`` chooses K blocks; then, on these blocks:

- removal: the recipe's activations are removed and what is left is merged; nothing is solved for.
- drop: the residual branch goes, as in layer dropping (Veit et al., 2016): the identity where a block keeps the shape
  of what it is given, else the block's own shortcut; where it has none, a 1x1 convolution of the block's stride, fitted
  by least squares to what the block gives.
- linear: merged operators by plain least squares, block after block on the pruned network's own inputs.
- full: what ``updp calibrate`` does.

All of them are merged networks; accuracies are on labelled images that nothing was fitted to. Results are kept after
each network; the same command goes on where it was stopped. Latencies are measured at the end, all networks in turns;
``--latency-only`` measures them again, for instance when the machine has become quiet.

    python benchmarks/calibration.py mobilenetv2_100 --weights W --data folder:IMAGES --judge folder:LABELLED
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration_page import METHODS, write_pages
from torch import Tensor, nn

from updp.allowed import allow_modules
from updp.artefact import load_state, load_tensors, save_tensors
from updp.calibrate import solve_subnet
from updp.cli.console import err
from updp.cli.progress import ConsoleWatch
from updp.data import ImageSet, loader
from updp.errors import InputError, UpdpError
from updp.files import json_text, sha256, write_text
from updp.flow import Call, FlowModule, Parallel
from updp.measure import environment, measure, speedup
from updp.merging import assemble, merge_blocks
from updp.oracle import count, flow_depth
from updp.packaged import find_weights
from updp.pipeline import Calibration
from updp.pipeline.calibrating import Task
from updp.pipeline.context import Context, open_for
from updp.pipeline.directory import RunDirectory
from updp.pipeline.given import model_with_weights
from updp.pipeline.prepare import Request, choose_device, prepare
from updp.pipeline.run import run
from updp.pipeline.settings import composed_at_start, resolve
from updp.spec import ArchSpec, load_spec
from updp.structure import BoundBlock, bind, evaluating, get_block, set_block
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, build_supernet

VERSION = 1
HALVES = {"all": slice(None), "odd": slice(0, None, 2), "even": slice(1, None, 2)}
"""Of the labelled images, counted from 1: the first is odd."""
_BATCH = 100
_RIDGE = 1e-6  # of the mean of the squares, for the fitted 1x1 convolutions
_ROUNDS = (15, 300)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", help="a shipped spec or the path of a .yaml file")
    parser.add_argument("--weights", required=True, help="trained weights")
    parser.add_argument("--data", required=True, help="images to calibrate on; labels are not used")
    parser.add_argument("--judge", help="labelled images to report on; those of --data if left out")
    parser.add_argument("--half", choices=HALVES, default="all", help="which of them")
    parser.add_argument("--ks", type=int, nargs="+", default=[2, 4, 6, 8], help="how many blocks")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--images", type=int, default=1000, help="how many to calibrate on")
    parser.add_argument("--recipe", help="only this recipe")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="of the spec")
    parser.add_argument(
        "--judge-set", dest="judge_settings", action="append", default=[], metavar="KEY=VALUE",
        help="of the spec, for the labelled images alone: data.crop_pct=1.0",
    )  # fmt: skip
    parser.add_argument("--allow-module", dest="modules", action="append", default=[], metavar="MODULE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", help="of distillation: no or bf16")
    parser.add_argument("--seconds", type=float, default=120.0, help="spent on measuring latencies, roughly")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration")
    parser.add_argument(
        "--work", type=Path, help="for the calibration and the networks; runs/study-NETWORK if left out"
    )
    parser.add_argument("--latency-only", action="store_true", help="measure the latencies of an existing result again")
    return parser


class Study:
    """One network's comparison: what was asked for, and what is known so far."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        spec = resolve(load_spec(asked.spec), asked.settings)
        self.spec = composed_at_start(spec, append=False)
        self.judged_spec = resolve(spec, asked.judge_settings)
        self.weights = find_weights(asked.weights, spec.model.name)
        self.work = asked.work or Path("runs") / f"study-{spec.name}"
        self.file = asked.out / f"{spec.name}.json"
        self.result = self._begun()

    def _begun(self) -> dict[str, Any]:
        """The result so far; of another network, other images or settings it cannot be taken up."""
        asked = self.asked
        identity = {
            "spec": self.spec.name, "spec_hash": self.spec.hash, "weights": self.weights.name,
            "weights_sha256": sha256(self.weights), "data": _shown(asked.data), "images": asked.images,
            "judge": _shown(asked.judge or asked.data), "half": asked.half, "recipe": asked.recipe,
            "settings": asked.settings, "judge_settings": asked.judge_settings, "seed": asked.seed,
        }  # fmt: skip
        if self.file.is_file():
            result: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
            if result["version"] != VERSION or result["identity"] != identity:
                raise InputError(f"{self.file}: is of another study; give another --out, or remove it")
            return result
        if asked.latency_only:
            raise InputError(f"{self.file}: no such result, whose latencies could be measured again")
        return {"version": VERSION, "identity": identity, "baseline": {}, "points": {}}

    def save(self) -> None:
        """Keep what is known; the table and the picture with it."""
        self.asked.out.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json_text(self.result))
        write_pages(self.result, self.file)

    def keep(self, name: str) -> Path:
        """Where a file of the work goes."""
        (self.work / "networks").mkdir(parents=True, exist_ok=True)
        return self.work / "networks" / name

    # --- accuracy ---

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The labelled images to report on, in memory."""
        data = open_for(self.judged_spec, self.asked.judge or self.asked.data)
        images = data.val()
        if not isinstance(images, ImageSet):
            raise InputError(f"{self.asked.judge}: can only be read from end to end; allowed: a folder, npz:PATH")
        chosen = ImageSet(images.images, list(images.indices)[HALVES[self.asked.half]], images.transform, images.mode)
        return list(loader(chosen, _BATCH, train=False))

    def right(self, network: nn.Module) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Of each image, whether the network tells its class."""
        with evaluating(network), torch.inference_mode():
            return torch.cat([network(x).argmax(1) == labels for x, labels in self.batches]).numpy()

    @cached_property
    def baseline_right(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        file = self.keep("baseline.npy")
        if not file.is_file():
            np.save(file, self.right(self.model()))
        found: np.ndarray[Any, np.dtype[np.bool_]] = np.load(file)
        return found

    def accuracy(self, network: nn.Module, name: str) -> dict[str, float]:
        """Top-1, and how far it is from the baseline's on the same images; in percent and points."""
        right = self.right(network)
        np.save(self.keep(f"{name}.npy"), right)
        paired = right.astype(float) - self.baseline_right.astype(float)
        return {
            "top1": 100 * right.mean(), "difference": 100 * paired.mean(),
            "standard_error": 100 * paired.std(ddof=1) / len(paired) ** 0.5,
        }  # fmt: skip

    # --- networks ---

    def model(self) -> nn.Module:
        """The baseline."""
        return model_with_weights(self.spec, self.weights, None).eval()

    def merged(self, subnet: SubnetConfig) -> nn.Module:
        """The subnet, merged as it is: nothing solved for."""
        torch.manual_seed(self.asked.seed)
        return _merged(build_supernet(self.spec, self.model(), resized=True), subnet)

    def network(self, method: str, subnet: SubnetConfig) -> nn.Module:
        """A network of a method's architecture, with its weights if they were kept: for measuring latencies."""
        if method == "drop":
            network, _ = dropped(self.model(), self.spec, subnet, None)
        else:
            network = self.merged(subnet)
        file = self.keep(f"{_name(subnet, method)}.safetensors")
        if file.is_file():
            load_state(network, load_tensors(file)[0], file)
        return network.eval()

    # --- the methods ---

    def calibration(self, k: int) -> RunDirectory:
        """What ``updp calibrate --prune K`` makes: the blocks are chosen and solved for. Damages are measured once."""
        asked = self.asked
        request = Request(
            asked.spec, asked.data, self.work / "calibrated", prune=k, recipe=asked.recipe, weights=asked.weights,
            settings=tuple(asked.settings), seed=asked.seed, threads=asked.threads, device="cpu",
            precision=asked.precision, calibration=Calibration(asked.images),
        )  # fmt: skip
        watch = ConsoleWatch(err)
        directory = prepare(request, watch)
        run(directory, ("baseline", "damage", "calibrate"), watch)
        return RunDirectory.open(directory.path)

    def full(self, context: Context, subnet: SubnetConfig) -> tuple[nn.Module, dict[str, Any]]:
        """Of the calibration, which has these blocks; merged."""
        supernet = context.pruned_network()
        network = assemble(supernet, merge_blocks(supernet))
        return network, {"seconds": (context.run.result("calibrate") or {})["seconds"]}

    def linear(self, context: Context, subnet: SubnetConfig) -> tuple[nn.Module, dict[str, Any]]:
        task = Task.of(context)
        supernet = context.supernet(resized=True).eval()
        plain = dataclasses.replace(task.settings, restore=False)
        solve_subnet(supernet, subnet, task.images, plain)
        return _merged(supernet, subnet), {}

    def removal(self, context: Context, subnet: SubnetConfig) -> tuple[nn.Module, dict[str, Any]]:
        return self.merged(subnet), {}

    def drop(self, context: Context, subnet: SubnetConfig) -> tuple[nn.Module, dict[str, Any]]:
        network, fitted = dropped(self.model(), self.spec, subnet, Task.of(context).images)
        note = f"1x1 convolutions fitted in the place of {', '.join(fitted)}" if fitted else ""
        return network, {"note": note} if note else {}

    # --- the work ---

    def point(self, k: int) -> None:
        """All methods at one K, but for those that are done."""
        point = self.result["points"].setdefault(str(k), {"choices": {}, "rows": {}})
        todo = [method for method in self.asked.methods if method not in point["rows"]]
        if not todo:
            return
        if "full" in point["rows"] and (self.work / "calibrated").is_dir():
            context = Context.of(RunDirectory.open(self.work / "calibrated"), ConsoleWatch(err))
            subnet = SubnetConfig(self.spec.name, point["choices"])
        else:
            context = Context.of(self.calibration(k), ConsoleWatch(err))
            subnet = context.subnet()
        if point["rows"] and point["choices"] != dict(subnet.choices):
            raise InputError(f"{self.file}: K={k} is of other blocks than are chosen now; remove that point, or all")
        self.result["damage_seconds"] = (context.run.result("damage") or {})["seconds"]
        point["choices"] = dict(subnet.choices)
        for method in todo:
            start = time.perf_counter()
            try:
                network, told = getattr(self, method)(context, subnet)
            except NotPossible as error:
                point["rows"][method] = {"note": f"not possible: {error}"}
                self.save()
                continue
            seconds = {"seconds": time.perf_counter() - start} | told
            name = _name(subnet, method)
            save_tensors(self.keep(f"{name}.safetensors"), network.state_dict())
            row = self.accuracy(network, name) | self.cost(network, subnet) | seconds
            point["rows"][method] = row
            print(f"K={k} {method}: top-1 {row['top1']:.2f} ({row['difference']:+.2f} ± {row['standard_error']:.2f})")
            self.save()

    def cost(self, network: nn.Module, subnet: SubnetConfig | None = None) -> dict[str, int]:
        """Multiply-accumulates, parameters and depth."""
        choices = {} if subnet is None else dict(subnet.choices)
        found = count(network, self.spec.input, bind(self.spec, self.model()), choices=choices)
        return {"macs": found.macs, "params": found.params, "depth": found.depth}

    def latencies(self) -> None:
        """Every network against the baseline, all in turns; those of one K and one architecture once for all."""
        rows: dict[str, list[dict[str, Any]]] = {}
        networks: dict[str, nn.Module] = {}
        for k, point in self.result["points"].items():
            subnet = SubnetConfig(self.spec.name, point["choices"])
            for method, row in point["rows"].items():
                if "top1" in row:
                    name = f"{k} {row['macs']} {row['params']} {row['depth']}"
                    rows.setdefault(name, []).append(row)
                    if name not in networks:
                        networks[name] = self.network(method, subnet)
        x = torch.randn(1, *self.spec.input, generator=torch.Generator().manual_seed(0))
        functions = {name: (lambda network=network: network(x)) for name, network in networks.items()}
        baseline = self.model()
        functions = {"baseline": lambda: baseline(x)} | functions
        rounds = _rounds(functions, self.asked.seconds)
        times = measure(functions, rounds=rounds, threads=self.asked.threads)
        for name, alike in rows.items():
            ratio = speedup(times[name], times["baseline"])
            found = {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "ms": times[name].median_ms}
            for row in alike:
                row["latency"] = found
        self.result["baseline"]["latency"] = times["baseline"].to_dict()
        self.result["latency"] = {"environment": environment("cpu", threads=self.asked.threads), "rounds": rounds}
        self.save()

    def work_out(self) -> None:
        """Everything that is not there yet."""
        if not self.asked.latency_only:
            if "top1" not in self.result["baseline"]:
                right = self.baseline_right
                self.result["baseline"] |= {"top1": 100 * right.mean(), "images": len(right)} | self.cost(self.model())
                self.result["environment"] = environment("cpu", threads=self.asked.threads)
                self.save()
            for k in self.asked.ks:
                self.point(k)
        self.latencies()


def _name(subnet: SubnetConfig, method: str) -> str:
    return f"k{len(subnet.pruned):02}-{method}"


def _merged(supernet: Supernet, subnet: SubnetConfig) -> nn.Module:
    supernet.reduce(subnet)
    supernet.free_baseline()
    with evaluating(supernet):
        return assemble(supernet, merge_blocks(supernet)).eval()


def _shown(data: str) -> str:
    """A data set's name without where it is on this machine."""
    kind, colon, path = data.partition(":")
    return f"{kind}{colon}{Path(path).name}" if colon else data


def _rounds(functions: Mapping[str, Any], seconds: float) -> int:
    with torch.inference_mode():
        for function in functions.values():
            function()
        start = time.perf_counter()
        for function in functions.values():
            function()
    once = time.perf_counter() - start
    return min(max(round(seconds / once), _ROUNDS[0]), _ROUNDS[1])


# --- dropping ---


class NotPossible(Exception):
    """A block that cannot be dropped; says why."""


def dropped(model: nn.Module, spec: ArchSpec, subnet: SubnetConfig, images: Any | None) -> tuple[nn.Module, list[str]]:
    """The model without these blocks, and the blocks in whose place a 1x1 convolution had to be fitted.

    Args:
        images: batches to fit on; without them such a convolution is random.
    """
    bound = bind(spec, model)
    standing: dict[str, nn.Module] = {}
    for name in subnet.pruned:
        standing[name] = _in_place_of(bound[name])
    fitted = {name: module for name, module in standing.items() if isinstance(module, nn.Conv2d)}
    if fitted and images is not None:
        _fit(model, fitted, images())
    for name, module in standing.items():
        if isinstance(module, nn.Conv2d):
            module = _as_flow(bound[name], module)
        set_block(model, name, module)
    return model.eval(), list(fitted)


def _in_place_of(block: BoundBlock) -> nn.Module:
    """What is left of a block without its residual branch; a 1x1 convolution, to be fitted, where there is no other."""
    flow = block.flow
    if block.input_shape[1:] == block.output_shape[1:]:
        return FlowModule((), {}, flow.entry)
    parts = flow.named_parts
    sums = [node for node in flow.nodes if isinstance(node, Parallel)]
    if len(sums) == 1:
        branch = min(sums[0].flows, key=lambda nodes: flow_depth(nodes, parts))
        nodes = tuple(n for node in flow.nodes for n in (branch if node is sums[0] else (node,)))
        return FlowModule(nodes, parts, flow.entry, flow.extras)
    if len(block.input_shape) != 4 or flow.entry != "first":
        raise NotPossible(f"{block.name} changes the shape of its tokens")
    strides = {-(-before // after) for before, after in zip(block.input_shape[2:], block.output_shape[2:], strict=True)}
    if len(strides) > 1:
        raise NotPossible(f"{block.name} has different strides")
    return nn.Conv2d(block.input_shape[1], block.output_shape[1], 1, stride=strides.pop())


def _as_flow(block: BoundBlock, conv: nn.Conv2d) -> nn.Module:
    return FlowModule((Call("conv"),), {"conv": conv}, block.flow.entry)


def _fit(model: nn.Module, convs: Mapping[str, nn.Conv2d], batches: Iterator[Tensor]) -> None:
    """Least squares in float64 of each convolution to its block, on what the baseline gives the block."""
    squares: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, y: Tensor) -> None:
        stride = convs[name].stride[0]
        rows = x[:, :, ::stride, ::stride].movedim(1, -1).flatten(0, -2).double()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
        squares[name] = squares.get(name, 0) + rows.T @ rows
        products[name] = products.get(name, 0) + rows.T @ y.movedim(1, -1).flatten(0, -2).double()

    handles = [
        get_block(model, name).register_forward_hook(lambda _, args, y, name=name: add(name, args[0], y))
        for name in convs
    ]
    with evaluating(model), torch.no_grad():
        for batch in batches:
            model(batch)
        for name, conv in convs.items():
            ridge = _RIDGE * squares[name].diagonal().mean() * torch.eye(len(squares[name]), dtype=torch.float64)
            solution = torch.linalg.solve(squares[name] + ridge, products[name])
            conv.weight.copy_(solution[:-1].T[:, :, None, None])
            conv.bias.copy_(solution[-1])
    for handle in handles:
        handle.remove()


def main(words: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit status is 2 for bad input."""
    asked = arguments().parse_args(words)
    try:
        with allow_modules(*asked.modules):
            choose_device("cpu", asked.threads)
            Study(asked).work_out()
    except UpdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
