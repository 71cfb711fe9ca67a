"""The supernet: paths, blends, calibration, and what is left when the baseline goes."""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from networks import ODD_SIZES, parse, spec_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp.certificate import merge
from updp.errors import InputError
from updp.kinds import kind_of
from updp.merging import MergedFlow
from updp.randomize import randomize
from updp.spec import list_specs
from updp.structure import create_model
from updp.subnet import SubnetConfig
from updp.supernet import build_supernet

SMALL = ["convnext_digits", "deit_digits"]


def supernet_of(name: str, **kwargs):
    supernet = build_supernet(spec_of(name), seed=0, resized=True, **kwargs).eval()
    randomize(supernet)
    return supernet


def images(name: str, count: int = 4, seed: int = 0):
    shape = spec_of(name).input
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def keep_state(supernet):
    """Everything that belongs to the baseline network."""
    return {k: v.clone() for k, v in supernet.state_dict().items() if ".choices." not in k}


@pytest.mark.parametrize("name", list_specs())
def test_all_keep_is_the_baseline_bit_for_bit(name):
    model = randomize(create_model(spec_of(name), seed=0)).eval()
    x = torch.randn(2, *(ODD_SIZES[name] or spec_of(name).input))
    with torch.no_grad():
        expected = model(x)
        supernet = build_supernet(spec_of(name), model).eval()
        assert torch.equal(supernet(x), expected)
        supernet.set_subnet(supernet.all_pruned())
        assert not torch.equal(supernet(x), expected)
        supernet.set_subnet(supernet.all_keep())
        assert torch.equal(supernet(x), expected)
    prunes = {recipe.name for recipe in spec_of(name).recipes.values() if recipe.kind == "prune"}
    assert supernet.available == {
        block: tuple(recipe for recipe in bound.group.recipes if recipe in prunes)
        for block, bound in supernet.bound.items()
        if prunes.intersection(bound.group.recipes)
    }
    assert len(supernet.available) == len(supernet.blocks) - ("linear" in spec_of(name).recipes)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [False, True])
def test_blend_ends_are_the_two_networks_bit_for_bit(name, training):
    supernet = supernet_of(name)
    x = images(name)
    pruned = supernet.all_pruned()

    def run(config, blend):
        state = copy.deepcopy(supernet.state_dict())
        supernet.train(training)
        supernet.set_subnet(config)
        supernet.set_blend(blend)
        torch.manual_seed(0)
        with torch.no_grad():
            out = supernet(x)
        supernet.load_state_dict(state)
        return out

    assert torch.equal(run(pruned, 0.0), run(supernet.all_keep(), 1.0))
    assert not torch.equal(run(pruned, 0.5), run(pruned, 0.0))
    ends = run(pruned, 1.0)
    assert not torch.equal(ends, run(pruned, 0.99))
    for block in supernet.blocks.values():
        block.keep = nn.Identity()  # must not matter any more
    assert torch.equal(run(pruned, 1.0), ends)


def test_blend_mixes_the_two_outputs_of_a_block():
    block = supernet_of("convnext_digits").blocks["stages.0.blocks.0"]
    x = torch.randn(2, 24, 8, 8)
    block.active = "full"
    with torch.no_grad():
        kept, pruned = block.keep(x), block.choices["full"](x)
        for blend in (0.25, 0.7):
            block.blend = blend
            expected = (1 - blend) * kept + blend * pruned  # UPDP eq. 2
            assert torch.allclose(block(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rates", [("drop_path",), ("drop1",), ("drop1", "drop_path")])
def test_drop_path_and_dropout_are_synchronised_in_a_blend(rates):
    """A pruned flow that computes what the baseline computes: any blend of the two is the baseline, masks included."""
    text = spec_of("convnext_digits").text.replace("recipes:\n", "recipes:\n  same: {merge: []}\n", 1)
    spec = parse(text.replace("recipes: [full, pointwise]", "recipes: [same, full, pointwise]"))
    supernet = build_supernet(spec, create_model(spec, seed=0, drop_path=0.3))
    block = supernet.blocks["stages.2.blocks.1"]
    if "drop1" in rates:
        block.keep.mlp.drop1.p = 0.4
    if "drop_path" not in rates:
        block.keep.drop_path.drop_prob = 0.0
    block.train()
    block.active = "same"
    x = torch.randn(16, 96, 2, 2)
    outputs = []
    for blend in (0.0, 0.5, 1.0):
        block.blend = blend
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(block(x))
    assert torch.allclose(outputs[0], outputs[1], rtol=0, atol=1e-6)
    assert torch.allclose(outputs[0], outputs[2], rtol=0, atol=1e-6)
    torch.manual_seed(4)
    with torch.no_grad():
        assert not torch.allclose(block(x), outputs[2], rtol=0, atol=1e-6), "something was dropped"


# --- choosing ---


def test_sample_prunes_as_many_as_asked():
    supernet = supernet_of("convnext_digits")
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 5, 10):
        config = supernet.sample(generator, count)
        assert len(config.pruned) == count
        assert set(config.choices.values()) <= {"full"}
    assert {len(supernet.sample(generator).pruned) for _ in range(100)} == set(range(1, 10))
    assert set(supernet.sample(generator, 4, "pointwise").choices.values()) == {"pointwise"}
    first, second = (supernet.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SubnetConfig("resnet34", {}), "resnet34"),
        (SubnetConfig("convnext_digits", {"stages.9.blocks.0": "full"}), "stages.9.blocks.0"),
        (SubnetConfig("convnext_digits", {"stages.0.blocks.0": "ful"}), "did you mean 'full'"),
    ],
)
def test_subnets_that_do_not_fit_are_refused(config, message):
    supernet = supernet_of("convnext_digits")
    before = supernet.subnet
    with pytest.raises(InputError, match=message):
        supernet.set_subnet(config)
    assert supernet.subnet == before
    assert all(block.active == "keep" for block in supernet.blocks.values())


def test_a_recipe_or_a_blend_that_does_not_exist_is_refused():
    supernet = supernet_of("convnext_digits")
    with pytest.raises(InputError, match="did you mean 'pointwise'"):
        supernet.all_pruned("pointwize")
    for blend in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="blend"):
            supernet.set_blend(blend)


# --- calibration ---


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SMALL)
def test_calibration_estimates_what_each_norm_sees(name, blend):
    """Cumulative averages over the batches, at any blend; baseline buffers, modes and momenta stay."""
    supernet = supernet_of(name)
    supernet.set_subnet(supernet.all_pruned())
    supernet.set_blend(blend)
    supernet.train()
    before = keep_state(supernet)
    batches = [images(name, seed=seed) for seed in range(3)]
    supernet.calibrate(batches)
    after = keep_state(supernet)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(module.training for module in supernet.modules())
    block = next(iter(supernet.blocks.values()))
    means, variances = seen_by_first_norm(supernet, block, batches)
    norm = next(block.norms())
    assert norm.momentum == 0.1
    assert torch.allclose(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    assert torch.allclose(norm.running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)
    for later in supernet.blocks.values():
        for norm in later.norms():
            assert int(norm.num_batches_tracked) == 3
            assert norm.running_mean.abs().max() > 0


def seen_by_first_norm(supernet, block, batches):
    """Batch statistics of the first norm's input, by the definition."""
    means, variances = [], []
    norm = next(block.norms())

    def note(module, args):
        x = args[0] if norm.layout == "last" else args[0].movedim(1, -1)
        flat = x.reshape(-1, x.shape[-1])
        means.append(flat.mean(0))
        variances.append(flat.var(0))

    handle = norm.register_forward_pre_hook(note)
    supernet.eval()
    supernet.set_blend(1.0)
    with torch.no_grad():
        for batch in batches:
            supernet(batch)
    handle.remove()
    return means, variances


def test_calibration_does_not_know_training_precision():
    supernet = supernet_of("convnext_digits")
    supernet.set_subnet(supernet.all_pruned())
    batches = [images("convnext_digits")]
    supernet.calibrate(batches)
    expected = copy.deepcopy(supernet.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        supernet.calibrate(batches)
    assert all(torch.equal(value, expected[key]) for key, value in supernet.state_dict().items())


def test_calibration_leaves_other_choices_alone():
    supernet = supernet_of("convnext_digits")
    supernet.set_subnet(supernet.configure(["stages.1.blocks.0"], "full"))
    before = copy.deepcopy(supernet.state_dict())
    supernet.calibrate([images("convnext_digits")])
    changed = {key for key, value in supernet.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith("model.stages.1.blocks.0.choices.full.") for key in changed)


# --- one subnet ---


@pytest.mark.parametrize("name", SMALL)
def test_the_baseline_goes_when_the_blend_is_one(name):
    supernet = supernet_of(name)
    half = list(supernet.available)[::2]
    config = supernet.configure(half)
    x = images(name)
    with torch.no_grad():
        supernet.set_subnet(config)
        expected = supernet(x)
        supernet.reduce(config)
        assert torch.equal(supernet(x), expected)
        kept_norm = weakref.ref(next(m for m in supernet.blocks[half[0]].keep.modules() if kind_of(m).name == "norm"))
        supernet.free_baseline()
        assert torch.equal(supernet(x), expected)
    gc.collect()
    assert kept_norm() is None, "nothing holds on to the baseline's modules"
    for block, module in supernet.blocks.items():
        assert (module.keep is None) == (block in half)
        assert len(module.choices) == (block in half)
    again = build_supernet(spec_of(name), resized=True).eval()
    again.reduce(config)
    again.free_baseline()
    again.load_state_dict(supernet.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_merged_modules_keep_their_dtype(name, dtype):
    supernet = supernet_of(name).to(dtype)
    supernet.set_subnet(supernet.all_pruned())
    network, certificate = merge(supernet)
    assert certificate.ok, certificate.failures()
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert sum(isinstance(module, MergedFlow) for module in network.modules()) == len(supernet.available)
    assert not network.training
    assert not {id(p) for p in network.parameters()} & {id(p) for p in supernet.parameters()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_merged_modules_keep_their_device():
    supernet = supernet_of("deit_digits").cuda()
    supernet.set_subnet(supernet.all_pruned())
    network, certificate = merge(supernet)
    assert certificate.ok, certificate.failures()
    assert {p.device.type for p in network.parameters()} == {"cuda"}


def test_merging_after_the_baseline_is_gone_gives_the_same_network():
    supernet = supernet_of("convnext_digits")
    config = supernet.configure(list(supernet.available)[:4], "full")
    supernet.set_subnet(config)
    first, _ = merge(supernet)
    supernet.reduce(config)
    supernet.free_baseline()
    second, certificate = merge(supernet)
    assert certificate.ok
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_a_supernet_can_be_copied():
    """An average of the weights is trained beside it: sharing must survive, and the copy must be its own."""
    supernet = supernet_of("convnext_digits")
    supernet.set_subnet(supernet.all_pruned())
    twin = copy.deepcopy(supernet)
    assert len(list(twin.parameters())) == len(list(supernet.parameters()))
    x = images("convnext_digits")
    with torch.no_grad():
        expected = supernet(x)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(supernet(x), expected)
    block = twin.blocks["stages.0.blocks.0"]
    assert block.keep.mlp.fc1.weight is block.choices["full"].part("mlp.fc1").weight
    assert all(isinstance(norm, _BatchNorm) for norm in block.norms())


def test_calibrating_costs_a_block_no_more_in_a_deep_network():
    """Each block runs a number of times that does not depend on how many there are."""
    calls = {}
    for depth in (3, 12):
        text = f"""
version: 1
model: {{timm: convnext_atto, patch_size: 2, depths: [{depth}, 1, 1, 1], dims: [8, 8, 8, 8]}}
input: [3, 32, 32]
structures:
  block:
    - sum: [[conv_dw, norm, mlp.fc1, mlp.act, mlp.drop1, mlp.fc2, mlp.drop2, {{optional: gamma}}, drop_path], []]
recipes:
  full: {{replace: {{norm: batchnorm, mlp.act: identity}}, append: [gelu, batchnorm], merge: all}}
blocks:
  - {{match: "stages.*.blocks.*", structure: block, recipes: [full]}}
"""
        net = build_supernet(parse(text), num_classes=4, seed=0)
        net.set_subnet(net.all_pruned())
        net.calibrate([torch.randn(2, 3, 32, 32)])  # looks once whether the network can be entered between its blocks
        ran = []
        for name, block in net.blocks.items():
            block.choices["full"].register_forward_pre_hook(lambda module, args, name=name, ran=ran: ran.append(name))
        net.calibrate([torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)])
        calls[depth] = max(Counter(ran).values())
    assert calls[12] == calls[3] <= 6
