"""The stages that train and search: ``baseline``, ``supernet``, ``search``, ``finetune``.

Each is a function of the context that leaves its products in the run directory and returns its result.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from updp import processes
from updp.data import loader
from updp.errors import InputError
from updp.files import sha256
from updp.oracle import Score
from updp.pipeline.context import Context, figures, workers_for
from updp.pipeline.given import model_with_weights
from updp.search import CachedOracle, PrefixEvaluator, SharedOracle, planned_evaluations, search
from updp.supernet import Supernet
from updp.train import Plain, Progressive, Sandwich, Teacher


class _Scoring:
    """Scores a network after each epoch and remembers the last score."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.last: Score | None = None

    def __call__(self, network: nn.Module) -> Mapping[str, float]:
        self.last = self.context.score(network, "scoring")
        return {"top1": self.last.top1}

    def of(self, network: nn.Module) -> Score:
        """The last score, or one made now where training had no epoch."""
        return self.last or self.context.score(network, "scoring")


def baseline(context: Context) -> dict[str, Any]:
    """Train the network as it is, or take the weights that were given."""
    start, scoring = time.perf_counter(), _Scoring(context)
    given = context.run.record.weights
    history: list[dict[str, Any]] = []
    if given is None:
        model = context.new_model()
        fitted = context.fit("baseline", model, Plain(), scoring)
        history, start = fitted.history, start - fitted.earlier
    else:
        model = _given(context, given)
    score = context.told(model) if scoring.last is None else figures(scoring.last)
    context.save(model, "baseline")
    return {
        **score, "epochs": len(history), "weights": given, "seconds": time.perf_counter() - start,
        "history": history,
    }  # fmt: skip


def _given(context: Context, given: Mapping[str, str]) -> nn.Module:
    file = Path(given["file"])
    if not file.is_file() or sha256(file) != given["sha256"]:
        raise InputError(f"{file}: is not there any more, or not the file that the run began with")
    return model_with_weights(context.spec, file, context.judged)


def supernet(context: Context) -> dict[str, Any]:
    """Train all choices together: the sandwich rule."""
    start, recipe = time.perf_counter(), context.run.record.recipe
    network = context.supernet()
    fitted = context.fit("supernet", network, Sandwich(recipe=recipe))
    context.save(network, "supernet")
    tops = {}
    calibration = context.calibration()
    for name, subnet in (("top1_keep", network.all_keep()), ("top1_pruned", network.all_pruned(recipe))):
        network.set_subnet(subnet)
        network.calibrate(calibration)
        tops[name] = context.score(network, "scoring").top1
    return {
        **tops,
        "epochs": len(fitted.history),
        "history": fitted.history,
        "seconds": time.perf_counter() - start + fitted.earlier,
    }


def find(context: Context) -> dict[str, Any]:
    """Find the best subnet with exactly so many pruned blocks, scored on held-out training images."""
    start, record = time.perf_counter(), context.run.record
    network = context.trained_supernet().to(context.accelerator.device).eval()
    evaluator = _evaluator(context, network)
    file = context.run.file("search", "scores.jsonl") if context.is_main else None
    oracle = CachedOracle(SharedOracle(evaluator, evaluator.order), file, _data_key(context))
    choices = {name: network.default_choice(name, record.recipe) for name in network.available}
    assert record.prune is not None
    settings = context.spec.schedule.search
    shares = processes.agreed(evaluator.reason is None)
    planned = planned_evaluations(len(choices), record.prune, settings)
    with context.watch.task("search", planned) as advance:
        found = search(
            oracle, choices, record.prune, settings, context.seed, spec=context.spec.name,
            exhaustive=None if shares else False,  # enumeration pays where prefixes are shared
            on_generation=lambda generation: advance(generation.evaluations),
        )  # fmt: skip
    if context.is_main:
        found.best.save(context.run.file("search", "subnet.json"))
    return {
        "best": {"top1": found.score.top1, "loss": found.score.loss}, "candidates_scored": found.evaluations,
        "block_evaluations": found.block_evaluations, "unshared_because": evaluator.reason,
        "exhaustive": found.exhaustive, "seconds": time.perf_counter() - start,
        "history": [vars(generation) for generation in found.history],
    }  # fmt: skip


def _evaluator(context: Context, network: Supernet) -> PrefixEvaluator:
    schedule = context.spec.schedule
    images = context.data.held_out(schedule.held_out, context.seed).first(schedule.search.images)
    chunks = list(loader(images, schedule.search.chunk, train=False, workers=workers_for(context.spec)))
    return PrefixEvaluator(network, chunks, context.calibration(), context.accelerator.device)


def _data_key(context: Context) -> str:
    """Names all that a score depends on besides the subnet."""
    schedule, record = context.spec.schedule, context.run.record
    parts = [
        context.data.describe(), sha256(context.run.file("supernet", "weights.safetensors")), schedule.held_out,
        vars(schedule.search), record.seed, record.threads, record.device,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _teacher(context: Context) -> Teacher | None:
    settings = context.spec.schedule.teacher
    return Teacher(context.baseline_model(), settings) if settings.weight else None


def finetune(context: Context) -> dict[str, Any]:
    """Train the subnet, from the baseline's blocks to the pruned ones: as they are at first, or calibrated."""
    start, scoring = time.perf_counter(), _Scoring(context)
    record = context.run.record
    calibrated = record.calibration is not None or record.init is not None
    network = context.calibrated_supernet() if calibrated else context.supernet()
    blend = context.spec.schedule.blend
    if calibrated:  # solved blocks do their work already: blended in, they would wait while the old ones are trained
        blend = replace(blend, mode="direct")
    policy = Progressive(context.subnet(), blend, context.calibration(), _teacher(context))
    fitted = context.fit("finetune", network, policy, scoring)
    score = scoring.of(network)
    context.save(network, "finetune")
    return {
        "top1": score.top1, "top5": score.top5, "loss": score.loss, "epochs": len(fitted.history),
        "seconds": time.perf_counter() - start + fitted.earlier, "history": fitted.history,
    }  # fmt: skip
