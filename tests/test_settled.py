"""Statistics that fit what arrives: no channel of a random network is lost, so its certificate sees every mistake."""

import copy

import pytest
import torch
from networks import MergedTensor, merged_tensors, spec_of
from torch import nn

from updp import certificate
from updp.certificate import certify
from updp.layers import BatchNorm
from updp.merging import claims_of
from updp.pipeline.settings import resolve
from updp.randomize import randomize, settle
from updp.subnet import load_subnet
from updp.supernet import Supernet, build_supernet


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def settled(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a random norm gives for the values that it was fitted to."""
    randomize(norm.double().eval())
    settle(norm, lambda: norm(x))
    with torch.no_grad():
        return norm(x)


# --- one norm ---


def test_settled_statistics_fit_what_arrives():
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)).double().eval()
    x = 1000 * noise(64, 4)
    with torch.no_grad():
        assert randomize(network)(x).std() > 100
        settle(network, lambda: network(x))
        assert 0.1 < network(x).std() < 10
    assert all(len(norm.running_mean.unique()) == 8 for norm in (network[1], network[3])), "still random"
    assert not network[1]._forward_pre_hooks


@pytest.mark.parametrize("layout", ["first", "last"])
def test_every_channel_keeps_its_own_variation(layout):
    """Whatever its size and its mean are, and wherever the channels are."""
    at = {"first": 1, "last": 2}[layout]
    shape = [1, 1, 1]
    shape[at] = 6
    size = torch.tensor([1.0, 1.0, 2.0, 0.5, 4.0, 0.3], dtype=torch.float64).view(shape)
    x = size * noise(4, 6, 6) + torch.tensor([0, 9, -9, 3, -3, 1.0]).view(shape)
    norm = BatchNorm(6)
    norm.layout = layout
    spread = settled(norm, x).movedim(at, 0).flatten(1)
    assert (spread.std(1) > 0.3).all()
    assert (spread.mean(1).abs() < 2).all()
    factors = norm.running_var / x.movedim(at, 0).flatten(1).var(1, correction=0)
    assert len(factors.unique()) == 6, "still random"
    assert ((factors > 0.5) & (factors < 1.5)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_rounding_is_not_blown_up(value):
    """A channel without variation of its own, and a map without any."""
    x = noise(2, 3, 5, 5)
    x[:, 1] = value + 1e-15 * x[:, 1]
    out = settled(nn.BatchNorm2d(3), x)
    assert out[:, 1].std() < 1e-9
    assert out.abs().max() < 20
    alone = settled(nn.BatchNorm2d(3), torch.full((1, 3, 1, 1), value, dtype=torch.float64))
    assert torch.isfinite(alone).all()
    assert alone.abs().max() < 4


def test_a_norm_that_is_used_twice_is_fitted_once():
    norm = nn.BatchNorm2d(3).double().eval()
    once, twice = copy.deepcopy(norm), norm
    x = 5 + noise(2, 3, 4, 4)
    settled(once, x)
    randomize(twice)
    settle(twice, lambda: twice(twice(x)))
    assert torch.equal(once.running_var, twice.running_var)
    assert torch.equal(once.running_mean, twice.running_mean)


# --- networks ---


def build(name: str, *settings: str) -> Supernet:
    """A shipped subnet, or a spec with all its blocks pruned."""
    own, _, subnet = name.partition("/")
    supernet = build_supernet(resolve(spec_of(own), list(settings)), resized=True, seed=0).eval()
    supernet.set_subnet(load_subnet(name) if subnet else supernet.all_pruned())
    return supernet


@pytest.mark.parametrize(
    ("name", "settings", "channels"),
    [
        ("resnet34/updp_p10", (), 2048),
        ("mobilenetv2_140/ds_f", (), 1712),
        ("mobilenetv2_140/updp_p11", (), 824),
        ("deit_tiny_patch16_224/updp_p6", ("input=[3,96,96]", "model.img_size=96"), 1152),
    ],
)
def test_no_pruned_block_has_a_dead_channel(name, settings, channels):
    """A channel that is the same everywhere would hide any wrong weight that reads it."""
    supernet = build(name, *settings).double()
    arrived: dict[str, torch.Tensor] = {}
    for block in supernet.subnet.pruned:
        supernet.blocks[block].register_forward_pre_hook(
            lambda _, args, block=block: arrived.__setitem__(block, args[0])
        )
    x = noise(2, 3, 96, 96)
    settle(randomize(supernet), lambda: supernet(x))
    with torch.no_grad():
        supernet(x)
    dead, seen = {}, 0
    for block, maps in arrived.items():
        values = maps.movedim(1 if maps.dim() == 4 else 2, 0).flatten(1)
        seen += len(values)
        dead[block] = int((values == values[:, :1]).all(1).sum())
    assert {block: count for block, count in dead.items() if count} == {}
    assert seen == channels


class OneElementOff:
    """Stands in for `merge_blocks`: merges once, then gives copies with one element off by 1e-6 of the largest."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet
        self.merge = certificate.merge_blocks
        self.generator = torch.Generator().manual_seed(5)
        self.blocks = None
        self.at: int | None = None
        self.label = ""

    def __call__(self, exact):
        self.blocks = self.blocks or copy.deepcopy(self.merge(exact))
        blocks = copy.deepcopy(self.blocks)
        if self.at is not None:
            self.spoil(*self.weights(blocks)[self.at])
        return blocks

    def weights(self, blocks) -> list[tuple[str, MergedTensor]]:
        return [
            (block.name, target)
            for block in blocks
            for target in merged_tensors(block, claims_of(self.supernet.bound[block.name]))
            if target.name == "weight"
        ]

    def spoil(self, block: str, target: MergedTensor) -> None:
        height, width = self.supernet.bound[block].input_shape[-2:]
        values = target.tensor.view(-1)
        seen = target.visible(height, width).view(-1).nonzero()[:, 0]
        where = int(seen[torch.randint(len(seen), (), generator=self.generator)])
        values[where] += 1e-6 * values.abs().max()
        self.label = f"{block} {target.op}[{where}]"


@pytest.mark.parametrize(
    ("name", "settings", "weights"),
    [
        ("mobilenetv2_100/ds_d", ("input=[3,64,64]",), 10),
        ("deit_digits", (), 12),
    ],
)
def test_a_network_with_one_wrong_element_fails_its_random_certificate(monkeypatch, name, settings, weights):
    """Every merged weight of a whole network, on the values that arrive there."""
    supernet = build(name, *settings)
    spoiler = OneElementOff(supernet)
    monkeypatch.setattr(certificate, "merge_blocks", spoiler)
    assert certify(supernet, weights="random", batch=1).ok
    assert len(spoiler.weights(spoiler.blocks)) == weights
    missed = []
    for spoiler.at in range(weights):
        if certify(supernet, weights="random", batch=1).ok:
            missed.append(spoiler.label)
    assert missed == []
