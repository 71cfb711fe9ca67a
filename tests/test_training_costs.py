"""What the method's training costs: two branches while they are blended, the pruned network alone afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from updp.certificate import merge
from updp.spec import TrainSettings, load_spec
from updp.structure import set_block
from updp.supernet import Supernet, build_supernet
from updp.train import Plain, create_accelerator
from updp.train.cost import (
    BASELINE,
    BLENDED,
    MERGED,
    PRUNED,
    SANDWICH,
    LiveBytes,
    Step,
    training_costs,
    training_steps,
)

HOW = TrainSettings(1, lr=1e-4)
BATCH = torch.randn(8, 3, 32, 32), torch.arange(8)
SPECS = {"convnext_digits": 5, "deit_digits": 3}


def supernet(name: str) -> Supernet:
    return build_supernet(load_spec(name), resized=True, num_classes=10, seed=0)


def steps_of(name: str) -> tuple[dict[str, Step], Step]:
    """A step of each kind, and one of the pruned network as a plain model, made in another way."""
    network = supernet(name)
    subnet = network.configure(list(network.available)[: SPECS[name]])
    plain: nn.Module = copy.deepcopy(network).model
    for block, recipe in subnet.choices.items():
        set_block(plain, block, network.blocks[block].choices[recipe])
    for block in set(network.available) - set(subnet.choices):
        set_block(plain, block, network.blocks[block].keep)
    reduced = copy.deepcopy(network)
    reduced.reduce(subnet)
    reduced.free_baseline()
    accelerator = create_accelerator(cpu=True)
    steps = training_steps(network, subnet, merge(reduced)[0], HOW, BATCH, accelerator)
    return steps, Step(plain, Plain(), HOW, BATCH, accelerator)


def flops(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", SPECS)
def test_blending_costs_two_branches_and_then_the_pruned_one_alone(name: str) -> None:
    steps, plain = steps_of(name)
    work = {kind: flops(step) for kind, step in steps.items()}
    memory = {kind: step.memory() for kind, step in steps.items()}
    assert work[BLENDED] <= work[BASELINE] + work[PRUNED]
    assert memory[BLENDED] <= memory[BASELINE] + memory[PRUNED]
    assert work[PRUNED] == flops(plain)
    assert memory[PRUNED] <= plain.memory()
    assert work[PRUNED] < work[BLENDED] < work[SANDWICH]
    assert work[MERGED] < work[BASELINE]
    assert memory[MERGED] < memory[PRUNED] < memory[BLENDED]


def test_costs_are_told_for_every_kind(tmp_path: Path) -> None:
    steps, _ = steps_of("deit_digits")
    rows = training_costs(steps, 0.01, torch.device("cpu"))
    assert [row["name"] for row in rows] == [BASELINE, SANDWICH, BLENDED, PRUNED, MERGED]
    assert all(0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["memory"] > 0 for row in rows)


def test_memory_is_that_of_tensors_alive_at_once() -> None:
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        first: Any = torch.zeros(250)  # 1000 bytes
        second = first + 1
        view = second[:10]
        del first
        third = torch.ones(500)
        known.add_(1)
        del second, view, third
        torch.zeros(100)
    assert live.peak == 1000 + 2000
