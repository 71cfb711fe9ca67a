"""Every merged operator of every spec, kind of block and recipe is exact, and its certificate would see a mistake."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from networks import (
    ODD_SIZES,
    SAME_BLOCKS_AS,
    Case,
    all_cases,
    kinds_but_widths,
    marks,
    merge_block,
    merge_case,
    merged_ops,
    merged_tensors,
    random_blocks,
    random_input,
    random_model,
    spec_of,
)
from torch import nn

from updp.certificate import BOUND, Certificate, OpRecord, certify, certify_block, merge, relative
from updp.merging import MergedBlock, claims_of, merge_flow
from updp.spec import list_specs
from updp.subnet import SubnetConfig
from updp.supernet import ChoiceBlock, build_supernet

# Kinds of blocks times recipes. A new spec belongs here.
KINDS_TIMES_RECIPES = {
    "convnext_atto": 8,
    "convnext_base": 8,
    "convnext_digits": 6,
    "convnext_small": 8,
    "convnext_tiny": 8,
    "convnextv2_atto": 8,
    "deit_base_distilled_patch16_224": 1,
    "deit_base_patch16_224": 1,
    "deit_digits": 1,
    "deit_small_distilled_patch16_224": 1,
    "deit_small_patch16_224": 1,
    "deit_tiny_distilled_patch16_224": 1,
    "deit_tiny_patch16_224": 1,
    "mobilenetv1_100": 9,
    "mobilenetv2_100": 23,
    "mobilenetv2_140": 23,
    "resnet101": 8,
    "resnet18": 7,
    "resnet34": 7,
    "resnet50": 8,
    "swin_base_patch4_window7_224": 5,
    "swin_tiny_patch4_window7_224": 5,
    "tf_efficientnet_lite0": 23,
    "tf_efficientnet_lite1": 23,
    "tf_efficientnet_lite2": 23,
    "tf_efficientnet_lite3": 23,
    "vgg11_bn": 3,
    "vgg13_bn": 5,
}
CASES = all_cases()

NETWORKS = [(name, recipe) for name in list_specs() for recipe in spec_of(name).recipes]


def test_every_case_is_covered():
    counts = {name: sum(case.spec == name for case in CASES) for name in list_specs()}
    assert counts == KINDS_TIMES_RECIPES
    assert len(CASES) == 248
    assert set(ODD_SIZES) == set(list_specs())
    assert len(NETWORKS) == 46


def test_what_is_slow_repeats_what_is_not():
    """A large network that is left to the slow tests has no block that a smaller one, which is not, lacks."""
    assert set(SAME_BLOCKS_AS) <= set(list_specs())
    for name, other in SAME_BLOCKS_AS.items():
        assert other not in SAME_BLOCKS_AS
        assert kinds_but_widths(name) <= kinds_but_widths(other), f"{name} has other blocks than {other}"
    assert not kinds_but_widths("convnext_atto") <= kinds_but_widths("convnext_tiny"), "1x1 convolutions in the MLP"
    assert not kinds_but_widths("convnextv2_atto") <= kinds_but_widths("convnext_atto"), "a response norm"
    assert sum(case.spec not in SAME_BLOCKS_AS for case in CASES) == 212


@pytest.fixture(scope="module", params=[pytest.param(case, marks=marks(case.spec), id=str(case)) for case in CASES])
def merged(request):
    case: Case = request.param
    return case, *merge_case(case)


def records_of(block: MergedBlock, x: torch.Tensor) -> dict[str, OpRecord]:
    with torch.no_grad():
        return {record.op: record for record in certify_block(block, x)}


def test_every_merged_operator_is_exact_at_the_nominal_size(merged):
    case, bound, block = merged
    x = random_input(bound)
    records = records_of(block, x)
    assert list(records) == [segment.name for segment in merged_ops(block.segments)]
    assert records
    for record in records.values():
        assert record.ok, f"{case} {record}"
        assert record.worst <= BOUND == record.bound
        if x.dim() == 4:  # the last maps of a small network are all ring
            assert record.ring is not None
            assert record.interior is not None or min(x.shape[2:]) <= 4
    with torch.no_grad():
        assert relative(block.merged(x), block.source(x)) <= BOUND


def test_shapes_are_known_without_values(merged):
    """What counting and loading build: the same modules, with weights on the meta device."""
    _, bound, block = merged
    hollow, segments = merge_flow(block.source, bound.channels[0], claims_of(bound), values=False)
    assert segments == block.segments
    assert hollow.nodes == block.merged.nodes
    assert {k: v.shape for k, v in hollow.state_dict().items()} == {
        k: v.shape for k, v in block.merged.state_dict().items()
    }
    for segment in merged_ops(segments):
        if not segment.name.startswith("fold."):
            assert all(parameter.is_meta for parameter in hollow.part(segment.name).parameters())


def test_a_mutated_tensor_fails_its_operators_certificate(merged):
    """One element off by 1e-6 of the tensor's largest: the certificate of that operator fails, no other does."""
    case, bound, block = merged
    x = random_input(bound)
    generator = torch.Generator().manual_seed(5)
    mutated = set()
    for target in merged_tensors(block, claims_of(bound)):
        values = target.tensor.view(-1)
        candidates = target.visible(*x.shape[-2:]).view(-1).nonzero()[:, 0]
        where = candidates[torch.randint(len(candidates), (), generator=generator)]
        kept = values[where].clone()
        values[where] += 1e-6 * values.abs().max()
        failed = [record.op for record in records_of(block, x).values() if not record.ok]
        values[where] = kept
        assert failed == [target.op], f"{case}: {target.op} {target.name}[{int(where)}]"
        mutated.add(target.op)
    assert mutated == {segment.name for segment in merged_ops(block.segments)}


# --- whole networks ---


def certify_pruned(name: str, recipe: str, size) -> Certificate:
    supernet = build_supernet(spec_of(name), seed=0, resized=True).eval()
    choices = {block: recipe for block, bound in supernet.bound.items() if recipe in bound.group.recipes}
    supernet.set_subnet(SubnetConfig(name, choices))
    return certify(supernet, weights="random", size=size)


@pytest.mark.parametrize(("name", "recipe"), [pytest.param(*network, marks=marks(network[0])) for network in NETWORKS])
def test_all_pruned_networks_are_exact(name, recipe):
    """Every block, not only every kind, and the logits; at an odd size where the network takes one."""
    size = ODD_SIZES[name]
    certificate = certify_pruned(name, recipe, size)
    assert certificate.ok, certificate.failures()
    assert certificate.input == (2, *(size or spec_of(name).input))
    pruned = {record.block for record in certificate.ops}
    assert pruned == set(certificate.blocks)
    assert len(pruned) == (1 if recipe == "linear" else PRUNED_BLOCKS[name])
    assert certificate.logits <= BOUND
    assert 0 < certificate.float32 < 1e-3


PRUNED_BLOCKS = {
    "convnext_atto": 12,
    "convnext_base": 36,
    "convnext_digits": 10,
    "convnext_small": 36,
    "convnext_tiny": 18,
    "convnextv2_atto": 12,
    "deit_base_distilled_patch16_224": 12,
    "deit_base_patch16_224": 12,
    "deit_digits": 6,
    "deit_small_distilled_patch16_224": 12,
    "deit_small_patch16_224": 12,
    "deit_tiny_distilled_patch16_224": 12,
    "deit_tiny_patch16_224": 12,
    "mobilenetv1_100": 13,
    "mobilenetv2_100": 16,
    "mobilenetv2_140": 16,
    "resnet101": 33,
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "swin_base_patch4_window7_224": 24,
    "swin_tiny_patch4_window7_224": 12,
    "tf_efficientnet_lite0": 15,
    "tf_efficientnet_lite1": 20,
    "tf_efficientnet_lite2": 20,
    "tf_efficientnet_lite3": 23,
    "vgg11_bn": 3,
    "vgg13_bn": 5,
}


@pytest.mark.parametrize("name", ["convnext_digits", "deit_digits", "tf_efficientnet_lite0"])
def test_a_mixed_subnet_is_exact_with_its_given_weights(name):
    supernet = build_supernet(spec_of(name), seed=0, resized=True).eval()
    config = supernet.sample(torch.Generator().manual_seed(1), count=4)
    supernet.set_subnet(config)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    network, certificate = merge(supernet, certificate_size=ODD_SIZES[name])
    assert certificate.ok, certificate.failures()
    assert certificate.weights == "given"
    assert set(certificate.blocks) == set(config.pruned)
    assert not any(isinstance(module, ChoiceBlock) for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in supernet.state_dict().items())
    x = torch.randn(2, *(ODD_SIZES[name] or spec_of(name).input))
    with torch.no_grad():
        assert relative(network(x), supernet(x)) < 1e-4


@pytest.mark.parametrize(("name", "size"), [(n, s) for n, s in ODD_SIZES.items() if s is None])
def test_a_network_of_fixed_size_has_no_odd_one(name, size):
    with pytest.raises(AssertionError):
        random_model(spec_of(name))(torch.zeros(1, 3, 37, 45, dtype=torch.float64))


# --- planted errors: what an engine might get wrong, and what sees it ---


def planted(case: Case, spoil) -> dict[str, OpRecord]:
    """The records of a block whose merged form was made from a spoilt copy of its source."""
    bound, block = merge_case(case)
    wrong = copy.deepcopy(block.source)
    with torch.no_grad():
        spoil(wrong)
    merged, _ = merge_flow(wrong, bound.channels[0], claims_of(bound))
    assert merged.nodes == block.merged.nodes
    return records_of(MergedBlock(block.name, block.source, merged, block.segments), random_input(bound))


LITE = Case("tf_efficientnet_lite0", "blocks.2.1", "full")
BASIC = Case("resnet34", "layer2.1", "full")
DOWN = Case("resnet34", "layer2.0", "full")
NEXT = Case("convnext_tiny", "stages.2.blocks.0", "full")
TOKENS = Case("deit_tiny_patch16_224", "blocks.0", "mlp")


def change_eps(flow, eps):
    norms = [module for module in flow.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms[:2]:
        assert norm.eps != eps
        norm.eps = eps


def scale_weight(flow, step, factor):
    flow.part(step).weight.mul_(factor)


PLANTED = {
    "eps 1e-3 -> 1e-5": (LITE, lambda flow: change_eps(flow, 1e-5), 1e-4),
    "eps 1e-5 -> 1e-6": (BASIC, lambda flow: change_eps(flow, 1e-6), 1e-7),
    "2 % in the only branch": (LITE, lambda flow: scale_weight(flow, "conv_pwl", 1.02), 1e-3),
    "2 % in the main branch": (DOWN, lambda flow: scale_weight(flow, "conv2", 1.02), 1e-3),
    "2 % in the shortcut": (DOWN, lambda flow: scale_weight(flow, "downsample.0", 1.02), 1e-3),
    "2 % in the MLP": (TOKENS, lambda flow: scale_weight(flow, "mlp.fc2", 1.02), 1e-3),
    "2 % in the layer scale": (NEXT, lambda flow: scale_weight(flow, "gamma", 1.02), 1e-3),
    "layer scale left out": (NEXT, lambda flow: flow.part("gamma").weight.fill_(1.0), 1e-1),
    "bias of fc1 dropped": (TOKENS, lambda flow: flow.part("mlp.fc1").bias.zero_(), 1e-2),
    "bias of conv_dw dropped": (NEXT, lambda flow: flow.part("conv_dw").bias.zero_(), 1e-2),
    "norm before attention left out": (TOKENS, lambda flow: flow.part("norm1").running_mean.zero_(), 1e-3),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name):
    case, spoil, size = PLANTED[name]
    failed = [record for record in planted(case, spoil).values() if not record.ok]
    assert failed
    assert max(record.error for record in failed) > size


def test_padding_left_inside_is_caught_in_the_ring_only():
    """The paper's rule forgotten: the interior is exact to rounding, so only the ring tells."""
    bound = random_blocks("mobilenetv2_100")["blocks.2.1"]
    rule = spec_of("mobilenetv2_100").recipes["full"]
    moved = merge_block(bound, rule)
    inside = merge_block(bound, dataclasses.replace(rule, padding="keep"))
    wrong = MergedBlock(bound.name, inside.source, moved.merged, moved.segments)
    source = dataclasses.replace(moved.segments[0], source=inside.segments[0].source)
    wrong = dataclasses.replace(wrong, segments=(source, *moved.segments[1:]))
    record = records_of(wrong, random_input(bound))["merged.0"]
    assert not record.ok
    assert record.ring > 1e-3
    assert record.error > 1e-3
    assert record.interior < 1e-13
    right = records_of(inside, random_input(bound))["merged.0"]
    assert right.ok, "with a bias map the same source is exact"


def test_a_shifted_shortcut_is_caught():
    """A strided 1x1 shortcut belongs on the centre tap, not on the first one."""
    bound, block = merge_case(DOWN)
    conv = block.merged.part("merged.0")
    down, norm = block.source.part("downsample.0"), block.source.part("downsample.1")
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shortcut = (down.weight * scale[:, None, None, None])[:, :, 0, 0]
    with torch.no_grad():
        conv.weight[:, :, 1, 1] -= shortcut
        conv.weight[:, :, 0, 0] += shortcut
    record = records_of(block, random_input(bound))["merged.0"]
    assert not record.ok
    assert min(record.error, record.ring, record.interior) > 1e-2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_caught(value):
    bound, block = merge_case(LITE)
    with torch.no_grad():
        block.merged.part("merged.0").weight[0, 0, 0, 0] = value
    assert not records_of(block, random_input(bound))["merged.0"].ok


# --- the certificate itself ---


def test_relative_errors():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert relative(a, b) == 0.5 / 2.5
    assert relative(a, b, torch.tensor([0.25])) == 2.0
    assert relative(a, torch.zeros(3)) == math.inf
    assert relative(torch.tensor([math.nan, 0.0]), b) == math.inf
    assert relative(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative(torch.ones(2), torch.zeros(2)) == math.inf


def record(error=0.0, ring=None, interior=None):
    return OpRecord("blocks.0", "merged.0", ("conv", "bn"), error, ring, interior, BOUND)


def certificate(*records, block=0.0, logits=0.0):
    return Certificate("random", (2, 3, 8, 8), records, {"blocks.0": block}, logits, 1e-7, {"updp": "0"})


@pytest.mark.parametrize("bad", [1e-8, math.nan, math.inf])
def test_one_bad_figure_fails_a_certificate(bad):
    assert certificate(record()).ok
    for wrong in (
        certificate(record(), record(error=bad)),
        certificate(record(ring=bad, interior=0.0)),
        certificate(record(ring=0.0, interior=bad)),
        certificate(record(), block=bad),
        certificate(record(), logits=bad),
    ):
        assert not wrong.ok
        assert len(wrong.failures()) == 1
        assert json.loads(json.dumps(wrong.to_json()))["ok"] is False


def test_certificates_survive_json():
    first = certify_pruned("convnext_digits", "pointwise", (3, 37, 45))
    again = Certificate.from_json(json.loads(json.dumps(first.to_json())))
    assert again == first
    assert first.to_json()["ok"] is True
    assert set(first.versions) >= {"updp", "torch", "timm"}


def test_real_weights_may_round_where_the_shortcut_is_far_larger():
    """A branch 1e-8 of its shortcut cannot be exact to 1e-9 of itself in float64; random weights get no such leave."""
    bound, block = merge_case(NEXT)
    with torch.no_grad():
        block.source.part("gamma").weight.mul_(1e-8)
    merged, segments = merge_flow(block.source, bound.channels[0], claims_of(bound))
    small = MergedBlock(block.name, block.source, merged, segments)
    with torch.no_grad():
        strict, given = (certify_block(small, random_input(bound), given=g)[0] for g in (False, True))
    assert strict.error == given.error
    assert strict.bound == BOUND < given.bound < 1e-4
    assert given.ok
    assert not strict.ok
