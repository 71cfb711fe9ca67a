"""Every shipped spec and recipe: the operators of a block of each structure are observed, and solved for."""

import dataclasses
import functools
import math

import pytest
import torch
from networks import ODD_SIZES, marks, parse, random_input, random_model, spec_of
from torch import nn

from updp.calibrate import SolveSettings, solve_blocks, solve_subnet
from updp.calibrate.alternating import pairs_of
from updp.calibrate.memory import equation_bytes
from updp.calibrate.norms import norms_of
from updp.calibrate.observe import observe, record, reference_of
from updp.certificate import relative
from updp.frozen import FrozenMap
from updp.recipe import prune
from updp.spec import list_specs
from updp.supernet import build_supernet

SMALL = (3, 64, 48)  # where a network takes any size
F64 = {"dtype": torch.float64}


def cases():
    """Every spec with every recipe that prunes."""
    return [
        pytest.param(name, recipe, marks=marks(name), id=f"{name}-{recipe}")
        for name in list_specs()
        for recipe in dict.fromkeys(r for group in spec_of(name).blocks for r in group.recipes)
        if spec_of(name).recipes[recipe].kind == "prune"
    ]


def test_there_are_so_many():
    assert len(cases()) == 40


@functools.lru_cache(maxsize=1)
def network(name):
    """Random weights and statistics, float64; a small input where the network takes one."""
    spec = spec_of(name)
    recipes = {key: dataclasses.replace(recipe, compose="start") for key, recipe in spec.recipes.items()}
    spec = dataclasses.replace(spec, recipes=FrozenMap(recipes))
    size = None if ODD_SIZES[name] is None else SMALL
    return build_supernet(spec, random_model(spec), size=size).double().eval(), size or spec.input


def blocks_of(net, recipe):
    """Of every structure, the block that is cheapest to solve for."""
    cheapest = {}
    for name, recipes in net.available.items():
        if recipe in recipes:
            size = equation_bytes(net.blocks[name].choices[recipe])
            structure = net.bound[name].group.structure
            if structure not in cheapest or size < cheapest[structure][0]:
                cheapest[structure] = size, name
    return [name for _, name in cheapest.values()]


@pytest.mark.parametrize(("name", "recipe"), cases())
def test_operators_are_observed_and_solved_for(name, recipe):
    net, size = network(name)
    blocks = blocks_of(net, recipe)
    assert blocks
    for block in blocks:
        check_observed(net.bound[block], net.spec.recipes[recipe])
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator, **F64) for _ in range(2)]
    solved = solve_blocks(net, dict.fromkeys(blocks, recipe), net.all_keep(), lambda: iter(images))
    expected = []
    for block in blocks:
        flow = net.blocks[block].choices[recipe]
        steps = [pair.filters for pair in pairs_of(flow)] + [step for turn in (0, 1) for step in norms_of(flow, turn)]
        expected += [(block, step) for step in (*steps, *flow.composed)]
    assert sorted((each.block, each.operator) for each in solved) == sorted(expected)
    for each in solved:
        assert math.isfinite(each.error)
        assert each.error <= each.error_before
    net.set_subnet(net.configure(blocks, recipe))
    with torch.no_grad():
        assert torch.isfinite(net(images[0])).all()


def check_observed(bound, rule):
    """The wanted values in an operator's place make the block its baseline, on other inputs than the baseline's."""
    flow = prune(bound, dataclasses.replace(rule, append=())).double().eval()
    assert len(flow.composed) == 1, "else what the first operator is given must be what the others were solved on"
    (operator,) = flow.composed
    x, other = random_input(bound), random_input(bound, seed=9)
    with torch.no_grad():
        expected = bound.module.eval()(x.clone(), *bound.args, **bound.kwargs)
        seen = observe(flow, operator, other, record(reference_of(bound).double(), x))
        handle = flow.part(operator).register_forward_hook(lambda *_: seen.wanted)
        assert relative(flow(other), expected) <= 1e-12
        handle.remove()


TOY = """
version: 1
model: {timm: convnext_atto, patch_size: 2, depths: [1, 1, 1, 1], dims: [6, 8, 8, 8], ls_init_value: 0.5}
input: [3, 32, 32]
structures:
  block:
    - sum: [[conv_dw, norm, mlp.fc1, mlp.act, mlp.drop1, mlp.fc2, mlp.drop2, {optional: gamma}, drop_path], []]
recipes:
  full: {replace: {norm: batchnorm, mlp.act: identity}, resize: {conv_dw: 3}, merge: all, compose: start}
blocks:
  - {match: "stages.*.blocks.*", structure: block, recipes: [full]}
"""


@pytest.mark.parametrize("block", ["stages.0.blocks.0", "stages.1.blocks.0"])
def test_with_the_shortcut_inside_the_solution_is_the_dense_one(block):
    """From images to the operator of a block: against least squares on all positions of all images at once."""
    spec = parse(TOY)
    net = build_supernet(spec, random_model(spec)).double().eval()
    images = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(i), **F64) for i in range(4)]
    before = [name for name in net.available if name < block]
    solve_subnet(net, net.configure(before), lambda: iter(images))
    merged = prune(net.bound[block], spec.recipes["full"]).part("composed.0").weight.detach().flatten(1).T
    settings = SolveSettings(positions=10_000, restore=False)
    (solved,) = solve_blocks(net, {block: "full"}, net.configure(before), lambda: iter(images), settings)
    operator = net.blocks[block].choices["full"].part("composed.0")
    x, y = seen_and_given(net, block, images)
    rows = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    wanted = y.flatten(2).transpose(1, 2).flatten(0, 1)
    assert len(rows) == solved.samples
    priors = torch.zeros(rows.shape[1], y.shape[1], **F64), merged
    found = [ridged(rows, wanted, prior, solved.ridge) for prior in priors]
    mine = operator.weight.flatten(1).T, operator.bias
    gaps = [
        max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, each, strict=True)) for each in found
    ]
    assert min(gaps) <= 1e-6, "towards nothing, or towards the merged operator: what was held out has chosen"


def seen_and_given(net, block, images):
    """The block's inputs in the pruned network, and its outputs in the baseline."""
    pruned, given = [], []
    target = net.blocks[block]

    def note(_, args, output):
        pruned.append(args[0])
        given.append(output)

    hook = target.register_forward_hook(note)
    with torch.no_grad():
        for x in images:
            net.set_subnet(net.configure([name for name in net.available if name < block]))
            net(x)
            given.pop()
            net.set_subnet(net.all_keep())
            net(x)
            pruned.pop()
    hook.remove()
    return torch.cat(pruned), torch.cat(given)


def ridged(rows, wanted, prior, ridge):
    """Dense ridge regression towards a prior, by `lstsq`."""
    a, b = rows - rows.mean(0), wanted - wanted.mean(0)
    level = ridge * a.square().mean(0).mean() * len(a)
    wide = torch.cat([a, level.sqrt() * torch.eye(a.shape[1], **F64)])
    target = torch.cat([b - a @ prior, torch.zeros(a.shape[1], b.shape[1], **F64)])
    weight = prior + torch.linalg.lstsq(wide, target, driver="gelsd").solution
    return weight, wanted.mean(0) - rows.mean(0) @ weight
