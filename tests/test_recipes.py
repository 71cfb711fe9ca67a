"""What a recipe makes of a block: padding and strides, partial merges, appended layers, opaque steps, sharing."""

import dataclasses

import pytest
import timm.layers
import torch
from networks import merge_block, merged_ops, parse, random_blocks, random_input, random_model, spec_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp.affine import Same
from updp.certificate import BOUND, certify_block, merge
from updp.errors import MergeError, SpecError
from updp.flow import Call, Parallel, Run, walk
from updp.kinds import kind_of
from updp.layers import BatchNorm, Pad, PaddedConv2d, conv_padding
from updp.merging import MergedFlow, claims_of, merge_flow
from updp.recipe import prune
from updp.spec import ArchSpec
from updp.structure import bind, create_model
from updp.supernet import build_supernet


def blocks_of(spec: ArchSpec):
    """Toy structures need not be what the network computes: recipes work on what is declared."""
    return bind(spec, random_model(spec))


def rule_of(name: str, recipe: str, **changes):
    return dataclasses.replace(spec_of(name).recipes[recipe], **changes)


def is_exact(block, recipe) -> bool:
    merged = merge_block(block, recipe)
    x = random_input(block)
    with torch.no_grad():
        records = certify_block(merged, x)
        whole = (merged.merged(x) - merged.source(x)).abs().max() / merged.source(x).abs().max()
    return bool(records) and all(record.ok for record in records) and float(whole) <= BOUND


def geometry(conv):
    return conv.kernel_size, conv.stride, conv_padding(conv)


def names(flow) -> list[str]:
    return [node.name for node in walk(flow.nodes) if isinstance(node, Call)]


# --- padding to the front, stride to the end ---


def test_basic_block_before_and_after_the_kernel_change():
    """Padding (2, 0) while both weights are 3x3, (1, 0) once the first is 1x1; the baseline keeps its own."""
    block = random_blocks("resnet34")["layer1.0"]
    flow = prune(block, rule_of("resnet34", "full"))
    assert list(flow.pending) == ["conv1"]
    assert flow.part("pad.conv1").padding == (2, 2, 2, 2)
    assert geometry(flow.part("conv1")) == ((3, 3), (1, 1), (0, 0, 0, 0))
    assert geometry(flow.part("conv2")) == ((3, 3), (1, 1), (0, 0, 0, 0))
    assert flow.resize(0.5) == []
    assert flow.resize(0.67) == ["conv1"]
    assert flow.resize(1.0) == []
    assert flow.part("pad.conv2").padding == (1, 1, 1, 1)
    assert geometry(flow.part("conv1")) == ((1, 1), (1, 1), (0, 0, 0, 0))
    assert geometry(flow.part("conv2")) == ((3, 3), (1, 1), (0, 0, 0, 0))
    assert "pad.conv1" not in flow.named_parts
    assert torch.equal(flow.part("conv1").weight, block.module.conv1.weight[:, :, 1:2, 1:2])
    assert geometry(block.module.conv1) == ((3, 3), (1, 1), (1, 1, 1, 1))
    assert flow(random_input(block)).shape == block.output_shape


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("size", [(2, 64, 12, 12), (2, 64, 13, 11)])
def test_downsampling_block_strides_in_its_last_convolution(resized, size):
    block = random_blocks("resnet34")["layer2.0"]
    flow = prune(block, rule_of("resnet34", "full"), resized=resized)
    assert flow.part("conv1").stride == (1, 1)
    assert flow.part("conv2").stride == (2, 2)
    assert flow.part("downsample.0") is block.module.downsample[0]
    assert block.module.conv1.stride == (2, 2)
    x = torch.randn(size, dtype=torch.float64)
    with torch.no_grad():
        assert flow(x).shape == block.module(x).shape


def test_a_block_merges_only_in_its_final_shape():
    block = random_blocks("resnet34")["layer2.0"]
    flow = prune(block, rule_of("resnet34", "full"))
    with pytest.raises(MergeError, match="kernel changes of conv1 are still to come"):
        merge_flow(flow, 64)
    whole = prune(block, rule_of("resnet34", "full", resize={}))
    assert geometry(merge_flow(whole, 64)[0].part("merged.0")) == ((5, 5), (2, 2), (2, 2, 2, 2))
    assert is_exact(block, rule_of("resnet34", "full", resize={}))


def test_resized_at_once_equals_resized_later():
    block = random_blocks("resnet34")["layer2.0"]
    at_once = prune(block, rule_of("resnet34", "full"), resized=True)
    later = prune(block, rule_of("resnet34", "full"))
    later.resize(1.0)
    x = random_input(block)
    with torch.no_grad():
        assert torch.equal(at_once.eval()(x), later.eval()(x))
    assert at_once.nodes == later.nodes


def test_inverted_residual_pads_first_and_strides_in_the_depthwise_convolution():
    block = random_blocks("mobilenetv2_100")["blocks.2.0"]
    flow = prune(block, rule_of("mobilenetv2_100", "full"))
    assert names(flow)[:2] == ["pad.conv_dw", "conv_pw"]
    assert flow.part("pad.conv_dw").padding == (1, 1, 1, 1)
    assert geometry(flow.part("conv_dw")) == ((3, 3), (2, 2), (0, 0, 0, 0))
    assert flow.part("conv_pw") is block.module.conv_pw
    assert flow.part("conv_dw").weight is block.module.conv_dw.weight
    merged, _ = merge_flow(flow, block.channels[0])
    assert type(merged.part("merged.0")) is nn.Conv2d
    assert geometry(merged.part("merged.0")) == ((3, 3), (2, 2), (1, 1, 1, 1))


def test_same_padding_moves_to_the_front_and_stays_dynamic():
    spec = spec_of("tf_efficientnet_lite0")
    strided, plain = random_blocks(spec.name)["blocks.3.0"], random_blocks(spec.name)["blocks.2.1"]
    flow = prune(strided, spec.recipes["full"])
    kernel = strided.module.conv_dw.kernel_size
    assert flow.part("pad.conv_dw").padding == Same(kernel, (2, 2))
    merged, _ = merge_flow(flow, strided.channels[0])
    assert isinstance(merged.part("merged.0"), PaddedConv2d)
    assert merged.part("merged.0").pads == Same(kernel, (2, 2))
    for size in ((28, 28), (29, 28), (27, 31)):
        x = torch.randn(1, strided.channels[0], *size, dtype=torch.float64)
        with torch.no_grad():
            assert merged(x).shape[-2:] == tuple(-(-n // 2) for n in size)
            assert torch.allclose(merged(x), flow.eval()(x), rtol=0, atol=1e-10)
    assert prune(plain, spec.recipes["full"]).part("pad.conv_dw").padding == (2, 2, 2, 2)  # 5x5 at stride 1


def test_nothing_moves_if_the_padded_convolution_is_first():
    block = random_blocks("convnext_digits")["stages.0.blocks.0"]
    recipe = dataclasses.replace(spec_of("convnext_digits").recipes["full"], resize={})
    flow = prune(block, recipe)
    assert flow.part("conv_dw") is block.module.conv_dw
    assert not any(isinstance(part, Pad) for part in flow.named_parts.values())
    assert is_exact(block, recipe)


def test_padding_kept_gives_a_bias_map_for_an_inverted_residual():
    """What DepthShrinker trains: padding stays on the depthwise convolution; the border is repaired, not ignored."""
    for name, place in (("mobilenetv2_100", "blocks.2.1"), ("tf_efficientnet_lite0", "blocks.2.0")):
        block = random_blocks(name)[place]
        recipe = rule_of(name, "full", padding="keep")
        flow = prune(block, recipe)
        assert flow.part("conv_dw") is block.module.conv_dw
        merged, _ = merge_flow(flow, block.channels[0])
        assert merged.part("merged.0").taps is not None
        assert is_exact(block, recipe)


def test_padding_kept_is_refused_where_no_map_repairs_it():
    block = random_blocks("resnet34")["layer1.0"]
    with pytest.raises(MergeError, match=r"at conv2: .*padding: first"):
        merge_flow(prune(block, rule_of("resnet34", "full", padding="keep", resize={})), 64)


PREACT = """
version: 1
model: {timm: maxvit_rmlp_pico_rw_256, img_size: 64}
input: [3, 64, 64]
structures:
  conv:
    - sum:
        - [pre_norm, conv1_1x1, norm1, conv2_kxk, norm2, {optional: se}, conv3_1x1, drop_path]
        - [shortcut.pool, shortcut.expand]
recipes:
  full:
    replace: {pre_norm.act: identity, norm1.act: identity, norm2.act: identity, se: identity}
    append: [gelu]
    merge: [[pre_norm, conv3_1x1]]
blocks:
  - {match: "stages.1.blocks.0.conv", structure: conv, recipes: [full]}
"""


def test_padding_moves_before_a_norm_in_front():
    """A norm shifts zeros: the pad stands before the run's first affine operator, norm included."""
    spec = parse(PREACT)
    block = blocks_of(spec)["stages.1.blocks.0.conv"]
    flow = prune(block, spec.recipes["full"])
    assert names(flow)[:2] == ["pad.conv2_kxk", "pre_norm"]
    assert is_exact(block, spec.recipes["full"])


# --- what merges ---


def test_pointwise_keeps_depthwise_convolution_and_shortcut():
    block = random_blocks("convnext_tiny")["stages.0.blocks.0"]
    merged = merge_block(block, spec_of("convnext_tiny").recipes["pointwise"])
    dw, mlp = (merged.merged.part(name) for name in ("merged.0", "merged.1"))
    assert isinstance(dw, nn.Conv2d)
    assert (dw.groups, dw.kernel_size) == (96, (3, 3))
    assert isinstance(mlp, nn.Linear)
    assert (mlp.in_features, mlp.out_features) == (96, 96)
    assert any(isinstance(node, Parallel) and () in node.flows for node in merged.merged.nodes)
    steps = {s.name: [n.name for n in walk(s.source) if isinstance(n, Call)] for s in merged_ops(merged.segments)}
    assert steps["merged.0"] == ["conv_dw", "norm"]
    assert steps["merged.1"] == ["mlp.fc1", "mlp.act", "mlp.drop1", "mlp.fc2", "gamma"]


def test_full_takes_the_shortcut_in():
    block = random_blocks("convnext_digits")["stages.0.blocks.0"]
    merged = merge_block(block, spec_of("convnext_digits").recipes["full"])
    assert [name for name, _ in merged.merged.parts.named_children()] == ["merged_0", "append_0", "append_1"]
    assert merged.merged.part("merged.0").groups == 1


@pytest.mark.parametrize(
    ("merge", "operators"),
    [
        ((("conv_pw", "conv_dw"),), ["merged.0", "merged.1"]),
        ((("conv_dw", "conv_pwl"),), ["merged.0", "merged.1"]),
        ((("conv_pw", "conv_pwl"),), ["merged.0"]),
        ((), ["merged.0", "merged.1", "merged.2"]),
    ],
)
def test_partial_merges_are_exact(merge, operators):
    """Norms are fused whatever merges; what is not named stays its own operator."""
    block = random_blocks("mobilenetv2_100")["blocks.2.1"]
    recipe = rule_of("mobilenetv2_100", "full", merge=merge, merge_places=())
    merged = merge_block(block, recipe)
    assert [segment.name for segment in merged_ops(merged.segments)] == operators
    assert not any(
        kind_of(part).name == "batchnorm" for name, part in merged.merged.named_parts.items() if "append" not in name
    )
    assert is_exact(block, recipe)


NAMED = """
version: 1
model: {timm: resnet18}
input: [3, 33, 33]
structures:
  plain:
    - {sum: [[conv1, bn1, drop_block, act1, {sum: [[conv2, bn2], []], as: inner}], []], as: mix}
    - act2
recipes:
  whole: {replace: {act1: identity}, resize: {conv1: 1}, merge: [[mix]]}
  inside: {replace: {act1: identity}, resize: {conv1: 1}, merge: [[conv1, inner]]}
  after_sum: {append: [{after: inner, layers: [relu, batchnorm]}, batchnorm], merge: []}
blocks:
  - {match: layer2.1, structure: plain, recipes: [whole, inside, after_sum]}
"""


def test_named_sums_can_be_merged_and_appended_to():
    spec = parse(NAMED)
    block = blocks_of(spec)["layer2.1"]
    for name in ("whole", "inside"):
        assert is_exact(block, spec.recipes[name])
    whole = merge_block(block, spec.recipes["whole"])
    assert [segment.name for segment in merged_ops(whole.segments)] == ["merged.0"]
    inside = merge_block(block, spec.recipes["inside"])
    assert any(isinstance(node, Parallel) for node in inside.merged.nodes)
    flow = prune(block, spec.recipes["after_sum"])
    outer = flow.nodes[0]
    assert [getattr(node, "name", None) for node in outer.flows[0]][-3:] == ["inner", "append.0", "append.1"]
    assert flow.part("append.1").num_features == 128
    assert [node.name for node in flow.nodes[1:]] == ["act2", "append.2"]


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("[[conv1, conv2]]", "'act1' between 'conv1' and 'conv2' is not affine"),
        ("[[conv1, act2]]", "conv1, act2 are not steps of one flow"),
    ],
)
def test_merges_that_do_not_fit_are_refused(merge, message):
    spec = parse(
        """
version: 1
model: {timm: resnet18}
input: [3, 33, 33]
structures:
  plain: [{sum: [[conv1, bn1, drop_block, act1, conv2, bn2], []]}, act2]
recipes:
  bad: {append: [batchnorm], merge: MERGE}
blocks:
  - {match: layer2.1, structure: plain, recipes: [bad]}
""".replace("MERGE", merge)
    )
    with pytest.raises(SpecError, match=message) as caught:
        prune(blocks_of(spec)["layer2.1"], spec.recipes["bad"])
    assert caught.value.problems[0].place is not None
    assert caught.value.problems[0].where == "recipes.bad"


NORMS = """
version: 1
model: {timm: resnet18}
input: [3, 33, 33]
structures:
  norms: [{sum: [[bn1, act1], []], as: one}, {sum: [[bn2], []], as: two}, act2, conv1]
recipes:
  all: {replace: {act1: identity}, append: [relu]}
  named: {replace: {act1: identity}, append: [relu], merge: [[one, two]]}
blocks:
  - {match: layer2.1, structure: norms, recipes: [all, named]}
"""


def test_norms_alone_are_no_run():
    """Without a convolution or linear layer there is nothing that could become one operator."""
    spec = parse(NORMS)
    block = blocks_of(spec)["layer2.1"]
    flow = prune(block, spec.recipes["all"])
    assert not any(isinstance(node, Run) for node in walk(flow.nodes))
    x = random_input(block)
    merged, _ = merge_flow(flow.eval(), 128)
    with torch.no_grad():
        assert torch.allclose(merged(x), flow(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(SpecError, match="no convolution or linear layer in one, two"):
        prune(block, spec.recipes["named"])


def test_a_run_that_the_recipe_left_alone_stays():
    """`merge: all` merges what the recipe touched: the second branch is as it was."""
    spec = parse(
        """
version: 1
model: {timm: vit_tiny_patch16_224, img_size: 32, depth: 1}
input: [3, 32, 32]
structures:
  block:
    - sum: [[norm1, {opaque: attn}, ls1, drop_path1], []]
    - sum: [[norm2, mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2, ls2, drop_path2], []]
recipes:
  attention: {replace: {norm1: batchnorm}, append: [gelu]}
  mlp: {replace: {mlp.act: identity}, append: [gelu]}
blocks:
  - {match: "blocks.*", structure: block, recipes: [attention, mlp]}
"""
    )
    block = blocks_of(spec)["blocks.0"]
    untouched = prune(block, spec.recipes["attention"])
    assert not any(isinstance(node, Run) for node in walk(untouched.nodes))
    runs = [node for node in walk(prune(block, spec.recipes["mlp"]).nodes) if isinstance(node, Run)]
    assert len(runs) == 1
    assert names_in(runs[0])[0] == "mlp.fc1"
    # An opaque step without claims takes no norm.
    merged, _ = merge_flow(untouched.eval(), 192, claims_of(block))
    assert isinstance(merged.part("norm1"), BatchNorm)


def names_in(node) -> list[str]:
    return [inner.name for inner in walk((node,)) if isinstance(inner, Call)]


# --- opaque steps, negation, tokens ---

TRANSFORMER = """
version: 1
model: {timm: vit_tiny_patch16_224, img_size: 32, depth: 2, init_values: 0.1}
input: [3, 32, 32]
structures:
  block:
    - sum: [[norm1, {opaque: attn, enters: attn.qkv, leaves: attn.proj}, ls1, drop_path1], []]
    - sum: [[norm2, mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2, ls2, drop_path2], []]
recipes:
  mlp:
    replace: {norm1: batchnorm, norm2: batchnorm, mlp.act: batchnorm}
    append: [gelu, batchnorm]
blocks:
  - {match: "blocks.*", structure: block, recipes: [mlp]}
"""


def test_opaque_steps_take_norms_and_scales_that_their_claims_allow():
    spec = parse(TRANSFORMER)
    block = blocks_of(spec)["blocks.0"]
    merged = merge_block(block, spec.recipes["mlp"])
    assert [segment.name for segment in merged_ops(merged.segments)] == ["fold.attn", "merged.0"]
    assert names(merged.merged) == ["attn", "merged.0", "append.0", "append.1"]
    mlp = merged.merged.part("merged.0")
    assert isinstance(mlp, nn.Linear)
    assert (mlp.in_features, mlp.out_features) == (192, 192)
    assert is_exact(block, spec.recipes["mlp"])
    attention = merged.merged.part("attn")
    assert not torch.equal(attention.qkv.weight, merged.source.part("attn").qkv.weight)
    assert not torch.equal(attention.proj.weight, merged.source.part("attn").proj.weight)


def test_a_norm_folds_into_projections_without_bias():
    spec = parse(TRANSFORMER.replace("init_values: 0.1", "qkv_bias: false"))
    block = blocks_of(spec)["blocks.0"]
    assert block.module.attn.qkv.bias is None
    merged = merge_block(block, spec.recipes["mlp"])
    assert merged.merged.part("attn").qkv.bias is not None
    assert is_exact(block, spec.recipes["mlp"])
    assert block.module.attn.qkv.bias is None


TOKENS = """
version: 1
model: {timm: mixer_s32_224, img_size: 96}
input: [3, 96, 96]
structures:
  block:
    - sum:
        - - norm1
          - across: tokens
            flow: [mlp_tokens.fc1, mlp_tokens.act, mlp_tokens.drop1, mlp_tokens.norm, mlp_tokens.fc2, mlp_tokens.drop2]
          - drop_path
        - []
    - sum:
        - - norm2
          - mlp_channels.fc1
          - mlp_channels.act
          - mlp_channels.drop1
          - mlp_channels.norm
          - mlp_channels.fc2
          - mlp_channels.drop2
          - drop_path
        - []
recipes:
  full:
    replace: {norm2: batchnorm, mlp_tokens.act: identity, mlp_channels.act: identity}
    append: [gelu, batchnorm]
blocks:
  - {match: "blocks.0", structure: block, recipes: [full]}
"""


def test_token_mixing_layers_merge_across():
    spec = parse(TOKENS)
    block = blocks_of(spec)["blocks.0"]
    merged = merge_block(block, spec.recipes["full"])
    tokens, channels = (merged.merged.part(f"merged.{i}") for i in (0, 1))
    assert (tokens.in_features, tokens.out_features) == (9, 9)
    assert (channels.in_features, channels.out_features) == (512, 512)
    assert is_exact(block, spec.recipes["full"])
    x = random_input(block)
    with torch.no_grad():
        assert torch.equal(block.flow.eval()(x), block.module.eval()(x))


MINUS = """
version: 1
model: {timm: fastvit_t8}
input: [3, 64, 64]
structures:
  mixer:
    - as: whole
      sum:
        - - as: mix
            sum:
              - - sum:
                    - [mixer.identity]
                    - [mixer.conv_kxk.0.conv, mixer.conv_kxk.0.bn]
                    - [mixer.conv_scale.conv, mixer.conv_scale.bn]
              - [norm.identity, negate]
        - []
recipes:
  one: {kind: reparam, merge: [[whole]]}
blocks:
  - {match: "stages.0.blocks.*.token_mixer", structure: mixer, recipes: [one]}
"""


def test_differences_merge():
    """``x + mixer(x) - norm(x)`` is one depthwise convolution."""
    spec = parse(MINUS)
    bound = blocks_of(spec)
    block = bound["stages.0.blocks.0.token_mixer"]
    x = random_input(block)
    with torch.no_grad():
        expected = x + block.module.mixer(x) - block.module.norm(x)
        assert torch.allclose(block.flow.eval()(x), expected, rtol=0, atol=1e-13)
    merged = merge_block(block, spec.recipes["one"])
    assert names(merged.merged) == ["merged.0"]
    conv = merged.merged.part("merged.0")
    assert (conv.groups, conv.kernel_size) == (48, (3, 3))
    assert is_exact(block, spec.recipes["one"])
    assert build_supernet(spec).available == {}, "a reparam recipe prunes nothing"


# --- replaced, appended, optional, split ---


def test_a_replaced_norm_keeps_weight_and_bias_and_has_own_statistics():
    block = random_blocks("convnext_digits")["stages.0.blocks.0"]
    norm = prune(block, spec_of("convnext_digits").recipes["full"]).part("norm")
    assert isinstance(norm, BatchNorm)
    assert torch.equal(norm.weight, block.module.norm.weight)
    assert torch.equal(norm.bias, block.module.norm.bias)
    assert norm.weight is not block.module.norm.weight
    assert torch.equal(norm.running_mean, torch.zeros(24, dtype=torch.float64))
    assert norm.weight.dtype == torch.float64


def test_a_batchnorm_in_place_of_an_activation_fits_the_hidden_width():
    block = random_blocks("deit_digits")["blocks.0"]
    flow = prune(block, spec_of("deit_digits").recipes["mlp"])
    assert flow.part("mlp.act").num_features == 256
    assert flow.part("mlp.act").layout == "last"


def append_to_inverted_residual(append: str, name="blocks.2.1"):
    spec = parse(
        f"""
version: 1
model: {{timm: mobilenetv2_100}}
input: [3, 32, 32]
structures:
  residual: [{{sum: [[conv_pw, bn1, conv_dw, bn2, conv_pwl, bn3, {{optional: nothing}}, drop_path], []]}}]
recipes:
  full: {{replace: {{bn1.act: identity, bn2.act: identity, nothing: identity}}, append: {append}}}
blocks:
  - {{match: "blocks.2.1", structure: residual, recipes: [full]}}
"""
    )
    return prune(blocks_of(spec)[name], spec.recipes["full"])


def test_norm_and_activation_in_one_are_split():
    flow = append_to_inverted_residual("[relu6]")
    assert "nothing" not in flow.named_parts, "a missing optional step is skipped, in the recipe too"
    assert "bn3.act" in flow.named_parts
    steps = [name for name in names(flow) if name.startswith("bn1")]
    assert steps == ["bn1", "bn1.drop", "bn1.act"]
    assert isinstance(flow.part("bn1"), BatchNorm)
    assert isinstance(flow.part("bn1.act"), nn.Identity)


def test_append_after_a_step_stands_right_behind_it():
    """Order in `append` is order of execution; behind a norm means before its own activation."""
    flow = append_to_inverted_residual("[{after: bn1, layers: [batchnorm, relu]}, silu, batchnorm]")
    steps = names(flow)
    at = steps.index("bn1")
    assert steps[at : at + 5] == ["bn1", "append.0", "append.1", "bn1.drop", "bn1.act"]
    assert steps[-2:] == ["append.2", "append.3"]
    assert flow.part("append.0").num_features == 192
    assert flow.part("append.3").num_features == 32
    kinds = [type(flow.part(f"append.{i}")) for i in range(4)]
    assert kinds == [BatchNorm, nn.ReLU, nn.SiLU, BatchNorm]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{replace: {conv_pw.act: identity}}", "replace: got 'conv_pw.act', allowed: .*bn1.act"),
        ("{resize: {bn1: 1}}", "resize: got 'bn1', allowed: conv_pw, conv_dw, conv_pwl"),
        ("{resize: {conv_dw: 5}}", "resize: conv_dw is 3x3 already"),
    ],
)
def test_recipes_that_name_what_a_block_lacks_are_refused(recipe, message):
    text = """
version: 1
model: {timm: mobilenetv2_100}
input: [3, 32, 32]
structures:
  residual: [{sum: [[conv_pw, bn1, conv_dw, bn2, conv_pwl, bn3, drop_path], []]}]
recipes:
  full: RECIPE
blocks:
  - {match: "blocks.2.1", structure: residual, recipes: [full]}
"""
    spec = parse(text.replace("RECIPE", recipe))
    block = blocks_of(spec)["blocks.2.1"]
    with pytest.raises(SpecError, match=message):
        prune(block, spec.recipes["full"])


@pytest.mark.parametrize(
    "layer",
    [
        timm.layers.StdConv2d(4, 4, 3),
        timm.layers.ScaledStdConv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        timm.layers.SplitBatchNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.AvgPool2d(3),
    ],
)
def test_layers_that_compute_something_else_are_never_merged(layer):
    """A subclass of a convolution may standardise its weight: its weight is not what it applies."""
    assert kind_of(layer).affine is None
    assert not kind_of(layer).is_operator


# --- moments ---


@pytest.mark.parametrize(
    ("at", "due"),
    [("2/3", 0.67), ("0.25", 0.26), ("{epoch: 5}", 0.5)],
)
def test_kernel_changes_come_at_their_moment(at, due):
    """As a fraction of finetuning, or at an epoch of its 10."""
    text = spec_of("resnet34").text.replace("at: 2/3", f"at: {at}")
    text = text.replace("finetune: {epochs: 150}", "finetune: {epochs: 10}")
    spec = parse(text, "resnet34")
    supernet = build_supernet(spec, size=(3, 32, 32))
    supernet.set_subnet(supernet.configure(["layer1.1", "layer3.0"]))
    assert supernet.resize(due - 0.02) == []
    assert supernet.resize(due) == ["layer1.1.conv1", "layer3.0.conv1"]
    assert supernet.resize(1.0) == []
    assert supernet.blocks["layer1.0"].choices["full"].pending, "a kept block is not changed"


def test_a_moment_of_zero_is_before_training():
    block = random_blocks("convnext_digits")["stages.0.blocks.0"]
    flow = prune(block, spec_of("convnext_digits").recipes["full"])
    assert not flow.pending
    assert flow.part("conv_dw").kernel_size == (3, 3)
    assert torch.equal(flow.part("conv_dw").weight, block.module.conv_dw.weight[:, :, 2:5, 2:5])


# --- what is shared ---

CASES = [
    (name, recipe)
    for name in ("convnext_digits", "deit_digits", "mobilenetv2_100", "resnet34")
    for recipe in spec_of(name).recipes
]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_weights_are_shared_and_norms_are_own_copies(name, recipe):
    for block in random_blocks(name).values():
        if recipe not in block.group.recipes:
            continue
        flow = prune(block, spec_of(name).recipes[recipe])
        baseline = {id(p) for p in block.module.parameters()} | {id(b) for b in block.module.buffers()}
        resized = set(spec_of(name).recipes[recipe].resize) - set(flow.pending)
        for step, part in flow.named_parts.items():
            tensors = [*part.parameters(), *part.buffers()]
            if kind_of(part).is_operator or kind_of(part).name in ("scale", "opaque"):
                assert all((id(t) in baseline) == (step not in resized) for t in tensors), step
            else:
                assert not any(id(t) in baseline for t in tensors), step
        own = [part for part in flow.named_parts.values() if isinstance(part, _BatchNorm)]
        assert own
        assert list(flow.norms()) == own


def test_gradients_reach_the_shared_weights():
    supernet = build_supernet(spec_of("convnext_digits"), seed=0)
    shared = list(supernet.parameters())
    assert len(shared) == len({id(p) for p in shared}), "a shared parameter appears once"
    supernet.set_subnet(supernet.all_pruned("pointwise"))
    supernet(torch.randn(2, 3, 32, 32)).sum().backward()
    block = supernet.blocks["stages.0.blocks.0"]
    assert block.keep.mlp.fc1.weight.grad is not None
    assert block.keep.conv_dw.weight.grad is None, "resized: a weight of its own"
    assert block.choices["pointwise"].part("conv_dw").weight.grad is not None
    assert block.keep.norm.weight.grad is None


# --- slices of a Sequential ---

DEEP_STEM = """
version: 1
model: {timm: resnet18d}
input: [3, 33, 37]
structures:
  single: ["0", "1", "2"]
  pair: ["0", "1", "2", "3"]
recipes:
  one: {replace: {"2": identity}, append: [relu6]}
  two: {replace: {"2": identity}, append: [batchnorm]}
blocks:
  - {match: "conv1[0:3]", structure: single, recipes: [one]}
  - {match: "conv1[3:7]", structure: pair, recipes: [two]}
"""


@pytest.mark.parametrize("pruned", [["conv1[0:3]"], ["conv1[3:7]"], ["conv1[0:3]", "conv1[3:7]"]])
def test_slices_merge_in_place_and_indices_stay(pruned):
    """The merged module takes the first place, identities the rest: feature hooks keep their index."""
    spec = parse(DEEP_STEM)
    model = create_model(spec, seed=0).eval()
    before = [type(module) for module in model.conv1]
    supernet = build_supernet(spec, model).eval()
    assert list(supernet.available) == ["conv1[0:3]", "conv1[3:7]"]
    supernet.set_subnet(supernet.configure(pruned))
    network, certificate = merge(supernet)
    assert certificate.ok, certificate.failures()
    x = torch.randn(2, 3, 33, 37)
    with torch.no_grad():
        assert torch.allclose(network(x), supernet(x), rtol=1e-4, atol=1e-5)
    after = [type(module) for module in network.conv1]
    for name, first, end in (("conv1[0:3]", 0, 3), ("conv1[3:7]", 3, 7)):
        expected = [MergedFlow] + [nn.Identity] * (end - first - 1) if name in pruned else before[first:end]
        assert after[first:end] == expected
    if "conv1[3:7]" in pruned:
        assert geometry(network.conv1[3].part("merged.0")) == ((5, 5), (1, 1), (2, 2, 2, 2))


def test_a_padded_1x1_behind_a_stride_is_refused():
    """Its padding adds to the output's size; no padding in front of the stride does."""
    spec = parse(DEEP_STEM)
    model = create_model(spec, seed=0)
    model.conv1[3].stride = (2, 2)
    model.conv1[6] = nn.Conv2d(32, 64, 1, padding=1)
    block = bind(spec, model)["conv1[3:7]"]
    with pytest.raises(MergeError, match=r"the padding of 0, 3 cannot move .* behind a stride"):
        prune(block, spec.recipes["two"])


# --- blocks that no network of timm has ---

TOY = """
version: 1
model: {timm: resnet18}
input: [3, 6, 6]
structures:
  block: STRUCTURE
recipes:
  full: RECIPE
blocks:
  - {match: "0", structure: block, recipes: [full]}
"""


class ToyBlock(nn.Module):
    """Steps with awkward names and arguments: a mask beside the input, a step that widens, a norm that activates."""

    def __init__(self, mask):
        super().__init__()
        self.keys = nn.Conv2d(3, 3, 1)
        self.values = nn.BatchNorm2d(3)
        self.act = nn.ReLU()
        self.widen = nn.Sequential(nn.Conv2d(3, 5, 1))
        self.norm = timm.layers.LayerNormAct2d(5)
        self.unused = nn.Sequential(nn.Conv2d(3, 3, 1))
        self.mask = mask

    def blur(self, x, mask):
        return x * mask

    def forward(self, x):
        return self.norm(self.widen(self.blur(self.act(self.values(self.keys(x))), self.mask)))


STEPS = "[keys, values, act, {opaque: blur}, {opaque: widen}, norm]"


def toy_block(recipe: str, structure: str = STEPS, mask=None):
    spec = parse(TOY.replace("STRUCTURE", structure).replace("RECIPE", recipe))
    model = nn.Sequential(ToyBlock(torch.rand(6) if mask is None else mask)).eval()
    return bind(spec, model)["0"], spec.recipes["full"]


def test_recorded_tensors_follow_the_weights():
    block, recipe = toy_block("{replace: {act: identity}, append: [relu]}")
    block.flow.double()
    flow = prune(block, recipe).double().eval()
    merged, _ = merge_flow(flow, 3, claims_of(block))
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    block.module.mask = block.module.mask.double()
    with torch.no_grad():
        assert torch.equal(block.flow(x), block.module(x))
        assert torch.allclose(merged(x), flow(x), rtol=1e-12)
    assert block.flow.extras["blur"][0][0].dtype == torch.float64
    assert merged.to(torch.float32).extras["blur"][0][0].dtype == torch.float32


def test_a_recorded_tensor_with_an_entry_per_image_is_refused():
    with pytest.raises(SpecError, match=r"'blur' is given a tensor .* with one entry per image") as caught:
        toy_block("{append: [relu]}", mask=torch.rand(2, 1, 1, 1))
    assert caught.value.problems[0].place.line == 6


def test_a_claim_of_a_step_that_is_never_called_is_refused():
    steps = STEPS.replace("norm]", "norm, {opaque: unused, enters: unused.0}]")
    with pytest.raises(SpecError, match="claims of 'unused' cannot be tested") as caught:
        toy_block("{append: [relu]}", steps)
    assert caught.value.problems[0].place.line == 6


def test_a_batch_norm_behind_a_step_that_widens_has_its_width():
    block, recipe = toy_block("{append: [{after: widen, layers: [batchnorm]}]}")
    assert prune(block, recipe).part("append.0").num_features == 5


def test_a_norm_that_also_activates_is_not_replaced():
    block, recipe = toy_block("{replace: {norm: batchnorm}}")
    with pytest.raises(SpecError, match="LayerNormAct2d is a norm and ReLU in one"):
        prune(block, recipe)


def test_replacing_a_step_that_changes_the_shape_is_refused():
    block, recipe = toy_block("{replace: {widen: identity, norm: identity}}")
    with pytest.raises(SpecError, match=r"gives \[2, 3, 6, 6\], the block gives \[2, 5, 6, 6\]"):
        prune(block, recipe)


def test_diagonals_in_a_row_all_go_into_the_operator_behind():
    """A norm and a scale with no operator before them."""
    text = TOY.replace("resnet18", "convnext_atto").replace("6, 6", "64, 64").replace('"0"', '"stages.0.blocks.0"')
    text = text.replace("STRUCTURE", "[norm, gamma, mlp.fc1, mlp.act]")
    spec = parse(text.replace("RECIPE", "{replace: {norm: batchnorm}, append: [relu]}"))
    block = blocks_of(spec)["stages.0.blocks.0"]
    assert names(merge_block(block, spec.recipes["full"]).merged) == ["merged.0", "mlp.act", "append.0"]
    assert is_exact(block, spec.recipes["full"])


def test_one_mistake_is_told_once_for_all_blocks():
    text = spec_of("convnext_digits").text.replace("conv_dw: 3}", "conv_dw: 9}")
    with pytest.raises(
        SpecError, match=r"blocks stages.0.blocks.0, stages.0.blocks.1, … \(10 blocks\): resize"
    ) as caught:
        build_supernet(parse(text))
    assert [problem.where for problem in caught.value.problems] == ["recipes.full, recipes.pointwise"]


# --- structures that only random ones met ---


class Loose(nn.Module):
    """Submodules without a forward pass of their own: recipes work on what is declared."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return x


def loose_block(structure: str, recipe: str, **modules):
    spec = parse(TOY.replace("STRUCTURE", structure).replace("RECIPE", recipe).replace("6, 6]", "13, 18]"))
    block = bind(spec, nn.Sequential(Loose(**modules)).double().eval())["0"]
    return block, spec.recipes["full"]


def conv3(stride=1, padding=1, inp=3, out=3, kernel=3):
    return nn.Conv2d(inp, out, kernel, stride, padding)


@pytest.mark.parametrize(
    ("structure", "modules"),
    [
        ("[{sum: [[a], [c]]}, b]", {"a": conv3(2), "c": conv3(2, 0, kernel=1), "b": conv3()}),
        ("[a, b, c]", {"a": conv3(2), "b": conv3(1, 0), "c": conv3()}),
        ("[a, b]", {"a": conv3(1, 0), "b": timm.layers.Conv2dSame(3, 3, 3, stride=2)}),
    ],
)
def test_padding_does_not_move_where_the_map_would_change_its_size(structure, modules):
    block, recipe = loose_block(structure, "{kind: reparam}", **modules)
    with pytest.raises(MergeError, match=r"the padding of .* cannot move .* the map would have another size"):
        prune(block, recipe)


@pytest.mark.parametrize("front", [[], [nn.Conv2d(3, 3, 1)]])
def test_a_stride_stays_where_the_map_would_change_its_size(front):
    """An unpadded 3x3 behind it: at the end of the run the stride would leave another number of pixels."""
    modules = {"abc"[i]: module for i, module in enumerate([*front, conv3(2), conv3(1, 0)])}
    block, recipe = loose_block(f"[{', '.join(modules)}]", "{kind: reparam}", **modules)
    flow = prune(block, recipe)
    x = random_input(block)
    with torch.no_grad():
        assert flow.eval()(x).shape == block.flow(x).shape
    assert [part.stride for part in flow.named_parts.values() if isinstance(part, nn.Conv2d)][-2:] == [(2, 2), (1, 1)]
    assert is_exact(block, recipe)


def test_a_step_that_stands_twice_keeps_its_padding():
    block, recipe = loose_block("[a, b, act, b]", "{kind: reparam}", a=conv3(), b=conv3(), act=nn.ReLU())
    with pytest.raises(MergeError, match="b stands in the flow 2 times"):
        prune(block, recipe)
    pointwise, recipe = loose_block("[a, b, act, b]", "{kind: reparam}", a=conv3(), b=nn.Conv2d(3, 3, 1), act=nn.ReLU())
    assert is_exact(pointwise, recipe)


@pytest.mark.parametrize("recipe", ["{kind: reparam}", "{kind: reparam, resize: {b: 1}, padding: keep}"])
def test_a_bias_per_tap_is_never_dropped(recipe):
    tapped = PaddedConv2d(3, 3, 3, pads=(1, 1, 1, 1), tap_bias=True)
    block, recipe = loose_block("[a, b]", recipe, a=conv3(), b=tapped)
    with pytest.raises(MergeError, match="b has a bias per tap"):
        prune(block, recipe, resized=True)


def test_a_sum_with_units_is_composed_on_one_device():
    """A branch without weights is computed where the others are: with weights on meta, or on an accelerator."""
    block, recipe = loose_block(
        "[a, {sum: [[drop], [b]]}]", "{kind: reparam}", a=conv3(), b=nn.Conv2d(3, 3, 1), drop=nn.Dropout()
    )
    flow = prune(block, recipe)
    hollow, _ = merge_flow(flow, 3, values=False)
    assert hollow.part("merged.0").weight.is_meta
    assert is_exact(block, recipe)


def test_a_unit_behind_an_opaque_step_has_the_width_there():
    block, recipe = loose_block(
        "[{opaque: widen}, {sum: [[], [a]]}, b]",
        "{kind: reparam}",
        widen=nn.Sequential(nn.Conv2d(3, 5, 1)),
        a=conv3(inp=5, out=5),
        b=nn.Conv2d(5, 2, 1),
    )
    assert is_exact(block, recipe)


def test_refusals_in_a_sum_say_where():
    same = timm.layers.Conv2dSame(3, 3, 3, stride=2)
    block, recipe = loose_block("[{sum: [[a], [b]], as: mix}]", "{kind: reparam}", a=same, b=conv3(2, 0, kernel=1))
    with pytest.raises(MergeError, match="at mix: SAME padding with stride > 1 and another branch"):
        merge_flow(prune(block, recipe), 3)


@pytest.mark.parametrize("merge", ["[[b, c], [a, d]]", "[[a, b], [b, d]]", "[[a, d], [b, c]]", "[[a, b, c], [c, d]]"])
def test_merges_that_overlap_are_one(merge):
    block, recipe = loose_block(
        "[a, b, c, d]", f"{{kind: reparam, merge: {merge}}}", a=conv3(), b=conv3(), c=conv3(), d=conv3(2)
    )
    flow = prune(block, recipe)
    assert flow.part("pad.a").padding == (4, 4, 4, 4)
    assert sum(isinstance(node, Run) for node in walk(flow.nodes)) == 1
    assert is_exact(block, recipe)


def test_a_batch_norm_behind_a_new_step_of_a_branch_has_the_width_of_that_branch():
    block, recipe = loose_block(
        "[{sum: [[a, b], [act, c]], as: mix}, d]",
        "{replace: {act: relu}, append: [{after: act, layers: [batchnorm]}, {after: mix, layers: [batchnorm]}]}",
        a=conv3(out=5),
        b=conv3(inp=5, out=5),
        act=nn.GELU(),
        c=conv3(out=5),
        d=conv3(inp=5),
    )
    flow = prune(block, recipe)
    assert [flow.part(f"append.{i}").num_features for i in (0, 1)] == [3, 5]
