"""What the tests of training share: a small supernet, data that can be learned, one call that trains."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from updp.spec import TrainSettings, parse_spec
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, build_supernet
from updp.train import FitResult, Policy, create_accelerator, fit
from updp.train.factory import make_optimizer, make_scheduler

# The loop collects garbage when structures change; what imports left behind need not be looked at each time.
gc.freeze()

SPEC = """
version: 1
model: {timm: convnext_atto, patch_size: 2, depths: [1, 1, 2, 1], dims: [8, 8, 8, 8], ls_init_value: 0.1, drop_path_rate: 0.1}
input: [3, 32, 32]
structures:
  block:
    - sum: [[conv_dw, norm, mlp.fc1, mlp.act, mlp.drop1, mlp.fc2, mlp.drop2, {optional: gamma}, drop_path], []]
recipes:
  full:
    replace: {norm: batchnorm, mlp.act: identity}
    resize: {conv_dw: {kernel: 3, at: 3/4}}
    append: [gelu, batchnorm]
    merge: all
blocks:
  - {match: "stages.*.blocks.*", structure: block, recipes: [full]}
schedule: {finetune: {epochs: 4}}
"""  # noqa: E501
CLASSES, IMAGES, BATCH = 4, 24, 8


def settings(epochs: int = 2, **changes: Any) -> TrainSettings:
    return TrainSettings(**{"epochs": epochs, "lr": 3e-3, "weight_decay": 0.01, **changes})


def small_net(seed: int = 0) -> Supernet:
    return build_supernet(parse_spec(SPEC, file="tiny.yaml", name="tiny"), num_classes=CLASSES, seed=seed)


def small_data(images: int = IMAGES) -> tuple[Tensor, Tensor]:
    """Images whose class is told by their brightest corner."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(images) % CLASSES
    x = torch.randn(images, 3, 32, 32, generator=generator) * 0.3
    for image, target in zip(x, targets.tolist(), strict=True):
        image[:, 16 * (target // 2) :, 16 * (target % 2) :][:, :16, :16] += 1.5
    return x, targets


def loader(images: int = IMAGES, batch: int = BATCH, *, drop_last: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    dataset = TensorDataset(*small_data(images))
    return DataLoader(dataset, batch, shuffle=True, generator=generator, drop_last=drop_last)


def calibration() -> list[Tensor]:
    return list(small_data()[0].split(BATCH))


def subnet(network: Supernet, *positions: int) -> SubnetConfig:
    names = list(network.available)
    return network.configure([names[i] for i in positions])


def train(network: nn.Module, how: TrainSettings, policy: Policy, **more: Any) -> FitResult:
    batches = more.pop("loader", None)
    accelerator = more.pop("accelerator", None) or create_accelerator()
    more.setdefault("seed", 0)
    return fit(network, loader() if batches is None else batches, how, policy, accelerator=accelerator, **more)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def rates(how: TrainSettings, steps: int) -> list[float]:
    optimizer = make_optimizer(nn.Linear(2, 2), how)
    scheduler = make_scheduler(optimizer, how, steps)
    assert scheduler is not None
    found = []
    for step in range(how.epochs * steps):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found
