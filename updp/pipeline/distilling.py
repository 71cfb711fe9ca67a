"""Distillation of a calibrated network: all of its weights learn the baseline's features, on the same images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from updp import processes
from updp.calibrate import divergence
from updp.data import ImageSet
from updp.pipeline.context import Context
from updp.structure import evaluating
from updp.supernet import Supernet
from updp.train import Distillation
from updp.train.features import Features


def distill(
    context: Context, network: Supernet, images: ImageSet, judge: Callable[[], Iterable[Tensor]]
) -> dict[str, Any] | None:
    """Train a pruned network on its baseline's features; what is no better on the judging images is not taken.

    Args:
        images: to train on, augmented as the schedule says.
        judge: others; no labels are needed.

    Returns:
        What became of it; None if the schedule has no epochs for it.
    """
    start = time.perf_counter()
    if not context.spec.schedule.distill.epochs:
        return None
    teacher = context.baseline_model().to(context.accelerator.device)
    before, solved = distance(teacher, network, judge), copy.deepcopy(network.state_dict())
    history = context.fit("distill", network, Distillation(teacher, list(network.bound)), images=images).history
    after = distance(teacher, network, judge)
    taken = processes.agreed(after["features"] < before["features"])
    if not taken:
        network.load_state_dict(solved)
        context.watch.on_note("distillation: no better on the judging images, not taken")
    return {"before": before, "after": after, "taken": taken, "history": history,
            "seconds": time.perf_counter() - start}  # fmt: skip


@torch.no_grad()
def distance(teacher: nn.Module, network: nn.Module, images: Callable[[], Iterable[Tensor]]) -> dict[str, float]:
    """How far a network is from its teacher.

    Returns:
        ``damage``: mean Kullback-Leibler divergence of the answers, in nats; ``features``: mean square error of the
        features that the classifier is given, relative to their variance.
    """
    answers: list[list[Tensor]] = []
    features: list[Tensor] = []
    with evaluating(teacher, network):
        for model in (teacher, network):
            with Features(model) as caught:
                seen = [(model(batch).double().log_softmax(-1), caught.take()[0].double()) for batch in images()]
            answers.append([answer for answer, _ in seen])
            features.append(torch.cat([feature for _, feature in seen]))
    error = (features[1] - features[0]).square().mean() / features[0].var(unbiased=False)
    return {"damage": divergence(*answers), "features": float(error)}
