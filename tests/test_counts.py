"""The costs that the papers print, counted from a spec and a subnet."""

import json

import pytest
from commands import Caller
from networks import kinds, spec_of

from updp.errors import InputError
from updp.oracle import count_subnet
from updp.subnet import SubnetConfig

# DepthShrinker's search result for MobileNetV2-1.4, "MBV2-1.4-DS-A": the 17 inverted residuals in order, 0 is pruned.
MASK_A = "10011010101101111"
MOBILENET_DEPTHS = (1, 2, 3, 4, 3, 3, 1)
CONVNEXT_STAGES = (3, 2, 4, 0)  # UPDP, table 3: pruned blocks of each stage


def mask_a() -> SubnetConfig:
    blocks = [f"blocks.{stage}.{i}" for stage, depth in enumerate(MOBILENET_DEPTHS) for i in range(depth)]
    pruned = [block for block, bit in zip(blocks, MASK_A, strict=True) if bit == "0"]
    return SubnetConfig("mobilenetv2_140", dict.fromkeys(pruned, "full"))


def convnext_stages() -> SubnetConfig:
    pruned = [f"stages.{stage}.blocks.{i}" for stage, number in enumerate(CONVNEXT_STAGES) for i in range(number)]
    return SubnetConfig("convnext_tiny", dict.fromkeys(pruned, "pointwise"))


def resnet_blocks(number: int) -> SubnetConfig:
    """Blocks without a downsampling shortcut: all of them cost the same."""
    plain = [f"layer{s}.{i}" for s, depth in ((1, 3), (2, 4), (3, 6), (4, 3)) for i in range(s > 1, depth)]
    return SubnetConfig("resnet34", dict.fromkeys(plain[:number], "full"))


def test_mobilenet_in_the_dialect_of_its_paper():
    """519 M in the paper, with five operations per output element of a batch norm."""
    subnet = mask_a()
    found = count_subnet(spec_of("mobilenetv2_140"), subnet, bn_weight=5)
    assert found.macs / 1e6 == pytest.approx(519.35, abs=0.01)
    assert found.bn_weight == 5
    assert [row.name for row in found.blocks if row.choice == "full"] == list(subnet.pruned)
    bare = count_subnet(spec_of("mobilenetv2_140"), subnet)
    assert found.macs - bare.macs == 5 * found.bn_elements > 0
    assert (found.params, found.depth, found.bn_elements) == (bare.params, bare.depth, bare.bn_elements)


def test_convnext_by_stages():
    found = count_subnet(spec_of("convnext_tiny"), convnext_stages())
    assert found.macs / 1e9 == pytest.approx(2.5745, abs=5e-5)
    assert found.params / 1e6 == pytest.approx(23.65, abs=5e-3)


def test_deit_with_half_of_its_blocks():
    pruned = {f"blocks.{i}": "mlp" for i in range(6)}
    found = count_subnet(spec_of("deit_tiny_patch16_224"), SubnetConfig("deit_tiny_patch16_224", pruned))
    assert found.macs / 1e9 == pytest.approx(0.9487, abs=5e-5)


@pytest.mark.parametrize(("number", "billions"), [(6, 2.9701), (10, 2.5077)])
def test_resnet_by_number_of_blocks(number, billions):
    subnet = resnet_blocks(number)
    assert len(subnet.choices) == number
    found = count_subnet(spec_of("resnet34"), subnet)
    assert found.macs / 1e9 == pytest.approx(billions, abs=5e-5)


def test_every_pruned_block_takes_its_share():
    """Nothing else changes: the difference of the networks is that of the pruned blocks' own rows."""
    kept = count_subnet(spec_of("mobilenetv2_140"))
    pruned = count_subnet(spec_of("mobilenetv2_140"), mask_a())
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
        count_subnet(spec_of("mobilenetv2_140"), convnext_stages())


def test_the_command_counts_the_same(tmp_path, capsys):
    subnet = tmp_path / "subnet.json"
    mask_a().save(subnet)
    done = Caller(capsys)("count", "mobilenetv2_140", "--subnet", subnet, "--bn-weight", 5, "--json")
    assert done.status == 0, done
    found = json.loads(done.out)
    assert found["macs"] / 1e6 == pytest.approx(519.35, abs=0.01)
    expected = count_subnet(spec_of("mobilenetv2_140"), mask_a(), bn_weight=5)
    assert {"macs", "params", "bn_elements", "depth", "blocks"} <= set(found)
    assert [found[key] for key in ("macs", "params", "bn_elements", "depth")] == [
        expected.macs, expected.params, expected.bn_elements, expected.depth,
    ]  # fmt: skip
    assert {row["name"]: row["choice"] for row in found["blocks"] if row["choice"] != "keep"} == mask_a().choices
