"""The stage ``merge``: the merged network, its proof, what it costs, what it gains."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from updp.artefact import save_network, source_path
from updp.certificate import Certificate, certify, merge
from updp.errors import CertificateError
from updp.exporting import export_network
from updp.measure import LatencyTable, compare, environment
from updp.oracle import Count, count
from updp.pipeline.context import Context
from updp.structure import BoundBlock, evaluating, get_block
from updp.supernet import KEEP, Supernet
from updp.train.cost import training_costs, training_steps

_NETWORK_SECONDS, _BLOCK_SECONDS, _TRAINING_SECONDS = 6.0, 0.3, 10.0  # spent on timing, roughly
_TRAINING_PIXELS = 8 * 224 * 224  # of the largest batch that training steps are measured with on a CPU


def finish(context: Context) -> dict[str, Any]:
    """Merge the finetuned network, prove it, save it, and compare it with the baseline.

    Raises:
        CertificateError: the merged network is not the network that it was made from. Nothing is saved then.
    """
    start = time.perf_counter()
    source = context.pruned_network()
    network, certificate, random = merge_certified(source)
    unmerged, merged = context.told(source), context.told(network)
    before, after = _counts(context, network)
    times = latencies(context, network)
    steps = _training_costs(context, network)
    files = _save(context, network, source, (certificate, random))
    return {
        "top1_unmerged": unmerged["top1"], **merged,
        "certificate": certificate.to_json(), "certificate_random": random.to_json(),
        "before": before.to_json(), "after": after.to_json(), **times, "training": steps,
        "files": [str(file.relative_to(context.run.path)) for file in files],
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def merge_certified(source: Supernet) -> tuple[nn.Module, Certificate, Certificate]:
    """A merged network with two certificates: of its own weights, and of random ones.

    Raises:
        CertificateError: one of them does not hold.
    """
    source = source.cpu()
    network, given = merge(source)
    random = certify(source, weights="random")
    for certificate in (given, random):
        if not certificate.ok:
            failures = certificate.failures()
            shown = "\n".join(f"  {failure}" for failure in failures[:10])
            raise CertificateError(f"the certificate does not hold on {certificate.weights} weights:\n{shown}")
    return network, given, random


def _save(
    context: Context, network: nn.Module, source: Supernet, certificates: tuple[Certificate, Certificate]
) -> list[Path]:
    """Write the products; returns them."""
    target = context.run.file("merge", "merged.safetensors")
    files = [target, source_path(target)]
    network = network.cpu()
    if context.is_main:
        save_network(target, network, source.cpu(), *certificates)
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        context.watch.on_note("no ONNX file: onnx is not installed (pip install 'updp[export]')")
        return files
    onnx = context.run.file("merge", "merged.onnx")
    if context.is_main:
        with context.watch.task("onnx", None):
            export_network(network, context.spec.input, onnx, "onnx")
    return [*files, onnx]


def _counts(context: Context, network: nn.Module) -> tuple[Count, Count]:
    """Cost of the baseline and of the merged network."""
    model = context.new_model()
    supernet = context.supernet()
    choices = {name: context.subnet().choice(name) for name in supernet.bound}
    before = count(model, context.spec.input, supernet.bound)
    return before, count(network, context.spec.input, supernet.bound, choices=choices)


# --- time -------------------------------------------------------------------------------------------------------------


def latencies(context: Context, merged: nn.Module) -> dict[str, Any]:
    """Latency at batch 1, baseline against merged in turns: of the whole network and of each block."""
    device = context.accelerator.device
    supernet = context.supernet()
    baseline, merged = context.baseline_model().to(device).eval(), merged.to(device).eval()
    x = torch.randn(1, *context.spec.input, device=device)
    title = "measuring"
    with (
        context.watch.task(title, len(supernet.bound) + 1) as advance,
        evaluating(baseline, merged),
        _old_objects_aside(),
    ):
        rows = compare({"baseline": lambda: baseline(x), "merged": lambda: merged(x)}, _NETWORK_SECONDS, device)
        blocks = []
        for done, (name, bound) in enumerate(supernet.bound.items(), 1):
            advance(done)
            choice = context.subnet().choice(name)
            blocks.append({"block": name, "choice": choice, **_block_rows(baseline, merged, bound, choice, device)})
    table = LatencyTable(environment(device), tuple(rows.values()))
    return {"latency": table.to_dict(), "block_latency": blocks}


def _training_costs(context: Context, merged: nn.Module) -> dict[str, Any] | None:
    """What the steps of this run's trainings cost; None where it did none, or several processes did them."""
    accelerator, settings, spec = context.accelerator, context.spec.schedule.finetune, context.spec
    if "finetune" not in context.run.record.stages or accelerator.num_processes > 1:
        return None
    images = settings.batch_size
    if accelerator.device.type == "cpu":
        images = max(2, min(images, _TRAINING_PIXELS // (spec.input[1] * spec.input[2])))
    classes = context.run.record.num_classes
    batch = torch.randn(images, *spec.input), torch.arange(images) % classes
    with context.watch.task("costs", None), _old_objects_aside():
        steps = training_steps(
            context.supernet(), context.subnet(), merged, settings, batch, accelerator,
            recipe=context.run.record.recipe,
        )  # fmt: skip
        rows = training_costs(steps, _TRAINING_SECONDS, accelerator.device)
    accelerator.free_memory()
    return {"batch_size": images, "precision": context.run.record.precision, "rows": rows}


@contextmanager
def _old_objects_aside() -> Iterator[None]:
    """Each measurement collects garbage first; what is there already need not be looked through every time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _block_rows(
    baseline: nn.Module, merged: nn.Module, bound: BoundBlock, choice: str, device: torch.device
) -> dict[str, Any]:
    """A block before and after; a block that is kept is the same before and after."""
    x = torch.randn(1, *bound.input_shape[1:], device=device)
    block = get_block(baseline, bound.name)
    functions: dict[str, Callable[[], object]] = {"before": lambda: block(x, *bound.args, **bound.kwargs)}
    if choice != KEEP:
        after = get_block(merged, bound.name)
        functions["after"] = lambda: after(x)
    rows = compare(functions, _BLOCK_SECONDS, device)
    same = rows["before"].to_dict()
    return {"before": same, "after": rows["after"].to_dict() if "after" in rows else {**same, "name": "after"}}
