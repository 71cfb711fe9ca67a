"""Distillation: a pruned network learns its baseline's features, and nothing needs labels."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from training import CLASSES, settings, small_data, small_net, subnet, train

from updp.errors import InputError
from updp.spec import load_spec
from updp.structure import create_model, evaluating
from updp.supernet import Supernet, build_supernet
from updp.train import Distillation
from updp.train.features import Features


def test_what_a_block_gives_is_caught_also_of_a_slice() -> None:
    spec = load_spec("vgg11_bn")
    model = create_model(spec).eval()
    supernet = build_supernet(spec, copy.deepcopy(model)).eval()
    blocks = list(supernet.bound)
    assert all("[" in name for name in blocks)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), Features(model, blocks) as plain, Features(supernet, blocks) as ours:
        model(x), supernet(x)
        first, second = plain.take(), ours.take()
    assert len(first) == len(blocks) + 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 512), ("convnext_atto", 320), ("vgg11_bn", 4096), ("deit_tiny_distilled_patch16_224", 384)],
)
def test_features_are_what_the_classifiers_are_given(name: str, width: int) -> None:
    network = timm.create_model(name).eval()
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad(), Features(network) as features:
        network(x)
        (caught,) = features.take()
        assert caught.shape == (2, width)
        heads = network.get_classifier()
        if isinstance(heads, nn.Linear):
            assert torch.equal(heads(caught), network(x))


def test_a_network_of_ones_own_has_its_last_linear_layer_for_a_classifier() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    with Features(network) as features:
        network(torch.rand(3, 3, 2, 2))
        assert features.take()[0].shape == (3, 5)
    with pytest.raises(InputError, match="has no classifier"):
        Features(nn.Conv2d(3, 3, 1))


def error_of(network: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), evaluating(network, teacher), Features(network) as mine, Features(teacher) as theirs:
        network(x), teacher(x)
        wanted = theirs.take()[0]
        return float((mine.take()[0] - wanted).square().mean() / wanted.var())


def pruned_net() -> tuple[Supernet, nn.Module]:
    """A pruned network and its baseline."""
    network = small_net()
    teacher = copy.deepcopy(network.model)
    network.reduce(subnet(network, 1, 3))
    network.free_baseline()
    network.resize(1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # something to learn: a tiny block that is pruned moves the features by next to nothing
        for weight in network.parameters():
            weight += 0.3 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)
    return network.eval(), teacher.eval()


@pytest.mark.parametrize("with_blocks", [False, True])
def test_distillation_brings_features_back_and_leaves_norms_and_teacher_alone(with_blocks: bool) -> None:
    network, teacher = pruned_net()
    before = copy.deepcopy(teacher.state_dict())
    norms = {name: value.clone() for name, value in network.state_dict().items() if "running_" in name}
    x, _ = small_data()
    start = error_of(network, teacher, x)
    policy = Distillation(teacher, list(network.bound) if with_blocks else ())
    result = train(network, settings(12, lr=2e-3, weight_decay=0.0), policy)
    assert error_of(network, teacher, x) < 0.7 * start
    assert result.history[-1]["loss_features"] < result.history[0]["loss_features"]
    after = network.state_dict()
    assert norms and all(torch.equal(after[name], value) for name, value in norms.items())
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())
    assert all(value.is_contiguous() for value in after.values())


def test_labels_change_nothing() -> None:
    x, targets = small_data()
    found = []
    for labels in (targets, (targets + 1) % CLASSES):
        network, teacher = pruned_net()
        train(network, settings(1), Distillation(teacher), loader=[(x[:8], labels[:8])])
        found.append(network.state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
