"""Good specs: what a file becomes, which blocks it means, and what settings change."""

import copy
import dataclasses
import pickle
import re
import typing
from collections import Counter
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from updp.errors import Place, SpecError, suggest
from updp.spec import (
    STAGES,
    Across,
    Append,
    ArchSpec,
    BlendSettings,
    BlockGroup,
    DataSettings,
    Moment,
    Negate,
    Opaque,
    Resize,
    Schedule,
    SearchSettings,
    Step,
    Sum,
    TrainSettings,
    apply_settings,
    list_specs,
    load_spec,
    match_blocks,
    names_in,
    parse_spec,
    specs_directory,
)
from updp.spec.schema import load_schema
from updp.spec.tree import scalar

FULL = """\
version: 1
model: {timm: any_model.tag, depths: [2, 0o17], drop: no, rate: 1e-3, options: {a: ~}}
input: [1, 32, 48]
structures:
  &name block:
    - sum:
        - [norm, {opaque: attn, enters: [attn.q, attn.k], leaves: attn.proj}, {optional: ls}, negate]
        - []
      as: mix
    - {across: tokens, flow: &flow [fc1, act, fc2]}
    - sum: [*flow, [pool.0]]
recipes:
  part:
    replace: {norm: batchnorm, act.inner: identity}
    resize: {fc1: 3, fc2: {kernel: 1, at: 0.5}, pool.0: {kernel: 5, at: {epoch: 30}}}
    append: [gelu, {after: fc1, layers: [relu, batchnorm]}, batchnorm, silu]
    merge: [[fc1, fc2], [mix]]
    padding: keep
  all:
    extends: part
    replace: {norm: relu6}
    merge: all
    kind: reparam
  base: {extends: all, append: []}
blocks:
  - {match: [a.*, "b*[1:3]"], except: a.0, structure: *name, recipes: [base, part]}
data: {mean: [0.5], std: [1], crop_pct: 1}
schedule:
  seed: 7
  train: {lr: 0.1, batch_size: 8.0}
  supernet: {lr: 1, epochs: 2}
  finetune: {scale: [0.5, 1], ema: null}
  blend: {K: 4.5, mode: direct}
"""


def full_spec():
    return parse_spec(FULL, file="s.yaml", name="s")


def test_structure_and_model():
    spec = full_spec()
    first, across, last = spec.structures["block"]
    opaque = Opaque("attn", ("attn.q", "attn.k"), ("attn.proj",))
    assert first == Sum(((Step("norm"), opaque, Step("ls", optional=True), Negate()), ()), "mix")
    assert across == Across("tokens", (Step("fc1"), Step("act"), Step("fc2")))
    assert last == Sum((across.flow, (Step("pool.0"),)))
    assert names_in(spec.structures["block"])[:5] == ("mix", "norm", "attn", "ls", "fc1")
    assert first.branches[0][1].place == Place("s.yaml", 7, 18)
    assert spec.model.name == "any_model.tag"
    assert dict(spec.model.kwargs) == {"depths": (2, 15), "drop": "no", "rate": 0.001, "options": {"a": None}}
    assert spec.input == (1, 32, 48)
    assert spec.data == DataSettings(mean=(0.5,), std=(1.0,), crop_pct=1.0)


def test_recipes():
    recipes = full_spec().recipes
    part, everything, base = recipes["part"], recipes["all"], recipes["base"]
    assert {step: item.target for step, item in part.replace.items()} == {
        "norm": "batchnorm",
        "act.inner": "identity",
    }
    assert part.replace["norm"].place == Place("s.yaml", 14, 21)
    assert part.resize["fc1"] == Resize(3, Moment(fraction=0.0))
    assert part.resize["fc2"] == Resize(1, Moment(fraction=0.5))
    assert part.resize["pool.0"] == Resize(5, Moment(epoch=30))
    assert part.append == (
        Append(("gelu",)),
        Append(("relu", "batchnorm"), "fc1"),
        Append(("batchnorm", "silu")),
    )
    assert (part.merge, part.padding, part.kind) == ((("fc1", "fc2"), ("mix",)), "keep", "prune")
    assert everything.replace["norm"].target == "relu6"
    assert everything.replace["act.inner"].target == "identity"
    assert (everything.append, everything.merge) == (part.append, "all")
    assert (everything.padding, everything.kind, everything.merge_places) == ("keep", "reparam", ())
    assert (base.replace, base.append, base.kind) == (everything.replace, (), "reparam")
    assert base.place == Place("s.yaml", 24, 9)


def test_blocks_and_schedule():
    spec = full_spec()
    (group,) = spec.blocks
    assert group == BlockGroup(("a.*", "b*[1:3]"), ("a.0",), "block", ("base", "part"))
    assert group.match_places == (Place("s.yaml", 26, 14), Place("s.yaml", 26, 19))
    schedule = spec.schedule
    assert (schedule.seed, schedule.held_out, schedule.blend) == (7, 0.1, BlendSettings(K=4.5, mode="direct"))
    assert schedule.baseline == TrainSettings(epochs=300, lr=0.1, batch_size=8)
    assert schedule.supernet == TrainSettings(epochs=2, lr=1.0, batch_size=8)
    assert schedule.finetune == TrainSettings(epochs=300, lr=0.1, batch_size=8, scale=(0.5, 1.0))
    assert type(schedule.baseline.batch_size) is int
    assert type(schedule.supernet.lr) is float


def test_moments():
    assert Moment(fraction=2 / 3).progress(150) == pytest.approx(100 / 150)
    assert Moment(epoch=100).progress(150) == pytest.approx(100 / 150)
    assert Moment(epoch=200).progress(150) == 1.0
    assert Moment(epoch=1).progress(0) == 0.0


VALUES = {
    "1e-3": 0.001, "1.": 1.0, ".5": 0.5, "+12": 12, "-0": 0, "012": 12, "0o17": 15, "0xfF": 255, "2E+2": 200.0,
    "~": None, "": None, "null": None, "Null": None, "true": True, "True": True, "FALSE": False,
}  # fmt: skip
STRINGS = [
    "no", "on", "off", "Yes", "y", "tRue", "nULL", "1:30", "190:20:30", "2024-01-01", "1_000", "0b1", "2/3", "e3",
    ".", "=", "<<", "1e", "+.e3", "0o8", "-0x1", "1.2.3", "--1",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [*VALUES.items(), *zip(STRINGS, STRINGS, strict=True)])
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_a_spec_is_frozen_and_can_be_copied_hashed_and_sent_to_another_process():
    spec = full_spec()
    assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))
    assert hash(copy.copy(spec)) == hash(spec)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"
    with pytest.raises(TypeError):
        spec.recipes["part"] = None


def test_text_and_hash_are_those_of_the_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(FULL.replace("\n", "\r\n").encode())
    spec = load_spec(path)
    assert (spec.name, spec.file, spec.text) == ("own", str(path), FULL.replace("\n", "\r\n"))
    again = parse_spec(spec.text, file="artefact", name=spec.name)
    assert dataclasses.replace(again, file=spec.file) == spec
    assert len(spec.hash) == 64
    assert spec.hash != full_spec().hash


NAMES = [
    "stem", "a", "a.0", "a.0.conv", "a.1", "a.10", "a.10.conv", "b1", "b1.0", "b1.1", "b1.1.conv", "b1.2", "b2",
    "b2.0", "b2.1", "b2.2", "b2.3", "head", "head.norm",
]  # fmt: skip
LENGTHS = {"a": 3, "b1": 3, "b2": 4}


def group(*match, except_=(), structure="block"):
    places = tuple(Place("s.yaml", line) for line in range(1, len(match) + 1))
    return BlockGroup(match, tuple(except_), structure, ("full",), Place("s.yaml", 9), places)


@pytest.mark.parametrize(
    ("patterns", "excepted", "expected"),
    [
        (["a.*"], [], ["a.0", "a.1", "a.10"]),
        (["a.1*"], [], ["a.1", "a.10"]),
        (["*.0"], [], ["a.0", "b1.0", "b2.0"]),
        (["*.*.conv"], [], ["a.0.conv", "a.10.conv", "b1.1.conv"]),
        (["b2", "a.*", "a.0"], ["*.1"], ["a.0", "a.10", "b2"]),
        (["b*[1:3]"], [], ["b1[1:3]", "b2[1:3]"]),
        (["b2[2:4]", "b2[0:2]", "b1.2"], [], ["b1.2", "b2[0:2]", "b2[2:4]"]),
        (["b*[1:3]"], ["b2[1:3]"], ["b1[1:3]"]),
        (["head", "stem"], [], ["stem", "head"]),
    ],
)
def test_match(patterns, excepted, expected):
    one = group(*patterns, except_=excepted)
    assert match_blocks([one], NAMES, LENGTHS) == dict.fromkeys(expected, one)
    assert list(match_blocks([one], NAMES, LENGTHS)) == expected


@pytest.mark.parametrize(
    ("groups", "messages"),
    [
        ([group("c.*")], ["s.yaml:1: blocks[0].match: got 'c.*', which matches no module"]),
        ([group("head.nrm")], ["got 'head.nrm', which matches no module (did you mean 'head.norm'"]),
        ([group("b1.*.con")], ["(did you mean 'b1.*.conv'"]),
        ([group("a.*", except_=["a.7"])], ["s.yaml:9: blocks[0].except: got 'a.7', which matches no module"]),
        (
            [group("a.*", except_=["stem"])],
            ["blocks[0].except: 'stem' takes away nothing that `match` found"],
        ),
        (
            [group("a.*"), group("b2", "a.1*", structure="other")],
            [
                "s.yaml:2: blocks[1]: 'a.1' is a block already: structure 'block', matched at s.yaml:1",
                "s.yaml:2: blocks[1]: 'a.10' is a block already: structure 'block', matched at s.yaml:1",
            ],
        ),
        (
            [group("a"), group("a.0")],
            ["s.yaml:1: blocks: 'a.0' lies inside the block 'a': structure 'block'"],
        ),
        ([group("b1.1.conv", "b1[1:3]")], ["s.yaml:1: blocks: 'b1.1.conv' lies inside the block 'b1[1:3]'"]),
        ([group("b1[0:1]", "b1")], ["'b1[0:1]' lies inside the block 'b1'"]),
        ([group("b2[0:2]", "b2[1:3]")], ["s.yaml:2: blocks: 'b2[1:3]' overlaps the block 'b2[0:2]'"]),
        ([group("b2[0:2]", "b2.1")], ["'b2.1' overlaps the block 'b2[0:2]'"]),
        ([group("b*[1:4]")], ["s.yaml:1: blocks[0].match: got the slice [1:4], but 'b1' has 3 modules"]),
        ([group("head[0:1]")], ["'head' is not a Sequential, only a Sequential can be sliced"]),
        (
            [group("x"), group("y[0:1]")],
            ["got 'x', which matches no module", "got 'y', which matches no module"],
        ),
    ],
)
def test_bad_match(groups, messages):
    with pytest.raises(SpecError) as caught:
        match_blocks(groups, NAMES, LENGTHS)
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == len(messages), problems
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem


def test_settings_from_the_command_line():
    spec = full_spec()
    settings = [
        "schedule.finetune.epochs=3",
        "blend.K = 2",
        "train.lr=1e-4",
        "supernet.lr=0.5",
        "train.scale=[0.2, 1]",
    ]
    changed = apply_settings(spec, [*settings, "seed=0x10", "finetune.auto_augment=rand-m9", "supernet.scale=null"])
    schedule = changed.schedule
    assert (schedule.finetune.epochs, schedule.supernet.epochs) == (3, 2)
    assert (schedule.baseline.lr, schedule.supernet.lr, schedule.finetune.lr) == (1e-4, 0.5, 1e-4)
    assert (schedule.baseline.scale, schedule.supernet.scale) == ((0.2, 1.0), None)
    assert (schedule.seed, schedule.blend.K, schedule.finetune.auto_augment) == (16, 2.0, "rand-m9")
    assert dataclasses.replace(changed, schedule=spec.schedule) == spec
    assert apply_settings(spec, []) == spec


def test_the_schema_is_valid_and_has_the_settings_and_their_defaults():
    schema = load_schema(specs_directory())
    Draft202012Validator.check_schema(schema)
    definitions = schema["$defs"]
    schedule = definitions["schedule"]["properties"]
    described = {
        TrainSettings: definitions["train"]["properties"],
        SearchSettings: schedule["search"]["properties"],
        BlendSettings: schedule["blend"]["properties"],
        DataSettings: schema["properties"]["data"]["properties"],
        Schedule: {key: value for key, value in schedule.items() if key != "train"},
    }
    for settings, properties in described.items():
        assert list(properties) == [field.name for field in dataclasses.fields(settings)]
    for settings in (TrainSettings, SearchSettings, BlendSettings):
        for field in dataclasses.fields(settings):
            text = described[settings][field.name]["description"]
            check_default(field, text)


def check_default(field, text):
    if field.name == "epochs":
        assert "Default: 300, and 10 for the supernet." in text
    elif field.default is None or (field.name in ("mixup", "cutmix")):
        assert not field.default
        assert "off, the default" in text
    elif typing.get_origin(field.type) is not None or field.name in ("per", "mode"):
        assert "(the default)" in text
    else:
        assert scalar(text.split("Default: ")[1].partition(". ")[0].removesuffix(".")) == field.default, field.name


def objects_in(schema):
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from objects_in(value)
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
        yield schema


def test_every_key_of_the_schema_is_described_for_editors():
    schema = load_schema(specs_directory())
    properties = {
        (name, json_schema.get("$ref", "").rpartition("/")[2]): json_schema
        for part in objects_in(schema)
        for name, json_schema in part["properties"].items()
    }
    assert len(properties) > 50
    for (name, reference), json_schema in properties.items():
        described = "description" in json_schema or "description" in schema["$defs"].get(reference, {})
        assert described, name


def test_suggest():
    assert suggest("ful", ["full", "pointwise"]) == "got 'ful', allowed: full, pointwise (did you mean 'full'?)"
    assert suggest("k", ["K", "per"]) == "got 'k', allowed: K, per (did you mean 'K'?)"
    assert suggest("x", []) == "got 'x', but there is none"
    many = [f"blocks.{index}" for index in range(100)]
    assert suggest("block.7", many).startswith("got 'block.7', allowed: blocks.7, ")
    assert (
        suggest("zzz", many) == "got 'zzz', allowed: blocks.0, blocks.1, blocks.2, blocks.3, blocks.4, … (100 in all)"
    )


# Shipped specs: blocks of each structure, in the order of the file, and the recipes that a block may take.
CONVNEXT = {"block": ("pointwise", "full")}
INVERTED = {"first": ("linear",), "plain": ("full", "shrink"), "residual": ("full", "shrink")}
RESNET = {"plain": ("full",), "downsample": ("full",)}
SHIPPED = {
    "convnext_atto": ({"block": 12}, CONVNEXT),
    "convnext_base": ({"block": 36}, CONVNEXT),
    "convnext_digits": ({"block": 10}, {"block": ("full", "pointwise")}),
    "convnext_small": ({"block": 36}, CONVNEXT),
    "convnext_tiny": ({"block": 18}, CONVNEXT),
    "convnextv2_atto": ({"block": 12}, CONVNEXT),
    "deit_base_distilled_patch16_224": ({"block": 12}, {"block": ("mlp",)}),
    "deit_base_patch16_224": ({"block": 12}, {"block": ("mlp",)}),
    "deit_digits": ({"block": 6}, {"block": ("mlp",)}),
    "deit_small_distilled_patch16_224": ({"block": 12}, {"block": ("mlp",)}),
    "deit_small_patch16_224": ({"block": 12}, {"block": ("mlp",)}),
    "deit_tiny_distilled_patch16_224": ({"block": 12}, {"block": ("mlp",)}),
    "deit_tiny_patch16_224": ({"block": 12}, {"block": ("mlp",)}),
    "mobilenetv1_100": ({"block": 13}, {"block": ("full",)}),
    "mobilenetv2_100": ({"first": 1, "residual": 10, "plain": 6}, INVERTED),
    "mobilenetv2_140": ({"first": 1, "residual": 10, "plain": 6}, INVERTED),
    "resnet101": ({"plain": 29, "downsample": 4}, RESNET),
    "resnet18": ({"plain": 5, "downsample": 3}, RESNET),
    "resnet34": ({"plain": 13, "downsample": 3}, RESNET),
    "resnet50": ({"plain": 12, "downsample": 4}, RESNET),
    "swin_base_patch4_window7_224": ({"block": 24}, {"block": ("mlp",)}),
    "swin_tiny_patch4_window7_224": ({"block": 12}, {"block": ("mlp",)}),
    "tf_efficientnet_lite0": ({"first": 1, "residual": 9, "plain": 6}, INVERTED),
    "tf_efficientnet_lite1": ({"first": 1, "residual": 14, "plain": 6}, INVERTED),
    "tf_efficientnet_lite2": ({"first": 1, "residual": 14, "plain": 6}, INVERTED),
    "tf_efficientnet_lite3": ({"first": 1, "residual": 17, "plain": 6}, INVERTED),
    "vgg11_bn": ({"pair": 3}, {"pair": ("full",)}),
    "vgg13_bn": ({"pair": 5}, {"pair": ("full",)}),
}


def test_every_shipped_spec_is_found():
    assert list_specs() == sorted(SHIPPED)
    assert len(list_specs()) == 28
    root = Path(__file__).parents[1] / "specs"
    assert len(list(root.glob("*.y*ml"))) == 28
    assert all(
        path.read_text().startswith("# yaml-language-server: $schema=./schema.json\n") for path in root.glob("*.yaml")
    )


@pytest.mark.parametrize("name", list_specs())
def test_blocks_of_shipped_specs(name):
    import timm
    import torch
    from torch import nn

    spec = load_spec(name)
    assert isinstance(spec, ArchSpec)
    with torch.device("meta"):
        model = timm.create_model(spec.model.name, pretrained=False, num_classes=10, **spec.model.kwargs)
    modules = dict(model.named_modules())
    lengths = {path: len(module) for path, module in modules.items() if isinstance(module, nn.Sequential)}
    blocks = match_blocks(spec.blocks, list(modules), lengths)
    counts, recipes = SHIPPED[name]
    assert Counter(group.structure for group in blocks.values()) == counts
    assert {group.structure: group.recipes for group in blocks.values()} == recipes
    of_structure = {(group.structure, type(modules[block.partition("[")[0]])) for block, group in blocks.items()}
    assert len(of_structure) == len(counts), "blocks of one structure are of one class"
    starts = [re.sub(r"\[(\d+):\d+\]", r".\1", block) for block in blocks]
    assert starts == [path for path in modules if path in starts]
    assert all(getattr(spec.schedule, stage).epochs > 0 for stage in STAGES)
