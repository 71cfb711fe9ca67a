"""Gradients of one step, of one process or of several: run by the test, and by ``torch.distributed.run`` for it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from updp import processes
from updp.pipeline.settings import resolve
from updp.randomize import randomize
from updp.spec import BlendSettings, TrainSettings, load_spec
from updp.supernet import Supernet, build_supernet
from updp.train import Plain, Policy, Progressive, Sandwich, Session, create_accelerator

IMAGES = 11
"""They cannot be shared out equally: one process has one more."""
SPECS = {"convnext_digits": "model.drop_path_rate=0", "deit_digits": "model.drop_path_rate=0"}
CASES = [(name, step, dtype) for name in SPECS for step in ("sandwich", "progressive") for dtype in ("32", "64")]


class Norms(nn.Module):
    """Every kind of batch norm, one of them frozen; a large mean, which a careless variance would drown in."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.plain, self.active, self.frozen = nn.BatchNorm2d(4), BatchNormAct2d(4), nn.BatchNorm2d(4, momentum=None)
        self.tokens, self.last = nn.BatchNorm1d(5), nn.BatchNorm1d(4, affine=False)
        self.head = nn.Linear(4, 3)

    def train(self, mode: bool = True) -> Norms:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.active(self.plain(self.conv(x) + 100)))
        x = self.tokens(x.flatten(2)[..., :5].transpose(1, 2))
        out: Tensor = self.head(self.last(x.mean(1)))
        return out


def session_of(network: nn.Module, settings: TrainSettings, accelerator: Accelerator) -> Session:
    session = Session(network, settings, accelerator=accelerator, seed=0, steps_per_epoch=1)
    part = processes.share_of(IMAGES)
    session.weight = (part.stop - part.start) * processes.count() / IMAGES
    return session


def supernet(name: str) -> Supernet:
    network = build_supernet(resolve(load_spec(name), [SPECS[name]]), num_classes=10, seed=0)
    randomize(network, 0)
    return network


def gradients(name: str, step: str, dtype: str, accelerator: Accelerator) -> dict[str, Tensor]:
    """Gradients and buffers after one step with this process's part of the batch."""
    torch.manual_seed(1)
    network: nn.Module = Norms() if name == "norms" else supernet(name)
    wide = torch.float64 if dtype == "64" else torch.float32
    network.to(wide)
    images, targets = torch.randn(IMAGES, 3, 32, 32).to(wide), torch.arange(IMAGES) % 3
    settings = TrainSettings(epochs=4, lr=1e-3)
    policy: Policy = Plain()
    if isinstance(network, Supernet):
        blend = BlendSettings(K=1.3)
        policy = Sandwich() if step == "sandwich" else Progressive(network.all_pruned(), blend, [images[:10]])
    session = session_of(network, settings, accelerator)
    policy.before_training(session)
    session.connect()
    session.start_epoch()
    session.start_step()
    policy.before_epoch(session, 1)
    policy.before_step(session, 1.5)
    if isinstance(policy, Progressive):
        assert 0 < policy.blend < 1
    part = processes.share_of(IMAGES)
    policy.step(session, images[part], targets[part])
    found = {f"grad of {name}": p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in network.named_buffers() if "running" in name}
    session.release()
    return found


def main(folder: str) -> None:
    with processes.together():
        accelerator = create_accelerator(cpu=True)
        for case in [*CASES, ("norms", "plain", "32"), ("norms", "plain", "64")]:
            found = gradients(*case, accelerator)
            save_file(found, Path(folder) / f"{'-'.join(case)}-{processes.number()}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
