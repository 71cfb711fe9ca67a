"""The shipped subnets: found by name, built, merged with everything random, certified, saved and proved again."""

import json
from itertools import groupby

import pytest
from commands import SPEC, Caller, tiny_run
from networks import spec_of

import updp
from updp.certificate import certify
from updp.errors import InputError
from updp.pipeline.settings import resolve
from updp.spec.tree import read_tree
from updp.subnet import SubnetConfig, list_subnets, load_subnet
from updp.supernet import build_supernet

# Pruned blocks; a block that is only reparameterized counts, as in the papers' masks.
PRUNED = {
    "convnext_tiny/updp_p3": 3,
    "convnext_tiny/updp_p6": 6,
    "convnext_tiny/updp_p9": 9,
    "deit_tiny_patch16_224/updp_p6": 6,
    "mobilenetv2_100/ds_a": 5,
    "mobilenetv2_100/ds_b": 5,
    "mobilenetv2_100/ds_c": 8,
    "mobilenetv2_100/ds_d": 10,
    "mobilenetv2_140/ds_a": 6,
    "mobilenetv2_140/ds_b": 9,
    "mobilenetv2_140/ds_c": 9,
    "mobilenetv2_140/ds_d": 11,
    "mobilenetv2_140/ds_e": 11,
    "mobilenetv2_140/ds_f": 17,
    "mobilenetv2_140/updp_p11": 11,
    "mobilenetv2_140/updp_p6": 6,
    "mobilenetv2_140/updp_p9": 9,
    "resnet34/updp_p10": 10,
    "resnet34/updp_p6": 6,
    "tf_efficientnet_lite3/ds_a": 15,
    "tf_efficientnet_lite3/ds_b": 13,
    "tf_efficientnet_lite3/ds_c": 11,
    "tf_efficientnet_lite3/ds_d": 8,
}
BY_SPEC = {spec: list(names) for spec, names in groupby(PRUNED, lambda name: name.partition("/")[0])}
# What makes a network of one size only a network of another.
RESIZED = {"deit_tiny_patch16_224": ["input=[3,192,192]", "model.img_size=192"]}


@pytest.fixture
def call(capsys):
    return Caller(capsys)


# --- which there are ---


def test_all_of_them_prune_as_many_blocks_as_they_should():
    assert list_subnets() == list(PRUNED)
    assert updp.list_subnets() == list(PRUNED)
    assert len(PRUNED) == 23
    assert {name: len(load_subnet(name).pruned) for name in PRUNED} == PRUNED


@pytest.mark.parametrize("name", PRUNED)
def test_each_says_where_it_comes_from(name):
    subnet = updp.load_subnet(name)
    assert subnet.spec == name.partition("/")[0]
    assert subnet.about.startswith(("DepthShrinker, table ", "UPDP, table "))
    assert "(arXiv " in subnet.about.partition(". ")[0]


def test_first_blocks_without_expansion_are_never_merged():
    first = {name: load_subnet(name).choice("blocks.0.0") for name in PRUNED if "/ds_" in name}
    assert set(first.values()) == {"keep", "linear"}
    assert sum(choice == "linear" for choice in first.values()) == 7


def test_the_larger_of_our_own_choices_holds_the_smaller():
    for spec, smaller, larger in [("resnet34", 6, 10), ("convnext_tiny", 3, 6)]:
        few, many = (set(load_subnet(f"{spec}/updp_p{number}").pruned) for number in (smaller, larger))
        assert few < many


# --- names ---


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = load_subnet("resnet34/updp_p6")
    assert load_subnet("updp_p6", "resnet34") == named
    assert load_subnet("resnet34/updp_p6", "convnext_tiny") == named
    file = tmp_path / "mine.json"
    named.save(file)
    assert load_subnet(str(file)) == load_subnet("mine.json") == load_subnet(file) == named
    file.rename("mine")
    assert load_subnet("mine") == named


@pytest.mark.parametrize(
    ("name", "spec", "parts"),
    [
        ("ds_g", "mobilenetv2_100", ["got 'ds_g', allowed: ds_a, ds_b, ds_c, ds_d", "did you mean 'ds_", ".json file"]),
        ("resnet34/updp_p7", None, ["did you mean 'resnet34/updp_p", "path of a .json file"]),
        ("updp_p6", None, ["no such subnet: got 'updp_p6'", "resnet34/updp_p6"]),
        ("updp_p6", "resnet18", ["no such subnet: got 'updp_p6'"]),
        ("nosuch.json", None, ["nosuch.json: cannot read the subnet: No such file"]),
        ("../resnet34/updp_p6", None, ["no such subnet"]),
    ],
)
def test_wrong_names(name, spec, parts):
    with pytest.raises(InputError) as caught:
        load_subnet(name, spec)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_commands_take_names(call, tmp_path):
    short, full = (json.loads(call("count", "resnet34", "--subnet", name, "--json").out)
                   for name in ("updp_p6", "resnet34/updp_p6"))  # fmt: skip
    assert short == full
    assert [row["name"] for row in short["blocks"] if row["choice"] == "full"] == [
        *load_subnet("resnet34/updp_p6").pruned
    ]
    call.refuses("count", "resnet34", "--subnet", "mobilenetv2_100/ds_a", names=("another spec", "ds_a.json"))
    call.refuses("count", "resnet34", "--subnet", "p6", names=("allowed: updp_p10, updp_p6",))
    call.refuses("merge", "resnet34", "--subnet", "p6", "--out", tmp_path / "a.safetensors", names=("updp_p10",))
    call.refuses("run", SPEC, "--data", "digits", "--subnet", "p6", "--out", tmp_path / "run", names=("'p6'",))
    assert not list(tmp_path.iterdir())


def test_the_list_shows_them(call):
    rows = json.loads(call("list", "--json").out)
    listed = [subnet for row in rows for subnet in row["subnets"]]
    assert {subnet["subnet"]: subnet["pruned"] for subnet in listed} == PRUNED
    assert all(subnet["spec"] == row["spec"] for row in rows for subnet in row["subnets"])
    shown = call("list").out
    assert [name for name in PRUNED if name not in shown] == []
    assert "UPDP, table 1: Ours-P6 (arXiv 2401.06426)" in shown


# --- networks ---


@pytest.mark.parametrize("name", BY_SPEC)
def test_each_merges_with_its_certificate_at_two_sizes(name):
    """At 224 and at another size, with every parameter and statistic random: to the strict bound."""
    spec = spec_of(name)
    networks = [(spec, (3, 224, 224)), (spec, (3, 97, 75))]
    if name in RESIZED:
        other = resolve(spec, RESIZED[name])
        networks[1] = (other, other.input)
    supernet = None
    for own, size in networks:
        if supernet is None or own is not spec:
            supernet = build_supernet(own, resized=True, seed=0).eval()
        for subnet in BY_SPEC[name]:
            config = load_subnet(subnet)
            supernet.set_subnet(config)
            found = certify(supernet, weights="random", size=size, batch=1)
            assert found.ok, (subnet, size, found.failures())
            assert {record.block for record in found.ops} == set(config.pruned)
            assert set(found.blocks) == set(config.pruned)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mobilenetv2_100/ds_a", ()),
        ("tf_efficientnet_lite3/ds_a", ("--set", "input=[3,96,96]")),
        ("deit_tiny_patch16_224/updp_p6", ()),
    ],
)
def test_saved_and_proved_again(call, tmp_path, name, settings):
    spec, _, own = name.partition("/")
    file = tmp_path / "net.safetensors"
    done = call("merge", spec, "--subnet", own, "--out", file, *settings)
    assert done.status == 0, done
    assert updp.verify(file).ok
    subnet = updp.artefact.inspect(file).subnet
    assert (subnet, subnet.about) == (load_subnet(name), load_subnet(name).about)


def test_a_run_finetunes_a_block_that_is_only_reparameterized(call, tmp_path):
    text = spec_of(SPEC).text
    document = read_tree(text, SPEC).plain()
    document["recipes"]["linear"] = {"kind": "reparam", "replace": {"mlp.act": "identity"}, "merge": []}
    for group in document["blocks"]:
        group["recipes"].append("linear")
    spec = tmp_path / "small.yaml"
    spec.write_text(json.dumps(document), encoding="utf-8")
    subnet = tmp_path / "subnet.json"
    first = "stages.0.blocks.0"
    SubnetConfig("small", {first: "linear", "stages.1.blocks.1": "pointwise"}, about="by hand").save(subnet)
    arguments = tiny_run(tmp_path / "run", "--subnet", subnet, prune=None)
    arguments[1] = spec
    done = call(*arguments)
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "run" / "merge" / "result.json").read_text(encoding="utf-8"))
    assert result["certificate"]["ok"]
    assert {row["name"]: row["choice"] for row in result["after"]["blocks"]}[first] == "linear"
    kept = SubnetConfig.load(tmp_path / "run" / "search" / "subnet.json")
    assert (kept.about, kept.choice(first)) == ("by hand", "linear")
