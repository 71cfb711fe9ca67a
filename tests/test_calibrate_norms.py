"""Batch norms that stand for other steps: which are fitted, and that they are fitted best."""

import dataclasses

import pytest
import torch
from networks import first_blocks, parse, random_model, spec_of

from updp.calibrate import SolveSettings, network_damage, solve_subnet
from updp.calibrate import blocks as blocks_module
from updp.calibrate.norms import norms_of
from updp.calibrate.observe import record, reference_of
from updp.frozen import FrozenMap
from updp.recipe import prune
from updp.spec import list_specs
from updp.supernet import build_supernet

F64 = {"dtype": torch.float64}


def network(spec=None, **changes):
    spec = spec or spec_of("deit_digits")
    recipes = {key: dataclasses.replace(recipe, compose="start") for key, recipe in spec.recipes.items()}
    spec = dataclasses.replace(spec, recipes=FrozenMap(recipes), **changes)
    return build_supernet(spec, random_model(spec)).double().eval()


def images(number=3, batch=16, seed=0):
    kept = [
        torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed + i), **F64) for i in range(number)
    ]
    return lambda: iter(kept)


def test_the_norms_of_all_specs():
    """In front of an attention only: elsewhere an operator that is solved for comes next."""
    found = set()
    for name in list_specs():
        for block in first_blocks(name).values():
            for recipe in block.group.recipes:
                rule = spec_of(name).recipes[recipe]
                if rule.kind == "prune":
                    flow = prune(block, dataclasses.replace(rule, compose="start"))
                    found |= {(name, step) for turn in range(3) for step in norms_of(flow, turn)}
    assert found == {(name, "norm1") for name in list_specs() if name.startswith("deit")}


OTHERS = """
version: 1
model: {{timm: convnext_atto, patch_size: 2, depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}}
input: [3, 32, 32]
structures:
  block:
    - sum: [[conv_dw, norm, mlp.fc1, mlp.act, mlp.drop1, mlp.fc2, mlp.drop2, {{optional: gamma}}, drop_path], []]
recipes:
  some: {{replace: {{{replace}}}, merge: [[{merge}]], compose: start}}
blocks:
  - {{match: "stages.*.blocks.*", structure: block, recipes: [some]}}
"""


@pytest.mark.parametrize(
    ("replace", "merge", "expected"),
    [
        ("norm: batchnorm, mlp.act: identity", "mlp.fc1, mlp.fc2", [[], []]),  # an operator comes next
        ("norm: batchnorm", "mlp.fc2, mlp.drop2", [["norm"], []]),  # an activation is between
        ("mlp.act: batchnorm", "conv_dw", [[], ["mlp.act"]]),  # behind an operator, and at the end of a branch
        ("norm: batchnorm, mlp.act: batchnorm", "mlp.fc2, mlp.drop2", [["norm"], []]),  # one of either
    ],
)
def test_a_norm_counts_where_nothing_makes_up_for_it(replace, merge, expected):
    net = build_supernet(parse(OTHERS.format(replace=replace, merge=merge)), seed=0)
    flow = net.blocks["stages.1.blocks.0"].choices["some"]
    assert len(flow.composed) == 1
    assert [norms_of(flow, turn) for turn in range(2)] == expected


def test_a_norm_is_the_best_scale_and_shift_of_each_channel():
    """Against `lstsq` on all tokens of all images, with what was held out."""
    net = network()
    block = "blocks.1"
    solved = solve_subnet(net, net.configure([block]), images(), SolveSettings(positions=10_000))
    assert [each.operator for each in solved] == ["norm1", "composed.0"]
    assert solved[0].unknowns == 2
    assert solved[0].error < 0.5 * solved[0].error_before
    seen, wanted = [], []
    reference, flow = reference_of(net.bound[block]), net.blocks[block].choices["mlp"]
    handle = net.blocks[block].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for x in images()():
            net(x)
            wanted.append(record(reference, seen[-1])["norm1",].tensor)
        handle.remove()
        x, y = torch.cat(seen), torch.cat(wanted)
        mine = flow.part("norm1")(x)
    for channel in range(0, x.shape[-1], 7):
        rows = torch.stack([x[..., channel].flatten(), torch.ones(x[..., 0].numel(), **F64)], 1)
        expected = rows @ torch.linalg.lstsq(rows, y[..., channel].flatten()).solution
        assert torch.allclose(mine[..., channel].flatten(), expected, atol=1e-5)


def test_fitted_norms_make_a_network_better(monkeypatch):
    net = network()
    subnet = net.configure(["blocks.1", "blocks.3"])
    baseline = {name: tensor.clone() for name, tensor in net.state_dict().items() if ".keep." in name}
    solve_subnet(net, subnet, images())
    fitted = network_damage(net, subnet, images(1, seed=9))
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in baseline.items())
    monkeypatch.setattr(blocks_module, "_solve_norms", lambda *_: [])
    solve_subnet(net, subnet, images())
    assert fitted < 0.9 * network_damage(net, subnet, images(1, seed=9))


def test_a_norm_behind_the_last_operator_is_fitted_on_what_that_gives():
    """In a map, an operator and the end of a branch behind it."""
    net = network(parse(OTHERS.format(replace="mlp.act: batchnorm", merge="conv_dw")))
    solved = solve_subnet(net, net.configure(["stages.1.blocks.0"]), images())
    assert [each.operator for each in solved] == ["composed.0", "mlp.act"]
    assert solved[0].ridge == float("inf"), "a convolution alone is best as it is"
    assert solved[1].error < solved[1].error_before
