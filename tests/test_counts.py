"""The costs that the papers print, counted from a spec and a subnet."""

import json

import pytest
from commands import Caller
from networks import kinds, spec_of

from updp.errors import InputError
from updp.oracle import count_subnet
from updp.subnet import SubnetConfig, load_subnet


def test_a_dialect_adds_to_the_products_alone():
    """519 M in the paper, with five operations per output element of a batch norm."""
    subnet = load_subnet("mobilenetv2_140/updp_p6")
    found = count_subnet(spec_of("mobilenetv2_140"), subnet, bn_weight=5)
    assert found.macs / 1e6 == pytest.approx(519.35, abs=0.01)
    assert found.bn_weight == 5
    assert [row.name for row in found.blocks if row.choice == "full"] == list(subnet.pruned)
    bare = count_subnet(spec_of("mobilenetv2_140"), subnet)
    assert found.macs - bare.macs == 5 * found.bn_elements > 0
    assert (found.params, found.depth, found.bn_elements) == (bare.params, bare.depth, bare.bn_elements)


@pytest.mark.parametrize(
    ("name", "billions"), [("convnext_tiny/updp_p9", 2.5745), ("deit_tiny_patch16_224/updp_p6", 0.9487)]
)
def test_what_the_merged_network_multiplies(name, billions):
    found = count_subnet(spec_of(name.partition("/")[0]), load_subnet(name))
    assert found.macs / 1e9 == pytest.approx(billions, abs=5e-5)


@pytest.mark.parametrize(("number", "billions"), [(6, 2.9701), (10, 2.5077)])
def test_blocks_without_a_downsampling_shortcut_save_the_same(number, billions):
    """Which of them a paper pruned, its figures do not tell: the shipped subnet and another one have the same count."""
    plain = [f"layer{s}.{i}" for s, depth in ((1, 3), (2, 4), (3, 6), (4, 3)) for i in range(s > 1, depth)]
    shipped = load_subnet(f"resnet34/updp_p{number}")
    other = SubnetConfig("resnet34", dict.fromkeys(plain[:number], "full"))
    assert set(shipped.pruned) <= set(plain)
    assert shipped != other
    for subnet in (shipped, other):
        assert len(subnet.pruned) == number
        assert count_subnet(spec_of("resnet34"), subnet).macs / 1e9 == pytest.approx(billions, abs=5e-5)


def test_every_pruned_block_takes_its_share():
    """Nothing else changes: the difference of the networks is that of the pruned blocks' own rows."""
    kept = count_subnet(spec_of("mobilenetv2_140"))
    pruned = count_subnet(spec_of("mobilenetv2_140"), load_subnet("mobilenetv2_140/updp_p6"))
    before = {row.name: row for row in kept.blocks}
    changed = [(before[row.name], row) for row in pruned.blocks if row.choice == "full"]
    assert len(changed) == 6
    assert all(row == before[row.name] for row in pruned.blocks if row.choice == "keep")
    for what in ("macs", "params", "depth"):
        shares = sum(getattr(old, what) - getattr(new, what) for old, new in changed)
        assert getattr(kept, what) - getattr(pruned, what) == shares
    assert [(old.depth, new.depth) for old, new in changed] == [(3, 1)] * 6


def test_macs_grow_with_the_input_and_parameters_do_not():
    spec = spec_of("convnext_digits")
    small, large = (count_subnet(spec, size=(3, side, side)) for side in (32, 64))
    counted = {row.name for row in small.blocks}
    assert counted >= set(kinds("convnext_digits"))
    assert [row.macs * 4 for row in small.blocks] == [row.macs for row in large.blocks]
    assert (small.params, small.depth) == (large.params, large.depth)


def test_another_spec_s_subnet_is_refused():
    with pytest.raises(InputError, match="convnext_tiny"):
        count_subnet(spec_of("mobilenetv2_140"), load_subnet("convnext_tiny/updp_p9"))


def test_the_command_counts_the_same(capsys):
    subnet = load_subnet("mobilenetv2_140/updp_p6")
    done = Caller(capsys)("count", "mobilenetv2_140", "--subnet", "updp_p6", "--bn-weight", 5, "--json")
    assert done.status == 0, done
    found = json.loads(done.out)
    assert found["macs"] / 1e6 == pytest.approx(519.35, abs=0.01)
    expected = count_subnet(spec_of("mobilenetv2_140"), subnet, bn_weight=5)
    assert {"macs", "params", "bn_elements", "depth", "blocks"} <= set(found)
    assert [found[key] for key in ("macs", "params", "bn_elements", "depth")] == [
        expected.macs, expected.params, expected.bn_elements, expected.depth,
    ]  # fmt: skip
    assert {row["name"]: row["choice"] for row in found["blocks"] if row["choice"] != "keep"} == subnet.choices
