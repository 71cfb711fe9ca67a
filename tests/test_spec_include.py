"""Specs that share a family file: what is merged, what the text becomes, and what is said of mistakes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from updp.errors import SpecError
from updp.spec import list_specs, load_spec, parse_spec, specs_directory
from updp.spec.include import overlay, text_of
from updp.spec.tree import read_tree

FAMILY = """\
structures:
  block: [conv1, act1]
  other: [conv2]
recipes:
  base: {replace: {act1: identity}}
  full: {extends: base, append: [relu, batchnorm], resize: {conv1: {kernel: 1, at: 2/3}}}
  spare: {replace: {conv2: identity}}
blocks:
  - {match: "layer*.*", structure: block, recipes: [full]}
data: {crop_pct: 0.9}
schedule:
  train: {batch_size: 256, lr: 0.1}
  finetune: {epochs: 150}
"""
SPEC = """\
version: 1
include: families/small.yaml
model: {timm: resnet18}
input: [3, 32, 32]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "small.yaml").write_text(FAMILY)
    return tmp_path


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def said_of(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    return str(caught.value)


def test_what_is_left_out_comes_from_the_family(folder):
    spec = load_spec(write(folder, SPEC))
    assert spec.name == "mine"
    assert set(spec.recipes) == {"base", "full"}
    assert set(spec.structures) == {"block"}, "what no block has is left out"
    assert spec.recipes["full"].resize["conv1"].at.fraction == pytest.approx(2 / 3)
    assert (spec.schedule.finetune.epochs, spec.schedule.baseline.lr) == (150, 0.1)


def test_own_values_win_key_by_key(folder):
    own = SPEC + (
        "recipes:\n  full: {resize: {conv1: {kernel: 3}}, append: [relu6]}\n"
        "schedule: {train: {lr: 0.5}, finetune: {epochs: 3}}\ndata: {crop_pct: 1}\n"
        "blocks:\n  - {match: layer1.0, structure: other, recipes: [spare]}\n"
        "  - {match: layer2.0, structure: block, recipes: [full]}\n"
    )
    spec = load_spec(write(folder, own))
    resize = spec.recipes["full"].resize["conv1"]
    assert (resize.kernel, resize.at.fraction) == (3, pytest.approx(2 / 3)), "a mapping is merged"
    assert [item.layers for item in spec.recipes["full"].append] == [("relu6",)], "a list is replaced"
    assert (spec.schedule.baseline.lr, spec.schedule.baseline.batch_size) == (0.5, 256)
    assert (spec.schedule.finetune.epochs, spec.data.crop_pct) == (3, 1.0)
    assert [group.structure for group in spec.blocks] == ["other", "block"]
    assert set(spec.recipes) == {"base", "full", "spare"}


def test_the_text_stands_alone_and_means_the_same(folder):
    spec = load_spec(write(folder, SPEC))
    again = parse_spec(spec.text, file=spec.file, name=spec.name)
    assert again == spec
    assert "include" not in read_tree(spec.text, "text").value
    assert spec.hash == load_spec(write(folder, "# a comment\n" + SPEC)).hash
    (folder / "families" / "small.yaml").write_text(FAMILY.replace("150", "151"))
    assert load_spec(folder / "mine.yaml").hash != spec.hash


def test_without_include_the_text_is_the_file(folder):
    whole = write(folder, load_spec(write(folder, SPEC)).text + "# mine\n", "whole.yaml")
    assert load_spec(whole).text == whole.read_text()


def test_an_included_file_may_include_and_be_a_spec(folder):
    write(folder, SPEC)
    path = write(folder, "version: 1\ninclude: mine.yaml\nmodel: {timm: resnet34}\n", "larger.yaml")
    spec = load_spec(path)
    assert (spec.model.name, spec.input, spec.schedule.finetune.epochs) == ("resnet34", (3, 32, 32), 150)


def test_shipped_families_are_found_from_anywhere(tmp_path):
    shipped = sorted((specs_directory() / "families").glob("*.yaml"))
    if not shipped:
        pytest.fail("no family is shipped")
    for name in list_specs():
        text = (specs_directory() / f"{name}.yaml").read_text()
        if "include:" in text:
            mine = load_spec(write(tmp_path, text, f"{name}.yaml"))
            assert mine.text == load_spec(name).text


@pytest.mark.parametrize("name", list_specs())
def test_every_shipped_text_stands_alone(name):
    spec = load_spec(name)
    again = parse_spec(spec.text, file=spec.file, name=name)
    assert again == spec
    assert dataclasses.replace(again, text="") == dataclasses.replace(spec, text="")


def test_families_keep_to_their_schema_and_every_one_is_used():
    root = specs_directory()
    schemas = {path: json.loads((root / path).read_text()) for path in ("schema.json", "families/schema.json")}
    registry = Registry().with_resources(
        (f"file:///{path}", Resource.from_contents(data)) for path, data in schemas.items()
    )
    schema = {"$id": "file:///families/schema.json", **schemas["families/schema.json"]}
    validator = Draft202012Validator(schema, registry=registry)
    files = sorted((root / "families").glob("*.yaml"))
    assert files
    for file in files:
        tree = read_tree(file.read_text(), str(file))
        assert list(validator.iter_errors(tree.plain())) == [], file.name
    texts = [(root / f"{name}.yaml").read_text() for name in list_specs()] + [file.read_text() for file in files]
    said = [names for text in texts for names in re.findall(r"^include: (.+)$", text, re.MULTILINE)]
    included = {Path(name).name for names in said for name in re.findall(r"[\w/]+\.yaml", names)}
    unused = [file.name for file in files if file.name not in included]
    assert unused == []


# --- mistakes ---


def test_a_missing_file_is_told_with_what_there_is(folder):
    message = said_of(write(folder, SPEC.replace("small", "smal")))
    assert "mine.yaml:2:10: include: no such file, neither beside this one nor among the shipped" in message


def test_a_circle_is_told(folder):
    (folder / "families" / "small.yaml").write_text("include: ../mine.yaml\n" + FAMILY)
    assert "include: includes itself: " in said_of(write(folder, SPEC))


def test_of_several_files_the_later_wins(folder):
    write(folder, "schedule: {train: {lr: 0.7}, blend: {K: 2}}\nrecipes: {full: {append: [gelu]}}\n", "own.yaml")
    spec = load_spec(write(folder, SPEC.replace("families/small.yaml", "[families/small.yaml, own.yaml]")))
    assert (spec.schedule.baseline.lr, spec.schedule.baseline.batch_size, spec.schedule.blend.K) == (0.7, 256, 2.0)
    assert [item.layers for item in spec.recipes["full"].append] == [("gelu",)]
    turned = load_spec(write(folder, SPEC.replace("families/small.yaml", "[own.yaml, families/small.yaml]")))
    assert turned.schedule.baseline.lr == 0.1


def test_a_copied_family_finds_what_it_includes(tmp_path):
    """A user copies a shipped family to change it; what it includes is still found among the shipped."""
    shipped = specs_directory() / "families"
    copied = [file for file in sorted(shipped.glob("*.yaml")) if "include:" in file.read_text()]
    assert copied
    for file in copied:
        (tmp_path / file.name).write_text(file.read_text())
        name = next(n for n in list_specs() if f"families/{file.name}" in (specs_directory() / f"{n}.yaml").read_text())
        text = (specs_directory() / f"{name}.yaml").read_text().replace(f"families/{file.name}", file.name)
        assert load_spec(write(tmp_path, text, f"{name}.yaml")).text == load_spec(name).text


@pytest.mark.parametrize(("value", "shown"), [("3", "allowed: the path"), ("[]", "allowed"), ("['', a]", "or a list")])
def test_include_is_a_path_or_a_list(folder, value, shown):
    message = said_of(write(folder, SPEC.replace("families/small.yaml", value)))
    assert "mine.yaml:2:10: include:" in message
    assert shown in message


@pytest.mark.parametrize(
    ("family", "shown"),
    [
        ("- a list\n", "small.yaml:1:1: allowed: a mapping"),
        ("a: [\n", "small.yaml:2:1: not YAML"),
        ("", "small.yaml: the file is empty"),
        (FAMILY.replace("finetune:", "finetun:"), "small.yaml:13:3: schedule: unknown key"),
        (FAMILY.replace("identity", "identiti"), "small.yaml:5:26: recipes.base.replace.act1: got 'identiti'"),
    ],
)
def test_mistakes_in_the_family_are_told_at_their_place(folder, family, shown):
    (folder / "families" / "small.yaml").write_text(family)
    assert shown in said_of(write(folder, SPEC))


def test_mistakes_of_both_files_are_told_together(folder):
    (folder / "families" / "small.yaml").write_text(FAMILY.replace("finetune:", "finetun:"))
    lines = said_of(write(folder, SPEC.replace("[3, 32, 32]", "[3, 32]"))).splitlines()
    assert "mine.yaml:4:8: input" in lines[0]
    assert "small.yaml:13:3: schedule" in lines[1]


def test_what_is_missing_from_both_is_told(folder):
    (folder / "families" / "small.yaml").write_text(FAMILY.replace("blocks:", "data:", 1).partition("data:")[0])
    assert "the key 'blocks' is missing" in said_of(write(folder, SPEC))


def test_own_recipes_must_be_used(folder):
    assert "recipes.extra: never used" in said_of(write(folder, SPEC + "recipes: {extra: {append: [relu]}}\n"))


def test_a_text_alone_includes_nothing():
    with pytest.raises(SpecError, match="toy:2:10: include: a text that stands alone"):
        parse_spec(SPEC, file="toy", name="toy")


# --- writing ---

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**15), 10**15),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["1e-3", "no", "0o7", "0x1F", "null", "~", "", "2/3", ".5", "a: b", "# x", "- a", "1_000", "é"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"\A[a-z]{1,4}\Z"), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from("abcd"), VALUES, min_size=1))
def test_written_text_reads_back_as_the_same_values(values):
    tree = read_tree(json.dumps(values, ensure_ascii=False), "values")
    text = text_of(tree, "abcd")
    assert read_tree(text, "text").plain() == values
    assert yaml.safe_load(text).keys() == values.keys()


def test_aliases_are_written_out():
    tree = read_tree("a: &x [1, {b: 2}]\nc: *x\n", "values")
    assert "*" not in text_of(tree, "ac")


def tree_of(value):
    return read_tree(json.dumps({"x": value}, ensure_ascii=False), "values").value["x"]


@given(VALUES, VALUES)
def test_overlay_is_own_value_but_for_mappings(base, own):
    below, above = (tree_of(value) for value in (base, own))
    found = overlay(below, above).plain()
    if not (isinstance(base, dict) and isinstance(own, dict)):
        assert found == own
        return
    assert found.keys() == base.keys() | own.keys()
    assert all(found[key] == base[key] for key in base.keys() - own.keys())
