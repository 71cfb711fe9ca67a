"""A depthwise convolution and the pointwise operator behind it: which pairs there are, and least squares in turns."""

import dataclasses
import itertools

import pytest
import torch
from networks import first_blocks, parse, random_blocks, random_model, spec_of
from torch import nn

from updp.calibrate import blocks as blocks_module
from updp.calibrate import network_damage, solve_subnet
from updp.calibrate.alternating import Alternation, behind, pairs_of
from updp.calibrate.equations import Equations
from updp.frozen import FrozenMap
from updp.recipe import prune
from updp.spec import list_specs
from updp.supernet import build_supernet

F64 = {"dtype": torch.float64}
CHANNELS, TAPS, OUTPUTS = 5, 9, 4


def samples(count=400, seed=0, noise=0.3):
    """What a convolution sees, taps alike as on a map, and outputs that no pair gives exactly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, TAPS, generator=generator, **F64)
    x = x + x.mean(2, keepdim=True) * 3 + 2
    truth = torch.randn(CHANNELS * TAPS, OUTPUTS, generator=torch.Generator().manual_seed(99), **F64)
    y = x.flatten(1) @ truth + noise * torch.randn(count, OUTPUTS, generator=generator, **F64)
    return x.flatten(1), y


def equations_of(x, y, chunks=3):
    equations = Equations(1, x.shape[1], y.shape[1])
    for a, b in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        equations.add(a[None], b[None])
    return equations


def first_filters(seed=1):
    return torch.randn(CHANNELS, TAPS, generator=torch.Generator().manual_seed(seed), **F64)


def middle(x, filters):
    """What the depthwise convolution gives."""
    return (x.reshape(len(x), CHANNELS, TAPS) * filters).sum(2)


def mean_square(alternation, x, y):
    return (middle(x, alternation.filters) @ alternation.weight + alternation.bias - y).square().mean()


def test_the_equations_behind_filters_are_those_of_what_the_filters_give():
    x, y = samples()
    filters = first_filters()
    found, expected = behind(equations_of(x, y), filters), equations_of(middle(x, filters), y)
    for name in ("gram", "cross", "square"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-10)
    assert all(torch.allclose(a, b) for a, b in zip(found.sums, expected.sums, strict=True))
    assert found.count == expected.count


def test_every_half_step_is_the_dense_least_squares_solution():
    """The operator against `lstsq` on all rows, then the filters against `lstsq` on all rows."""
    x, y = samples()
    alternation = Alternation(equations_of(x, y), first_filters(), ridge=0.0)
    mid = middle(x, alternation.filters)
    wide = torch.cat([mid, torch.ones(len(x), 1, **F64)], 1)
    dense = torch.linalg.lstsq(wide, y).solution
    assert torch.allclose(alternation.weight, dense[:-1], atol=1e-6)
    assert torch.allclose(alternation.bias, dense[-1], atol=1e-6)
    # y[n, o] = sum over (c, t) of d[c, t] * x[n, c, t] * w[c, o] + b[o]
    rows = (x.reshape(-1, CHANNELS, TAPS, 1) * alternation.weight[:, None]).permute(0, 3, 1, 2).reshape(-1, 45)
    bias = torch.eye(OUTPUTS, **F64).repeat(len(x), 1)
    dense = torch.linalg.lstsq(torch.cat([rows, bias], 1), y.reshape(-1, 1)).solution[:45].reshape(CHANNELS, TAPS)
    dense = dense / dense.norm(dim=1, keepdim=True)
    assert torch.allclose(alternation._better_filters(), dense, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-5, 1e-2])
def test_the_error_never_grows(ridge):
    x, y = samples()
    alternation = Alternation(equations_of(x, y), first_filters(), ridge)
    told = [alternation.objective]
    errors = [mean_square(alternation, x, y)]
    for _ in range(25):
        alternation.sweep()
        told.append(alternation.objective)
        errors.append(mean_square(alternation, x, y))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(told))
    assert told[-1] < 0.7 * told[0]
    if ridge == 0.0:
        variance = (y - y.mean(0)).square().mean()
        assert torch.allclose(torch.tensor(told, **F64), torch.stack(errors) / variance, rtol=1e-6)


def test_a_pair_is_found_again():
    """Outputs that some pair gives: the alternation ends at none that errs."""
    x, _ = samples()
    weight = torch.randn(CHANNELS, OUTPUTS, generator=torch.Generator().manual_seed(5), **F64)
    y = middle(x, first_filters(7)) @ weight + 3
    alternation = Alternation(equations_of(x, y), first_filters(7) + 0.3 * first_filters(8), ridge=0.0)
    for _ in range(60):
        alternation.sweep()
    assert alternation.objective < 1e-8


def test_fewer_samples_than_unknowns_are_no_trouble():
    x, y = samples(count=12)
    alternation = Alternation(equations_of(x, y), first_filters(), ridge=1e-3)
    before = alternation.objective
    for _ in range(5):
        alternation.sweep()
    assert torch.isfinite(alternation.filters).all()
    assert alternation.objective <= before


def test_a_channel_that_is_never_used_stays_finite():
    x, y = samples()
    x.reshape(len(x), CHANNELS, TAPS)[:, 2] = 0
    alternation = Alternation(equations_of(x, y), first_filters(), ridge=1e-5)
    for _ in range(3):
        alternation.sweep()
    assert torch.isfinite(alternation.filters).all()
    assert torch.isfinite(alternation.weight).all()


# --- which pairs ---


def composed(name, recipe):
    return dataclasses.replace(spec_of(name).recipes[recipe], compose="start")


@pytest.mark.parametrize(
    ("name", "block", "recipe", "expected"),
    [
        ("convnext_digits", "stages.1.blocks.1", "pointwise", [("conv_dw", "composed.0")]),
        ("convnext_digits", "stages.1.blocks.1", "full", []),  # one operator
        ("deit_digits", "blocks.1", "mlp", []),  # attention in front
        ("mobilenetv2_100", "blocks.2.1", "full", []),
        ("resnet18", "layer2.1", "full", []),
    ],
)
def test_pairs_are_found_from_the_flow(name, block, recipe, expected):
    flow = prune(random_blocks(name)[block], composed(name, recipe))
    assert [(pair.filters, pair.operator) for pair in pairs_of(flow)] == expected


def test_the_pairs_of_all_specs():
    """Found by listing: networks of one family, under one recipe."""
    found = set()
    for name in list_specs():
        for block in first_blocks(name).values():
            for recipe in block.group.recipes:
                if spec_of(name).recipes[recipe].kind == "prune":
                    flow = prune(block, composed(name, recipe))
                    found |= {(name, recipe) for _ in pairs_of(flow)}
    assert found == {(name, "pointwise") for name in list_specs() if name.startswith("convnext")}


KEPT = """
version: 1
model: {timm: convnext_atto, depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}
input: [3, 64, 64]
structures:
  block:
    - sum: [[conv_dw, norm, mlp.fc1, mlp.act, mlp.drop1, mlp.fc2, mlp.drop2, gamma, drop_path], []]
recipes:
  kept: {replace: {norm: batchnorm, mlp.act: identity}, merge: [[mlp.fc1, mlp.fc2]], compose: start}
blocks:
  - {match: "stages.*.blocks.*", structure: block, recipes: [kept]}
"""


def test_a_convolution_that_the_baseline_uses_is_in_no_pair():
    net = build_supernet(parse(KEPT), seed=0)
    flow = net.blocks["stages.1.blocks.0"].choices["kept"]
    assert flow.part("conv_dw") is net.bound["stages.1.blocks.0"].flow.part("conv_dw")
    assert pairs_of(flow) == []


# --- in a network ---


def network():
    """Blocks that are nearly affine: only the layer norm is not."""
    spec = spec_of("convnext_digits")
    recipes = {name: dataclasses.replace(recipe, compose="start") for name, recipe in spec.recipes.items()}
    spec = dataclasses.replace(spec, recipes=FrozenMap(recipes))
    model = random_model(spec)
    for module in list(model.modules()):
        if isinstance(getattr(module, "act", None), nn.GELU):
            module.act = nn.Identity()
    return build_supernet(spec, model).double().eval()


def images(count, seed=0):
    """Smooth ones: neighbours tell of each other."""

    def batch(seed):
        coarse = torch.randn(32, 3, 7, 7, generator=torch.Generator().manual_seed(seed), **F64)
        return nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")

    kept = [batch(seed + number) for number in range(count)]
    return lambda: iter(kept)


def test_solving_filters_too_is_better_than_the_operator_alone(monkeypatch):
    net = network()
    subnet = net.configure(["stages.0.blocks.1", "stages.1.blocks.0"], "pointwise")
    baseline = {name: tensor.clone() for name, tensor in net.state_dict().items() if ".keep." in name}
    solved = solve_subnet(net, subnet, images(4))
    assert [(each.block, each.operator) for each in solved] == [
        (block, operator) for block in subnet.pruned for operator in ("conv_dw", "composed.0")
    ]
    together = network_damage(net, subnet, images(1, seed=50))
    assert all(each.error < each.error_before for each in solved)
    for filters, operator in zip(solved[::2], solved[1::2], strict=True):
        assert operator.error <= filters.error * 1.1, "solved again on statistics of its own"
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in baseline.items())
    monkeypatch.setattr(blocks_module, "_solve_filters", lambda *_: [])
    alone = solve_subnet(net, subnet, images(4))
    assert all(one.error < 0.98 * other.error for one, other in zip(solved[1::2], alone, strict=True))
    assert together < network_damage(net, subnet, images(1, seed=50))


def test_norms_behind_solved_filters_have_their_statistics():
    net = network()
    block = "stages.1.blocks.1"
    solve_subnet(net, net.configure([block], "pointwise"), images(2))
    flow = net.blocks[block].choices["pointwise"]
    norm = flow.part("norm")
    seen = []
    hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for x in images(2)():
            net(x)
    hook.remove()
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    assert torch.allclose(norm.running_mean, values.mean(1), atol=1e-6)
    assert torch.allclose(norm.running_var, values.var(1), rtol=0.02), "unbiased, batch by batch"


def test_with_few_images_the_filters_stay():
    """What is fitted to eight positions says nothing of others."""
    net = network()
    block = "stages.2.blocks.1"
    conv = net.blocks[block].choices["pointwise"].part("conv_dw")
    assert isinstance(conv, nn.Conv2d)
    few = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed), **F64) for seed in range(2)]
    before = conv.weight.clone()
    filters, operator = solve_subnet(net, net.configure([block], "pointwise"), lambda: iter(few))
    assert filters.ridge == float("inf")
    assert filters.error == filters.error_before
    assert not filters.determined
    assert torch.equal(conv.weight, before)
    assert operator.error <= operator.error_before
