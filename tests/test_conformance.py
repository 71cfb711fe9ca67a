"""Whether a spec tells the truth: structure against forward, claims against sizes, recipes against their promise."""

import copy
import dataclasses

import pytest
import torch
from networks import ODD_SIZES, kinds, parse, random_blocks, spec_of
from torch import nn

from updp.certificate import BOUND
from updp.conformance import TOLERANCE, check_claims, check_conformance, check_spec, odd_size
from updp.errors import SpecError
from updp.flow import FlowModule
from updp.spec import list_specs

# Blocks, and kinds of blocks: a block with drop path is of another kind than one without.
KINDS = {
    "convnext_atto": (12, 5),
    "convnext_base": (36, 5),
    "convnext_digits": (10, 4),
    "convnext_small": (36, 5),
    "convnext_tiny": (18, 5),
    "convnextv2_atto": (12, 5),
    "deit_base_distilled_patch16_224": (12, 2),
    "deit_base_patch16_224": (12, 2),
    "deit_digits": (6, 2),
    "deit_small_distilled_patch16_224": (12, 2),
    "deit_small_patch16_224": (12, 2),
    "deit_tiny_distilled_patch16_224": (12, 2),
    "deit_tiny_patch16_224": (12, 2),
    "mobilenetv1_100": (13, 9),
    "mobilenetv2_100": (17, 12),
    "mobilenetv2_140": (17, 12),
    "resnet101": (33, 8),
    "resnet18": (8, 8),
    "resnet34": (16, 8),
    "resnet50": (16, 8),
    "swin_base_patch4_window7_224": (24, 5),
    "swin_tiny_patch4_window7_224": (12, 5),
    "tf_efficientnet_lite0": (16, 12),
    "tf_efficientnet_lite1": (21, 12),
    "tf_efficientnet_lite2": (21, 12),
    "tf_efficientnet_lite3": (24, 12),
    "vgg11_bn": (3, 3),
    "vgg13_bn": (5, 5),
}


@pytest.mark.parametrize("name", list_specs())
def test_every_shipped_spec_tells_the_truth(name):
    """At its own size: structure in eval and train mode, claims, certificates of every recipe, depth saved."""
    spec = spec_of(name)
    report = check_spec(spec)
    assert (report.blocks, report.kinds) == KINDS[name]
    assert report.conformance <= TOLERANCE
    assert report.worst <= BOUND
    assert {(row.block, row.recipe) for row in report.recipes} >= {
        (block, recipe) for block, recipes in kinds(name).items() for recipe in recipes
    }
    for group in spec.blocks:
        rows = [row for row in report.recipes if row.structure == group.structure]
        assert [row.recipe for row in rows] == list(group.recipes) * (len(rows) // len(group.recipes))
    assert {row.recipe for row in report.recipes} == set(spec.recipes)
    for row in report.recipes:
        saved = row.depth[0] - row.depth[1]
        assert saved == 0 if spec.recipes[row.recipe].kind == "reparam" else saved > 0
    default = {group.structure: group.recipes[0] for group in spec.blocks}
    assert sum(row.blocks for row in report.recipes if row.recipe == default[row.structure]) == report.blocks


@pytest.mark.parametrize("name", [name for name, size in ODD_SIZES.items() if size is not None])
def test_every_spec_of_free_size_tells_the_truth_at_an_odd_size(name):
    size = ODD_SIZES[name]
    report = check_spec(spec_of(name), size=size)
    assert report.input == size
    assert report.worst <= BOUND


def test_odd_sizes_are_found_where_a_network_takes_them():
    for name, size in ODD_SIZES.items():
        found = odd_size(spec_of(name))
        assert (found is None) == (size is None), name
        assert found is None or (found[1] % 2 == found[2] % 2 == 1 and found[1] != found[2])


def test_dearer_merges_are_told():
    rows = {(row.block, row.recipe): row for row in check_spec(spec_of("convnext_digits")).recipes}
    assert not rows["stages.0.blocks.0", "pointwise"].dearer
    assert not rows["stages.0.blocks.0", "full"].dearer, "24 channels: 9 x 24 x 24 < 8 x 24 x 24 + 49 x 24"
    assert rows["stages.2.blocks.0", "full"].dearer, "96 channels"
    assert rows["stages.0.blocks.0", "full"].depth == (3, 1)
    assert rows["stages.0.blocks.0", "pointwise"].depth == (3, 2)


# --- structures that compute something else ---

RESIDUAL = """
version: 1
model: {timm: MODEL}
input: [3, 64, 64]
structures:
  block: STRUCTURE
recipes:
  full: {append: [relu], merge: all}
blocks:
  - {match: "PLACE", structure: block, recipes: [full]}
"""
NEXT = ("convnext_atto", "stages.2.blocks.1")
NEXT_STEPS = "conv_dw, norm, mlp.fc1, mlp.act, mlp.drop1, mlp.fc2, mlp.drop2, gamma, drop_path"
BASIC = ("resnet18", "layer2.1")
BASIC_STEPS = "conv1, bn1, drop_block, act1, conv2, bn2, drop_path"
DOWN = ("resnet18", "layer2.0")
INVERTED = ("mobilenetv2_100", "blocks.2.1")
INVERTED_STEPS = "conv_pw, bn1, conv_dw, bn2, conv_pwl, bn3, drop_path"


def message_of(model_and_place, structure) -> str:
    """What is said about a wrong structure."""
    model, place = model_and_place
    text = RESIDUAL.replace("MODEL", model).replace("STRUCTURE", structure).replace("PLACE", place)
    with pytest.raises(SpecError) as caught:
        check_spec(parse(text))
    assert all(problem.place is not None for problem in caught.value.problems)
    return str(caught.value)


def without(steps: str, *left_out: str) -> str:
    return ", ".join(step for step in steps.split(", ") if step not in left_out)


@pytest.mark.parametrize(("block", "steps"), [(NEXT, NEXT_STEPS), (INVERTED, INVERTED_STEPS)])
def test_drop_path_left_out_is_caught_in_train_mode_only(block, steps):
    message = message_of(block, f"[{{sum: [[{without(steps, 'drop_path')}], []]}}]")
    assert "in train mode" in message
    assert "not declared: drop_path" in message


def test_drop_path_left_out_of_a_block_with_an_activation_behind():
    message = message_of(BASIC, f"[{{sum: [[{without(BASIC_STEPS, 'drop_path')}], []]}}, act2]")
    assert "in train mode" in message


def test_dropout_left_out_is_caught():
    message = message_of(NEXT, f"[{{sum: [[{without(NEXT_STEPS, 'mlp.drop1')}], []]}}]")
    assert "in train mode" in message
    assert "mlp." in message


@pytest.mark.parametrize(
    ("block", "structure", "expected"),
    [
        (NEXT, f"[{{sum: [[{without(NEXT_STEPS, 'gamma')}], []]}}]", "first step that differs is 'drop_path'"),
        (NEXT, f"[{NEXT_STEPS}]", "put together differs"),
        (NEXT, f"[{{sum: [[{NEXT_STEPS}], [], []]}}]", "put together differs"),
        (BASIC, f"[{{sum: [[{BASIC_STEPS}], []]}}]", "not declared: act2"),
        (BASIC, "[{sum: [[conv1, bn1, act1, bn2, conv2, drop_path], []]}, act2]", "first step that differs is 'bn2'"),
        (BASIC, "[{sum: [[conv2, bn1, act1, conv1, bn2, drop_path], []]}, act2]", "first step that differs is 'conv2'"),
        (DOWN, f"[{{sum: [[{BASIC_STEPS}], [downsample.0]]}}, act2]", "first step that differs is 'act2'"),
        (INVERTED, f"[{{sum: [[{without(INVERTED_STEPS, 'bn2')}], []]}}]", "first step that differs is 'conv_pwl'"),
    ],
)
def test_a_structure_that_computes_something_else_is_told_where(block, structure, expected):
    message = message_of(block, structure)
    assert "in eval mode" in message
    assert expected in message


@pytest.mark.parametrize(
    ("block", "structure", "expected"),
    [
        (DOWN, "[{sum: [[conv2, bn1, act1, conv1, bn2], [downsample.0, downsample.1]]}, act2]", "conv2"),
        (DOWN, f"[{{sum: [[{BASIC_STEPS}], []]}}, act2]", "sum"),
        (INVERTED, "[{sum: [[conv_pw, bn2, conv_dw, bn1, conv_pw, bn3], []]}]", "conv_pw"),
        (NEXT, "[{sum: [[conv_dw, norm, mlp.fc2, mlp.act, mlp.fc1, gamma], []]}]", "mlp.fc2"),
    ],
)
def test_a_structure_that_does_not_run_is_told_where(block, structure, expected):
    """Channels or sizes that do not fit are the spec's mistake, not a traceback."""
    message = message_of(block, structure)
    assert "does not run" in message
    assert expected in message


def test_two_percent_in_one_branch_are_caught_and_named():
    block = copy.deepcopy(random_blocks("resnet34")["layer2.0"])
    assert check_conformance(block) <= TOLERANCE
    parts = block.flow.named_parts
    for step in ("downsample.0", "conv2"):
        wrong = copy.deepcopy(parts[step])
        with torch.no_grad():
            wrong.weight.mul_(1.02)
        spoilt = copy.copy(block)
        spoilt.flow = FlowModule(block.flow.nodes, {**parts, step: wrong}, block.flow.entry)
        with pytest.raises(SpecError, match=f"first step that differs is '{step}'"):
            check_conformance(spoilt)


def test_train_mode_is_really_random():
    """Conformance in train mode means something only if masks are drawn there."""
    block = copy.deepcopy(random_blocks("convnext_digits", 0.3)["stages.2.blocks.1"])
    assert check_conformance(block) == 0.0
    block.module.drop_path.drop_prob = 0.5
    x = torch.randn(32, *block.input_shape[1:], dtype=torch.float64)
    with torch.no_grad():
        first, second = (block.module.train()(x) for _ in range(2))
    assert not torch.equal(first, second)


def test_all_problems_come_together():
    text = RESIDUAL.replace("MODEL", "resnet18").replace("STRUCTURE", f"[{{sum: [[{BASIC_STEPS}], []]}}]")
    text = text.replace(
        '  - {match: "PLACE"', "  - {match: layer4.1, structure: block, recipes: [full]}\n  - {match: layer3.1"
    )
    with pytest.raises(SpecError) as caught:
        check_spec(parse(text))
    (problem,) = caught.value.problems
    assert " of layer3.1, layer4.1 " in problem.message
    assert problem.place.line == text[: text.index("conv1")].count("\n") + 1


def test_mistakes_are_told_where_they_are_written():
    """The step, not the entry of `blocks`: the structure may stand in another file."""
    text = RESIDUAL.replace("MODEL", "resnet18").replace("PLACE", "layer2.1")
    steps = BASIC_STEPS.replace("conv2, bn2", "bn2, conv2")
    text = text.replace("STRUCTURE", f"\n    - sum:\n      - [{steps}]\n      - []\n    - act2")
    with pytest.raises(SpecError, match="first step that differs is 'bn2'") as caught:
        check_spec(parse(text))
    line = next(number for number, row in enumerate(text.splitlines(), 1) if "bn2" in row)
    column = text.splitlines()[line - 1].index("bn2") + 1
    assert [(p.place.line, p.place.column) for p in caught.value.problems] == [(line, column)]


def test_a_merge_that_is_refused_is_told_at_its_recipe():
    text = RESIDUAL.replace("MODEL", "resnet18").replace("PLACE", "layer2.1")
    text = text.replace("STRUCTURE", f"[{{sum: [[{BASIC_STEPS}], []]}}, act2]")
    text = text.replace("{append: [relu], merge: all}", "{replace: {act1: identity}, padding: keep}")
    with pytest.raises(SpecError, match=r"recipes\.full: block layer2\.1: .*border ring") as caught:
        check_spec(parse(text))
    row = caught.value.problems[0].place.line
    assert text.splitlines()[row - 1].strip().startswith("full:")


# --- claims ---

WINDOWS = """
version: 1
model: {timm: swin_tiny_patch4_window7_224, img_size: 56, depths: [2, 1, 1, 1], embed_dim: 24}
input: [3, 56, 56]
structures:
  block:
    - sum: [[norm1, {opaque: _attn, CLAIM}, drop_path1], []]
    - sum: [[norm2, mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2, drop_path2], []]
recipes:
  mlp: {replace: {norm1: batchnorm, norm2: batchnorm, mlp.act: identity}, append: [gelu, batchnorm]}
blocks:
  - {match: "layers.0.blocks.0", structure: block, recipes: [mlp]}
"""


def test_a_claim_that_holds_at_the_nominal_size_only_is_refused():
    """Windows are padded after the norm: a shift folded into the queries is missing on the padding."""
    with pytest.raises(SpecError, match=r"cannot be folded into attn.qkv: wrong by .* at input \[2, 10, 15, 24\]"):
        check_spec(parse(WINDOWS.replace("CLAIM", "enters: attn.qkv")))


def test_a_claim_that_holds_at_every_size_is_taken():
    report = check_spec(parse(WINDOWS.replace("CLAIM", "leaves: attn.proj")))
    assert report.worst <= BOUND


TRANSFORMER = """
version: 1
model: {timm: vit_tiny_patch16_224, img_size: 32, depth: 1}
input: [3, 32, 32]
structures:
  block:
    - sum: [[norm1, {opaque: attn, CLAIM}, drop_path1], []]
    - sum: [[norm2, mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2, drop_path2], []]
recipes:
  mlp: {replace: {norm1: batchnorm, norm2: batchnorm, mlp.act: identity}, append: [gelu, batchnorm]}
blocks:
  - {match: "blocks.0", structure: block, recipes: [mlp]}
"""


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("enters: attn.proj", "cannot be folded into attn.proj: wrong by"),
        ("leaves: attn.qkv", "attn.qkv"),
        ("enters: attn.query", "enters: .*attn.query"),
        ("enters: attn.attn_drop", "attn.attn_drop can take no norm: it is Dropout"),
    ],
)
def test_false_claims_are_refused(claim, message):
    with pytest.raises(SpecError, match=message) as caught:
        check_spec(parse(TRANSFORMER.replace("CLAIM", claim)))
    assert caught.value.problems[0].place.line == 7


class PadsAfterNorm(nn.Module):
    """A step whose convolution pads: a shift in front cannot go into it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


class PadsByHand(PadsAfterNorm):
    """The same, and the convolution itself says that it does not pad."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.conv(nn.functional.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize(("step", "message"), [(PadsAfterNorm, "pads its input"), (PadsByHand, "wrong by")])
def test_a_step_that_pads_takes_no_norm(step, message):
    block = copy.deepcopy(random_blocks("deit_digits")["blocks.0"])
    opaque, _ = block.opaques["attn"]
    block.opaques = {"attn": (dataclasses.replace(opaque, enters=("attn.conv",)), (2, 8, 12, 12))}
    block.flow.entry = "first"
    block.flow.extras = {}
    block.flow.parts["attn"] = step().double()
    with pytest.raises(SpecError, match=message):
        check_claims(block)


# --- recipes that do not do what a recipe is for ---


def check_recipe(recipe: str) -> None:
    text = RESIDUAL.replace("MODEL", "resnet18").replace("STRUCTURE", f"[{{sum: [[{BASIC_STEPS}], []]}}, act2]")
    text = text.replace("PLACE", "layer2.1").replace("{append: [relu], merge: all}", recipe)
    text = text.replace("drop_path]", "{optional: drop_path}]")
    check_spec(parse(text))


def test_a_recipe_that_shortens_nothing_is_refused():
    with pytest.raises(SpecError, match=r"merges to 2 convolutions and linears in a row.*kind: reparam"):
        check_recipe("{append: [batchnorm], merge: []}")


def test_a_recipe_whose_merge_is_not_exact_is_refused():
    with pytest.raises(SpecError, match="padding: first"):
        check_recipe("{replace: {act1: identity}, append: [batchnorm], padding: keep}")
    check_recipe("{replace: {act1: identity}, append: [batchnorm]}")


def test_blocks_of_one_group_are_of_one_class():
    text = RESIDUAL.replace("MODEL", "mobilenetv2_100").replace("STRUCTURE", "[conv_dw, bn1]")
    with pytest.raises(SpecError, match=r"several classes: .*DepthwiseSeparableConv.*InvertedResidual"):
        check_spec(parse(text.replace("PLACE", "blocks.*.0")))


def test_steps_that_do_not_exist_are_listed_with_those_that_do():
    text = (
        RESIDUAL.replace("MODEL", "resnet18").replace("STRUCTURE", "[conv1, bn_1, conv3]").replace("PLACE", "layer2.1")
    )
    with pytest.raises(SpecError) as caught:
        check_spec(parse(text))
    assert [p.message.split(",")[0] for p in caught.value.problems] == [
        "no such step in BasicBlock: got 'bn_1'",
        "no such step in BasicBlock: got 'conv3'",
    ]
    assert "did you mean 'bn1'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("convnext_digits", "replace: {norm: batchnorm,", "replace: {norm: batchnorm, conv_dw: batchnorm,", "resize"),
        (
            "convnext_digits",
            "mlp.act: identity,",
            "mlp.act: identity, mlp.fc1: identity,",
            "does not run at step 'mlp.fc2'",
        ),
        ("deit_digits", "mlp.act: batchnorm}", "mlp.act: batchnorm, attn: identity}", None),
        ("deit_digits", "mlp.act: batchnorm}", "mlp.act: batchnorm, attn: batchnorm}", None),
        ("deit_digits", "mlp.act: batchnorm}", "mlp.act: batchnorm, attn: gelu}", None),
        ("deit_digits", "{opaque: attn, enters: attn.qkv, leaves: attn.proj}", "{opaque: forward}", "no such step"),
        ("deit_digits", "{opaque: attn, enters: attn.qkv, leaves: attn.proj}", "{opaque: __class__}", "no such step"),
    ],
)
def test_strange_recipes_and_steps_end_in_a_message_or_are_exact(name, old, new, told):
    text = spec_of(name).text
    assert old in text
    spec = parse(text.replace(old, new))
    if told is not None:
        with pytest.raises(SpecError, match=told):
            check_spec(spec)
        return
    assert check_spec(spec).worst <= BOUND
