"""Bad specs: each error with its line, its column and what would be right."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from updp.errors import InputError, SpecError
from updp.spec import apply_settings, list_specs, load_spec, parse_spec, specs_directory
from updp.spec.tree import MAX_BYTES, MAX_NODES, read_tree

GOOD = """\
version: 1
model: {timm: any_model}
input: [3, 32, 32]
structures:
  block:
    - sum:
        - [conv1, bn1, act1, {optional: se}]
        - []
recipes:
  full:
    replace: {act1: identity}
    resize: {conv1: {kernel: 1, at: 2/3}}
    append: [gelu, batchnorm]
    merge: all
blocks:
  - {match: "layers.*", structure: block, recipes: [full]}
"""

# Each case: what is replaced in GOOD, by what, and all errors of it: (line, column, part of the message).
YAML_CASES = {
    "syntax": ("32, 32]", "32, 32", [(4, 11, "not YAML: expected ',' or ']'")]),
    "tab": ("  block:", "\tblock:", [(5, 1, "not YAML: found character")]),
    "control character": (
        "any_model",
        "any\amodel",
        [(2, 18, "not YAML: special characters are not allowed")],
    ),
    "duplicate keys": (
        "{act1: identity}",
        "{act1: identity, bn1: relu, act1: gelu, bn1: gelu}",
        [(11, 42, "the key 'act1' is there already, at s.yaml:11:15"), (11, 54, "already, at s.yaml:11:31")],
    ),
    "duplicate section": (
        "input:",
        "model: {timm: other}\ninput:",
        [(3, 1, "the key 'model' is there already, at s.yaml:2:1")],
    ),
    "python tag": ("any_model", "!!python/object/apply:os.system [ls]", [(2, 15, "tags are not allowed")]),
    "core tag": ("version: 1", "version: !!int 1", [(1, 10, "got the tag 'tag:yaml.org,2002:int'")]),
    "bare tag": ("any_model", "! any_model", [(2, 15, "got the tag '!'")]),
    "alias without anchor": ("any_model", "*name", [(2, 15, "the alias 'name' has no anchor before it")]),
    "recursive alias": (
        "{timm: any_model}",
        "&m {timm: *m}",
        [(2, 18, "the alias 'm' stands inside what it means")],
    ),
    "anchor twice": (
        "{timm: any_model}",
        "&m {timm: &m any_model}",
        [(2, 18, "the anchor 'm' is there already")],
    ),
    "two documents": ("blocks:", "---\nblocks:", [(15, 1, "got a second document, allowed: one")]),
    "number as key": ("{act1: identity}", "{1: identity}", [(11, 15, "write it in quotes: '1'")]),
    "boolean as key": ("{act1: identity}", "{true: identity}", [(11, 15, "write it in quotes: 'true'")]),
    "list as key": ("{act1: identity}", "{[a]: identity}", [(11, 15, "a key must be a string, not a list")]),
    "not finite": (
        "[3, 32, 32]",
        "[3, .inf, 1e999]",
        [(3, 12, "got .inf, allowed: finite numbers"), (3, 18, "got 1e999, allowed: finite numbers")],
    ),
    "long number": ("32, 32]", "32, 99999999999999999999]", [(3, 16, "got a number of 20 digits")]),
    "nested too deep": ("any_model", "[" * 60 + "]" * 60, [(2, 54, "nested more than 40 deep")]),
    "list": (GOOD, "- a\n", [(1, 1, "got a list, allowed: a mapping")]),
    "string": (GOOD, "hello\n", [(1, 1, "got 'hello' (a string), allowed: a mapping")]),
    "empty": (GOOD, "# nothing here\n", [(None, None, "the file is empty")]),
}

SCHEMA_CASES = {
    "unknown key": (
        "structures:",
        "structure:",
        [
            (1, 1, "the key 'structures' is missing"),
            (4, 1, "unknown key: got 'structure', allowed: version,"),
        ],
    ),
    "missing key": ("version: 1\n", "", [(1, 1, "the key 'version' is missing")]),
    "version": ("version: 1", "version: 2", [(1, 10, "version: got 2, allowed: 1")]),
    "version as string": ("version: 1", "version: '1'", [(1, 10, "version: got '1' (a string), allowed: 1")]),
    "version as boolean": ("version: 1", "version: true", [(1, 10, "version: got true, allowed: 1")]),
    "wrong type": ("32, 32]", "32, big]", [(3, 16, "input[2]: got 'big' (a string), allowed: an integer")]),
    "too small": ("32, 32]", "32, 0]", [(3, 16, "input[2]: got 0, allowed: at least 1")]),
    "too short": ("[3, 32, 32]", "[3, 32]", [(3, 8, "input: got 2 entries, allowed: at least 3")]),
    "scalar for a list": ("[3, 32, 32]", "32", [(3, 8, "input: got 32 (a number), allowed: a list")]),
    "model from the network": (
        "any_model",
        "hf-hub:some/model",
        [(2, 15, "model.timm: got 'hf-hub:some/model', allowed: the name of a timm model")],
    ),
    "arguments that updp sets": (
        "any_model}",
        "any_model, num_classes: 3, checkpoint_path: a.pth}",
        [(2, 26, "model: bad key: got 'num_classes'"), (2, 42, "model: bad key: got 'checkpoint_path'")],
    ),
    "step as number": ("[conv1,", "[0,", [(7, 12, "sum[0][0]: got 0 (a number), allowed: a step;")]),
    "step as null": ("[conv1,", "[~,", [(7, 12, "sum[0][0]: got null, allowed: a step;")]),
    "step with a newline": (
        "[conv1,",
        '["conv1\\n",',
        [(7, 12, r"sum[0][0]: got 'conv1\n', allowed: a path")],
    ),
    "misspelt node": ("{optional: se}", "{optinal: se}", [(7, 30, "(did you mean 'optional'?)")]),
    "two nodes in one": (
        "{optional: se}",
        "{optional: se, opaque: se}",
        [(7, 30, "got a mapping with 'optional', 'opaque', allowed: a step; {optional: STEP};")],
    ),
    "claims": (
        "{optional: se}",
        "{opaque: se, enters: [se.a, 3], leave: se.b}",
        [(7, 58, "enters[1]: got 3 (a number), allowed: a string"), (7, 62, "(did you mean 'leaves'?)")],
    ),
    "no claim": ("{optional: se}", "{opaque: se, enters: []}", [(7, 51, "enters: got 0 entries, allowed:")]),
    "sum of one": ("        - []\n", "", [(7, 9, "block[0].sum: got 1 entry, allowed: at least 2")]),
    "axis": (
        "{optional: se}",
        "{across: channels, flow: []}",
        [
            (7, 39, "across: got 'channels', allowed: tokens"),
            (7, 55, "flow: got 0 entries, allowed: at least 1"),
        ],
    ),
    "unknown layer": ("identity}", "identiy}", [(11, 21, "replace.act1: got 'identiy', allowed: identity,")]),
    "unknown appended layers": (
        "[gelu, batchnorm]",
        "[gelu, batch_norm, {after: bn1, layers: [geluu]}]",
        [
            (13, 20, "append[1]: got 'batch_norm'"),
            (13, 54, "append[2].layers[0]: got 'geluu', allowed: batch"),
        ],
    ),
    "append identity": ("[gelu, batchnorm]", "[gelu, identity]", [(13, 20, "append[1]: got 'identity'")]),
    "append without after": (
        "[gelu, batchnorm]",
        "[{behind: bn1, layers: [gelu]}]",
        [(13, 14, "append[0]: the key 'after' is missing"), (13, 15, "got 'behind', allowed: after, layers")],
    ),
    "even kernel": ("kernel: 1", "kernel: 2", [(12, 30, "conv1.kernel: got 2, allowed: 1, 3, 5,")]),
    "no kernel": ("{kernel: 1, at: 2/3}", "0", [(12, 21, "resize.conv1: got 0, allowed: 1, 3, 5,")]),
    "kernel as string": ("{kernel: 1, at: 2/3}", "'3'", [(12, 21, "got '3' (a string), allowed: 1, 3,")]),
    "moment after the end": ("at: 2/3", "at: 1.5", [(12, 37, "conv1.at: got 1.5, allowed: at most 1")]),
    "moment in words": ("at: 2/3", "at: soon", [(12, 37, "at: got 'soon', allowed: a fraction such as 2/3")]),
    "negative epoch": ("at: 2/3", "at: {epoch: -1}", [(12, 45, "at.epoch: got -1, allowed: at least 0")]),
    "merge": ("merge: all", "merge: al", [(14, 12, "full.merge: got 'al', allowed: all (did you mean")]),
    "merge not nested": (
        "merge: all",
        "merge: [conv1, bn1]",
        [(14, 13, "merge[0]: got 'conv1' (a string), allowed: a list"), (14, 20, "merge[1]: got 'bn1'")],
    ),
    "padding": ("merge: all", "padding: last", [(14, 14, "padding: got 'last', allowed: first, keep")]),
    "kind": ("merge: all", "kind: prun", [(14, 11, "kind: got 'prun', allowed: prune, reparam (did you")]),
    "recipe twice": ("[full]", "[full, full]", [(16, 59, "blocks[0].recipes[1]: got 'full' twice")]),
    "no recipe": ("[full]", "[]", [(16, 52, "blocks[0].recipes: got 0 entries, allowed: at least 1")]),
    "empty component": ('"layers.*"', '"layers..*"', [(16, 13, "match: got 'layers..*', allowed: a module")]),
    "two stars": (
        '"layers.*"',
        '["layers.**", "a[3:]"]',
        [
            (16, 14, "match[0]: got 'layers.**', allowed:"),
            (16, 27, "match[1]: got 'a[3:]', allowed: a module"),
        ],
    ),
    "schedule": (
        "version: 1",
        "version: 1\nschedule: {finetune: {epoch: 3}, blend: {k: 2, K: 0}}",
        [
            (2, 23, "schedule.finetune: unknown key: got 'epoch', allowed: epochs,"),
            (2, 42, "(did you mean 'K'?)"),
            (2, 51, "schedule.blend.K: got 0, allowed: at least 1"),
        ],
    ),
    "schedule types": (
        "version: 1",
        "version: 1\nschedule: {train: {epochs: 3, lr: 1e-3x, ema: high}}",
        [
            (2, 28, "train.epochs: got 3, allowed: nothing here; each stage has its own epochs"),
            (2, 35, "train.lr: got '1e-3x' (a string), allowed: a number"),
            (2, 47, "train.ema: got 'high' (a string), allowed: a number or null"),
        ],
    ),
}

NAME_CASES = {
    "step that a recipe replaces": (
        "{act1: identity}",
        "{act2: identity, bn1.act: identity, se: identity}",
        [
            (
                11,
                15,
                "recipes.full.replace.act2: structure 'block' has no such step: got 'act2', allowed: conv1,",
            )
        ],
    ),
    "step that a recipe resizes": (
        "{conv1: {k",
        "{conv2: {k",
        [(12, 14, "no such step: got 'conv2', allowed:")],
    ),
    "part of a step that is resized": (
        "{conv1: {k",
        "{conv1.weight: {k",
        [(12, 14, "recipes.full.resize['conv1.weight']: structure 'block' has no such step")],
    ),
    "step to append after": (
        "[gelu, batchnorm]",
        "[{after: bn2, layers: [gelu]}]",
        [(13, 22, "append[0].after: structure 'block' has no such step: got 'bn2', allowed:")],
    ),
    "step to merge": (
        "all",
        "[[conv1, bn3]]",
        [(14, 21, "merge[0][1]: structure 'block' has no such step:")],
    ),
    "structure of a misspelt group": (
        "blocks:",
        "  more: {extends: full}\nblocks:\n  - {match: b, structure: other, recipes: [more]}",
        [(17, 27, "no such structure: got 'other', allowed: block")],
    ),
    "step that another structure has": (
        "    - sum:",
        "    - sum: [[conv1], []]\n  wide:\n    - sum:",
        [
            (7, 3, "structures.wide: never used"),
            (
                13,
                15,
                "recipes.full.replace.act1: structure 'block' has no such step: got 'act1', allowed: conv1",
            ),
        ],
    ),
    "inherited step": (
        GOOD,
        GOOD.replace("recipes:\n", "  other: [conv1]\nrecipes:\n", 1).replace(
            "blocks:",
            "  more: {extends: full, replace: {bn1: relu}}\nblocks:\n  - {match: b, structure: other, recipes: [more]}",
        ),
        [
            (
                12,
                15,
                "recipes.full.replace.act1: structure 'other' has no such step: got 'act1', allowed: conv1",
            ),
            (
                16,
                35,
                "recipes.more.replace.bn1: structure 'other' has no such step: got 'bn1', allowed: conv1",
            ),
        ],
    ),
    "extends nothing": (
        "  full:\n",
        "  full:\n    extends: more\n",
        [(11, 14, "recipes.full.extends: no such recipe: got 'more', but there is none")],
    ),
    "extends in a circle": (
        "blocks:",
        "  a: {extends: b}\n  b: {extends: a}\nblocks:",
        [
            (15, 3, "recipes.a: never used"),
            (15, 16, "recipes.a.extends: extends itself: a -> b -> a"),
            (16, 3, "recipes.b: never used"),
            (16, 16, "recipes.b.extends: extends itself: b -> a -> b"),
        ],
    ),
    "reserved recipe name": (
        "  full:",
        "  keep:",
        [
            (10, 3, "recipes: bad key: got 'keep', allowed: any name but keep and drop"),
            (16, 53, "allowed: keep"),
        ],
    ),
    "reserved step": ("{optional: se}", "{optional: negate}", [(7, 30, "got 'negate', which is reserved")]),
    "sum named as a step": ("- []\n", "- []\n      as: bn1\n", [(6, 7, "the name 'bn1' is there already")]),
    "unknown structure": (
        ": block,",
        ": blok,",
        [(16, 36, "structure: no such structure: got 'blok', allowed: block")],
    ),
    "unknown recipe": (
        "[full]",
        "[ful]",
        [(16, 53, "blocks[0].recipes[0]: no such recipe: got 'ful', allowed: full")],
    ),
    "empty slice": (
        '"layers.*"',
        '"layers[3:3]"',
        [(16, 13, "blocks[0].match: got 'layers[3:3]', which is empty")],
    ),
    "slice backwards": (
        '"layers.*"',
        '[a, "b[4:2]"]',
        [(16, 17, "blocks[0].match[1]: got 'b[4:2]', which is empty")],
    ),
    "unused recipe": ("blocks:", "  more: {extends: full}\nblocks:", [(15, 3, "recipes.more: never used")]),
    "unused structure": (
        "recipes:\n",
        "  other: [conv1]\nrecipes:\n",
        [(9, 3, "structures.other: never used")],
    ),
    "fraction above 1": ("at: 2/3", "at: 4/3", [(12, 37, "conv1.at: got 4/3, allowed: from 0 to 1")]),
    "crop range": (
        "version: 1",
        "version: 1\nschedule: {train: {scale: [1, 0.5]}}",
        [(2, 27, "schedule.train.scale: got [1, 0.5], allowed: the smaller number first")],
    ),
    "channels": (
        "version: 1",
        "version: 1\ndata: {mean: [0.5], std: [1, 1, 0], interpolation: cubic}",
        [
            (2, 14, "data.mean: got 1 entry, allowed: 3, one for each channel of the input"),
            (2, 33, "data.std[2]: got 0, allowed: more than 0"),
            (2, 52, "data.interpolation: got 'cubic', allowed: nearest, bilinear, bicubic,"),
        ],
    ),
}

CASES = {**YAML_CASES, **SCHEMA_CASES, **NAME_CASES}


def problems_of(text):
    with pytest.raises(SpecError) as caught:
        parse_spec(text, file="s.yaml", name="s")
    assert caught.value.exit_status == 2
    return caught.value.problems


def test_good_spec_is_good():
    assert parse_spec(GOOD, file="s.yaml", name="s").recipes["full"].resize["conv1"].kernel == 1


def test_no_case_is_lost():
    assert len(CASES) == len(YAML_CASES) + len(SCHEMA_CASES) + len(NAME_CASES) == 83


@pytest.mark.parametrize("case", CASES)
def test_bad_spec(case):
    old, new, expected = CASES[case]
    assert GOOD.count(old) >= 1
    problems = problems_of(GOOD.replace(old, new, 1))
    places = [(problem.place.line, problem.place.column) for problem in problems]
    assert places == [(line, column) for line, column, _ in expected], [str(problem) for problem in problems]
    for problem, (_, _, message) in zip(problems, expected, strict=True):
        assert message in str(problem)
        assert "\n" not in str(problem)


def test_errors_of_all_kinds_come_together_in_the_order_of_the_file():
    bad = GOOD.replace("input: [3, 32, 32]", "input: 3").replace("act1: identity", "act2: identity")
    bad = bad.replace("gelu,", "gelo,").replace("[full]", "[ful]").replace("[conv1,", "[conv1.,")
    lines = [problem.place.line for problem in problems_of(bad)]
    assert lines == [3, 7, 13, 16]


def test_a_bad_part_of_a_recipe_does_not_hide_its_other_parts():
    problems = problems_of(GOOD.replace("act1: identity", "act2: identity").replace("gelu,", "gelo,"))
    assert [str(problem).split(": ")[1] for problem in problems] == [
        "recipes.full.replace.act2",
        "recipes.full.append[0]",
    ]


def test_the_form_of_a_message():
    (problem,) = problems_of(GOOD.replace("[full]", "[ful]"))
    expected = "s.yaml:16:53: blocks[0].recipes[0]: no such recipe: got 'ful', allowed: full (did you mean 'full'?)"
    assert str(problem) == expected


def test_aliases_cannot_explode():
    lines = ["a0: &a0 [" + ", ".join("x" * 10) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 12)]
    (problem,) = problems_of("\n".join(lines))
    assert f"more than {MAX_NODES} values, aliases expanded" in problem.message
    assert problem.place.line == 5  # 10 -> 100 -> 1000 -> 10000 -> too many


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{a: " * 50_000, "- " * 100_000, "? " * 100_000, "a" * (MAX_BYTES + 1)]
)
def test_huge_files_are_refused_quickly(text):
    assert re.search("nested more than|larger than|not YAML", problems_of(text)[0].message)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\nmodel: caf\xe9\n")
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "empty.yaml").write_bytes(b"")
    expected = {
        tmp_path / "missing.yaml": ": cannot read the spec: No such file or directory",
        tmp_path: ": cannot read the spec: Is a directory",
        tmp_path / "latin.yaml": ":2:11: not UTF-8 text",
        tmp_path / "big.yaml": ": the file is larger than 1024 KiB",
        tmp_path / "empty.yaml": ": the file is empty, it must hold a spec",
        tmp_path / "nul\0.yaml": ": cannot read the spec: embedded null byte",
    }
    for path, message in expected.items():
        with pytest.raises(SpecError) as caught:
            load_spec(path)
        assert str(caught.value) == f"{path}{message}"


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(SpecError, match=r"no such spec: got 'convnext_tony', allowed: .*did you mean 'convnext_tiny'"):
        load_spec("convnext_tony")


def test_the_command_checks_all_files(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(GOOD)
    bad.write_text(GOOD.replace("[full]", "[ful]").replace("kernel: 1", "kernel: 2"))

    def run(*arguments):
        command = [sys.executable, "-m", "updp.spec", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)

    assert (run(good).returncode, run(good).stderr) == (0, "")
    result = run(bad, good, tmp_path / "none.yaml")
    assert result.returncode == 2
    places = [line.partition(": ")[0] for line in result.stderr.splitlines()]
    assert places == [f"{bad}:12:30", f"{bad}:16:53", f"{tmp_path / 'none.yaml'}"]
    assert run().returncode == 2


SETTING_CASES = {
    "finetune.epoch=3": "finetune: unknown key: got 'epoch', allowed: epochs, ",
    "fintune.epochs=3": "unknown key: got 'fintune', allowed: seed, held_out, .*did you mean 'finetune'",
    "finetune.epochs=three": "finetune.epochs: got 'three' .a string., allowed: an integer",
    "finetune.epochs=1.5": "finetune.epochs: got 1.5 .a number., allowed: an integer",
    "blend.K=0.5": "blend.K: got 0.5, allowed: at least 1",
    "blend.mode=fast": "blend.mode: got 'fast', allowed: progressive, direct",
    "finetune=3": "finetune: got 3 .a number., allowed: a mapping",
    "seed=": "seed: got null, allowed: an integer",
    "seed": "allowed: KEY=VALUE, for example finetune.epochs=3",
    "=3": "allowed: KEY=VALUE",
    "finetune..epochs=3": "allowed: KEY=VALUE",
    "seed=[1": "seed: not YAML: ",
    "seed=!!int 3": "seed: got the tag",
    "train.epochs=3": "train.epochs: got 3, allowed: nothing here; each stage has its own epochs",
    "finetune.scale=[1, 0.5]": "finetune.scale: got .1, 0.5., allowed: the smaller number first",
}


@pytest.mark.parametrize("setting", SETTING_CASES)
def test_bad_settings(setting):
    spec = parse_spec(GOOD, file="s.yaml", name="s")
    with pytest.raises(InputError, match=re.escape(f"--set {setting}: ") + SETTING_CASES[setting]) as caught:
        apply_settings(spec, ["seed=3", setting])
    assert len(caught.value.problems) == 1


def test_all_bad_settings_come_together():
    with pytest.raises(InputError) as caught:
        apply_settings(parse_spec(GOOD, file="s.yaml", name="s"), ["sed=3", "blend.K=0", "seed"])
    assert len(caught.value.problems) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab.*[]:/0{}&!", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["sum", "at", "x\n", "after", "\ud800"]), inner)
    ),
    max_leaves=6,
)


def paths_in(value, path=()):
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        yield from paths_in(item, (*path, key))


@given(data=st.data())
@settings(max_examples=200)
def test_any_change_of_a_value_gives_a_spec_or_a_spec_error(data):
    name = data.draw(st.sampled_from(list_specs()))
    tree = read_tree((specs_directory() / f"{name}.yaml").read_text(), name).plain()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(paths_in(tree), key=str)))
        if not path:
            continue
        parent = tree
        for part in path[:-1]:
            parent = parent[part]
        if data.draw(st.booleans()):
            parent[path[-1]] = data.draw(JSON)
        else:
            parent.pop(path[-1])
    check_only_spec_errors(json.dumps(tree))


@given(data=st.data())
@settings(max_examples=200)
def test_any_change_of_the_text_gives_a_spec_or_a_spec_error(data):
    text = (specs_directory() / f"{data.draw(st.sampled_from(list_specs()))}.yaml").read_text()
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.integers(0, len(text)))
        new = data.draw(st.text("ab01 \n\t:-,[]{}&*!|>'\"%@#?~\u2028\ufeff\x00é", max_size=3))
        text = text[:first] + new + text[first + data.draw(st.integers(0, 12)) :]
    check_only_spec_errors(text)


def check_only_spec_errors(text):
    spec, problems = None, ()
    try:
        spec = parse_spec(text, file="s.yaml", name="s")
    except SpecError as error:
        problems = error.problems
    assert (spec is None) == bool(problems)
    assert all(problem.place.file == "s.yaml" and problem.message for problem in problems)
    assert all(str(problem).isprintable() for problem in problems)
    if spec is not None:
        assert spec.text == text
        assert hash(spec) == hash(parse_spec(text, file="s.yaml", name="s"))
