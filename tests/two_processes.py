"""Run by ``torch.distributed.run``: trains a small network, saves what each process holds.

The network has no batch norm, so that the gradient of two half batches is that of the whole one.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from updp.spec import BlendSettings, TrainSettings
from updp.train import Progressive, Sandwich, create_accelerator, fit


class Supernet(nn.Module):
    """The supernet's interface over linear blocks; a subnet is the set of pruned blocks."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.available = {str(i): ("linear",) for i in range(blocks)}
        self.keep = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(blocks))
        self.pruned = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
        self.head = nn.Linear(8, 4)
        self.subnet: frozenset[int] = frozenset()
        self.blend, self.resized = 1.0, False

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.available)):
            blend = self.blend if i in self.subnet else 0.0
            kept = self.keep[i](x) if blend < 1 else 0.0
            x = x + (1 - blend) * kept + (blend * self.pruned[i](x) if blend else 0.0)
        out: Tensor = self.head(x)
        return out

    def all_keep(self) -> frozenset[int]:
        return frozenset()

    def all_pruned(self, recipe: str | None = None) -> frozenset[int]:
        return frozenset(range(len(self.available)))

    def sample(self, generator: torch.Generator, count: int, recipe: str | None = None) -> frozenset[int]:
        return frozenset(torch.randperm(len(self.available), generator=generator)[:count].tolist())

    def set_subnet(self, config: frozenset[int]) -> None:
        self.subnet = config

    reduce = set_subnet

    def set_blend(self, value: float) -> None:
        self.blend = value

    def free_baseline(self) -> None:
        for i in self.subnet:
            self.keep[i] = nn.Identity()

    def resize(self, progress: float) -> list[str]:
        if progress < 0.75 or self.resized:
            return []
        self.resized = True
        self.pruned[1].weight = nn.Parameter(self.pruned[1].weight.detach().clone())
        return ["pruned.1.weight"]

    def calibrate(self, batches: object) -> None:
        assert len(list(batches)) == 2


def main(folder: str) -> None:
    torch.manual_seed(0)
    accelerator = create_accelerator(cpu=True)
    network = Supernet()
    x = torch.randn(32, 8)
    targets = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    # Two processes take batches in turn; sorted so, both orders put the same images into a step.
    batches = DataLoader(TensorDataset(x, targets), 8 // accelerator.num_processes)
    settings = TrainSettings(epochs=4, lr=1e-2, ema=0.9, clip_grad=1.0)
    watch = SimpleNamespace(on_start=print, on_step=lambda state: None, on_epoch=print, on_end=lambda: None)
    for policy in (Sandwich(), Progressive(frozenset({0, 1}), BlendSettings(K=2), [x[:16], x[16:]])):
        fit(network, batches, settings, policy, accelerator=accelerator, seed=0, progress=watch)
    name = f"{accelerator.num_processes}-{accelerator.process_index}"
    torch.save(network.state_dict(), f"{folder}/{name}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
