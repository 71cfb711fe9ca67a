"""Solving for merged operators: what an operator should give, what appended layers pass on, which blocks are chosen."""

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import merge_block, parse, random_blocks, random_input, random_model, spec_of
from torch import nn

from updp.calibrate import (
    Damage,
    DamageTable,
    SolveSettings,
    choose,
    costs,
    measure_damage,
    network_damage,
    solve_blocks,
    solve_subnet,
)
from updp.calibrate import damage as damage_module
from updp.calibrate.appended import Range, open_appended
from updp.calibrate.blocks import _Problem
from updp.calibrate.equations import Equations
from updp.calibrate.kept import flow_of
from updp.calibrate.memory import equation_bytes
from updp.calibrate.observe import Value, key_of, observe, record, reference_of
from updp.calibrate.rows import shape_of
from updp.certificate import relative
from updp.errors import InputError
from updp.flow import Call, walk
from updp.frozen import FrozenMap
from updp.recipe import prune
from updp.spec import ArchSpec
from updp.structure import get_block
from updp.supernet import Supernet, build_supernet

# A block of every family, with the recipe to solve it under.
BLOCKS = [
    ("convnext_digits", "stages.1.blocks.1", "full"),
    ("convnext_digits", "stages.1.blocks.1", "pointwise"),
    ("deit_digits", "blocks.1", "mlp"),
    ("mobilenetv2_100", "blocks.2.0", "full"),
    ("mobilenetv2_100", "blocks.2.1", "full"),
    ("mobilenetv2_100", "blocks.2.1", "shrink"),
    ("resnet18", "layer2.0", "full"),
    ("resnet18", "layer2.1", "full"),
    ("tf_efficientnet_lite0", "blocks.3.0", "full"),
]


def at_start(spec: ArchSpec) -> ArchSpec:
    recipes = {name: dataclasses.replace(recipe, compose="start") for name, recipe in spec.recipes.items()}
    return dataclasses.replace(spec, recipes=FrozenMap(recipes))


def batches(*shape: int, number: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(number)]
    return lambda: iter(kept)


# --- operators that are composed at the start ---


@pytest.mark.parametrize(("name", "block", "recipe"), BLOCKS)
def test_composed_at_the_start_is_merged_at_the_end(name, block, recipe):
    """The same operator; nothing is left to be merged but appended norms."""
    bound, rule = random_blocks(name)[block], spec_of(name).recipes[recipe]
    flow = prune(bound, dataclasses.replace(rule, compose="start")).double().eval()
    plain = dataclasses.replace(rule, append=())
    late = prune(bound, plain, resized=True).double().eval()
    early = prune(bound, dataclasses.replace(plain, compose="start")).double().eval()
    x = random_input(bound)
    with torch.no_grad():
        assert relative(early(x), late(x)) <= 1e-12
    assert len(flow.composed) == 1
    assert not flow.pending
    (operator,) = (flow.part(step) for step in flow.composed)
    assert isinstance(operator.bias, nn.Parameter)
    assert operator.weight.requires_grad
    merged = merge_block(bound, dataclasses.replace(rule, compose="start"))
    assert next(iter(flow.composed)) in merged.merged.named_parts


def test_a_scale_behind_a_named_merge_is_composed_too():
    bound = random_blocks("convnext_digits")["stages.1.blocks.1"]
    rule = spec_of("convnext_digits").recipes["pointwise"]
    flow = prune(bound, dataclasses.replace(rule, compose="start"))
    names = [node.name for node in walk(flow.nodes) if isinstance(node, Call)]
    assert "gamma" not in names
    assert "conv_dw" in names
    assert [node.name for node in flow.composed["composed.0"] if isinstance(node, Call)][-2:] == ["gamma", "drop_path"]


# --- what an operator should give ---


@pytest.mark.parametrize(("name", "block", "recipe"), BLOCKS)
def test_an_operator_that_gives_what_is_wanted_makes_the_block_its_baseline(name, block, recipe):
    """Put the wanted values in the operator's place: the flow without appended layers gives the baseline's output.

    On other inputs than the baseline's too: what the shortcut brings is made up for.
    """
    bound = random_blocks(name)[block]
    rule = dataclasses.replace(spec_of(name).recipes[recipe], compose="start", append=())
    flow = prune(bound, rule).double().eval()
    (operator,) = flow.composed
    x, other = random_input(bound), random_input(bound, seed=9)
    with torch.no_grad():
        expected = bound.module.eval()(x.clone(), *bound.args, **bound.kwargs)
        seen = observe(flow, operator, other, record(reference_of(bound).double(), x))
        assert flow.part(operator)(seen.input).shape == seen.wanted.shape
        with _giving(flow.part(operator), seen.wanted):
            assert relative(flow(other), expected) <= 1e-12


class _giving:
    def __init__(self, module: nn.Module, value: torch.Tensor) -> None:
        self.handle = module.register_forward_hook(lambda *_: value)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()


def test_the_reference_has_every_step_of_the_block():
    bound = random_blocks("mobilenetv2_100")["blocks.2.1"]
    flow = reference_of(bound).double()
    x = random_input(bound)
    with torch.no_grad():
        values = record(flow, x)
        assert relative(flow(x), bound.module(x.clone())) <= 1e-12
    assert {("conv_pw",), ("bn1",), ("bn1.act",), ("conv_dw",), ("bn3.act",)} <= values.keys()
    (whole,) = (key_of(node) for node in flow.nodes)
    assert torch.equal(values[whole].tensor, flow(x))


# --- solving ---


def without_activations(name: str) -> Supernet:
    """A network whose blocks are affine already: what is solved must be found exactly."""
    spec = at_start(spec_of(name))
    model = random_model(spec)
    for block in spec_blocks(name):
        for module in get_block(model, block).modules():
            for child, inner in list(module.named_children()):
                if isinstance(inner, nn.ReLU | nn.ReLU6):
                    setattr(module, child, nn.Identity())
    return build_supernet(spec, model, size=(3, 48, 48)).double().eval()


def spec_blocks(name: str) -> list[str]:
    return {"mobilenetv2_100": ["blocks.3.1", "blocks.4.1"], "resnet18": ["layer3.1", "layer2.0"]}[name]


@pytest.mark.parametrize("name", ["mobilenetv2_100"])
def test_an_affine_block_is_found_exactly(name):
    """Interior and border: the padding in the middle of the block is right only if the solution takes it in."""
    net = without_activations(name)
    images = batches(8, 3, 48, 48, number=6)
    solved = solve_subnet(net, net.configure(spec_blocks(name)), images, SolveSettings(positions=10_000, restore=False))
    assert [each.block for each in solved] == sorted(spec_blocks(name))
    # the bias of the padded ring is another one, and the ridge is never 0: what is left is small, not nothing
    assert all(each.error < 0.05 for each in solved)
    assert all(each.error < each.error_before + 1e-9 for each in solved)


@pytest.mark.parametrize("name", ["convnext_digits", "deit_digits"])
def test_solved_blocks_are_better_than_merged_ones(name):
    spec = at_start(spec_of(name))
    net = build_supernet(spec, random_model(spec)).double().eval()
    images, judge = batches(32, *spec.input, number=4), batches(16, *spec.input, seed=5)
    subnet = net.configure(list(net.available)[1:3])
    merged = network_damage(net, subnet, judge)
    baseline = {name: tensor.clone() for name, tensor in net.state_dict().items() if ".keep." in name}
    solved = solve_subnet(net, subnet, images)
    assert all(each.error < each.error_before for each in solved)
    assert network_damage(net, subnet, judge) < 0.5 * merged
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in baseline.items())


def test_a_merged_operator_that_is_best_already_stays():
    """What is held out is just what it gives; what is to fit is off by noise, and fewer rows than unknowns."""
    operator = nn.Conv2d(4, 3, 3, padding=1).double()
    weight = operator.weight.clone()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 4, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        wanted = operator(x)
        wanted[:4] += 0.1 * torch.randn(wanted[:4].shape, generator=generator, dtype=torch.float64)
        shape = shape_of(operator)
        problem = _Problem("block", "operator", operator, Equations(*shape), Equations(*shape))
        problem.add(x, wanted, SolveSettings(positions=4), generator)
        solved = problem.solve(SolveSettings())
    assert not solved.determined
    assert solved.ridge == float("inf")
    assert solved.error == solved.error_before < 1e-12
    assert torch.equal(operator.weight, weight)


def test_few_images_are_said_and_ridged():
    spec = at_start(spec_of("convnext_digits"))
    net = build_supernet(spec, random_model(spec)).double().eval()
    (solved,) = solve_subnet(net, net.configure(["stages.2.blocks.1"]), batches(4, *spec.input, number=2))
    assert not solved.determined
    assert solved.samples < solved.unknowns
    assert solved.ridge > 0
    assert solved.error < solved.error_before


def test_a_later_block_makes_up_for_an_earlier_one():
    """An offset behind the first block is taken back by the second, which is solved on what it is really given."""
    spec = at_start(spec_of("convnext_digits"))
    images, judge = batches(32, *spec.input, number=4), batches(16, *spec.input, seed=5)
    net = build_supernet(spec, random_model(spec)).double().eval()
    first, second = "stages.1.blocks.1", "stages.1.blocks.2"
    both = net.configure([first, second])
    solve_blocks(net, {first: "full", second: "full"}, net.all_keep(), images)
    net.blocks[first].choices["full"].part("append.1").bias.data += 3
    alone = network_damage(net, both, judge)
    solve_blocks(net, {second: "full"}, net.configure([first]), images)
    assert network_damage(net, both, judge) < 0.3 * alone


def test_blocks_solved_together_are_solved_as_alone():
    spec = at_start(spec_of("convnext_digits"))
    images = batches(16, *spec.input)
    net = build_supernet(spec, random_model(spec)).double().eval()
    names = list(net.available)[:2]
    together = solve_blocks(net, dict.fromkeys(names, "full"), net.all_keep(), images)
    alone = [each for name in names for each in solve_blocks(net, {name: "full"}, net.all_keep(), images)]
    for one, other in zip(together, alone, strict=True):
        assert (one.block, one.samples, one.unknowns) == (other.block, other.samples, other.unknowns)
        assert one.error == pytest.approx(other.error, rel=0.2), "other positions"


def test_solving_again_begins_from_the_beginning():
    spec = at_start(spec_of("convnext_digits"))
    images = batches(16, *spec.input)
    net = build_supernet(spec, random_model(spec)).double().eval()
    subnet = net.configure(list(net.available)[:2])
    first = solve_subnet(net, subnet, images)
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    solve_subnet(net, net.all_pruned(), images)
    assert solve_subnet(net, subnet, images) == first
    for name, tensor in net.state_dict().items():
        if any(f"{block}." in name for block in subnet.pruned):
            assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("recipe", ["full", "pointwise"])
def test_no_images_and_bad_values_are_told(recipe):
    spec = at_start(spec_of("convnext_digits"))
    net = build_supernet(spec, random_model(spec))
    subnet = net.configure([next(iter(net.available))], recipe)
    with pytest.raises(InputError, match="no images"):
        solve_subnet(net, subnet, lambda: iter(()))
    next(net.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(InputError, match=r"block stages\.0\.blocks\.0: the network's values are not finite"):
        solve_subnet(net, subnet, batches(4, *spec.input, dtype=torch.float64))


# --- appended layers ---


@pytest.mark.parametrize(
    ("name", "block", "recipe", "opens"),
    [
        ("mobilenetv2_100", "blocks.2.1", "full", True),  # ReLU6: scaled and shifted
        ("convnext_digits", "stages.1.blocks.1", "full", True),  # GELU: shifted
        ("convnext_digits", "stages.1.blocks.1", "pointwise", True),  # by the bias of one branch
        ("deit_digits", "blocks.1", "mlp", True),
        ("resnet18", "layer2.1", "full", True),  # a batch norm alone
        ("mobilenetv2_100", "blocks.2.1", "shrink", False),  # no batch norm gives back what ReLU6 needs
    ],
)
def test_appended_layers_pass_on_what_they_are_given(name, block, recipe, opens):
    bound = random_blocks(name)[block]
    rule = dataclasses.replace(spec_of(name).recipes[recipe], compose="start")
    flow = prune(bound, rule).double().eval()
    bare = prune(bound, dataclasses.replace(rule, append=())).double().eval()
    x = random_input(bound)
    axis = "first" if x.dim() == 4 else "last"
    with torch.no_grad():
        expected = bare(x)
        given = Range.of(Value(expected, axis))
        given.add(Value(expected, axis))
        assert open_appended(flow, given) is opens
        if opens:
            assert relative(flow(x), expected) <= 1e-7, "a GELU's tail"


def test_a_bias_per_tap_is_scaled_with_the_weight():
    bound = random_blocks("mobilenetv2_100")["blocks.2.1"]
    rule = dataclasses.replace(spec_of("mobilenetv2_100").recipes["full"], compose="start", padding="keep")
    flow = prune(bound, rule).double().eval()
    bare = prune(bound, dataclasses.replace(rule, append=())).double().eval()
    assert flow.part("composed.0").taps is not None
    x = random_input(bound)
    with torch.no_grad():
        given = Range.of(Value(bare(x), "first"))
        given.add(Value(bare(x), "first"))
        assert open_appended(flow, given)
        assert relative(flow(x), bare(x)) <= 1e-9


def test_a_sum_can_be_shifted_but_not_scaled():
    """ReLU6 behind a shortcut that stays: scaling the branch would not scale the shortcut."""
    bound = random_blocks("convnext_digits")["stages.1.blocks.1"]
    rule = spec_of("convnext_digits").recipes["pointwise"]
    relu6 = dataclasses.replace(rule, append=(dataclasses.replace(rule.append[0], layers=("relu6", "batchnorm")),))
    flow = prune(bound, dataclasses.replace(relu6, compose="start")).double().eval()
    weights = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    given = Range.of(Value(torch.zeros(bound.output_shape, dtype=torch.float64), "first"))
    given.add(Value(torch.randn(bound.output_shape, dtype=torch.float64), "first"))
    assert not open_appended(flow, given)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in flow.state_dict().items()), "nothing half done"


# --- which blocks ---


def table(*rows: tuple[str, str, float, int], macs: int = 1000) -> DamageTable:
    return DamageTable("toy", macs, 10, tuple(Damage(b, r, d, 0.1, 100 - saved, 100) for b, r, d, saved in rows))


ROWS = st.lists(
    st.tuples(st.sampled_from("abcde"), st.sampled_from(["one", "two"]), st.floats(0, 5), st.integers(-50, 90)),
    min_size=1, max_size=8, unique_by=lambda row: row[:2],
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 5), st.none() | st.floats(0.5, 0.99))
def test_the_choice_is_the_best_of_all(rows, prune_, macs):
    found = table(*rows)
    names = sorted({row[0] for row in rows})
    if prune_ > len(names):
        with pytest.raises(InputError, match=f"allowed: 1 to {len(names)}"):
            choose(found, prune=prune_, macs=macs)
        return
    options = [[None, *(row for row in rows if row[0] == name)] for name in names]
    fitting = [
        [row for row in pick if row is not None]
        for pick in itertools.product(*options)
        if sum(row is not None for row in pick) == prune_
    ]
    fitting = [p for p in fitting if macs is None or sum(row[3] for row in p) >= 1000 * (1 - macs) - 1e-6]
    if not fitting:
        with pytest.raises(InputError, match="macs: "):
            choose(found, prune=prune_, macs=macs)
        return
    subnet = choose(found, prune=prune_, macs=macs)
    assert len(subnet.pruned) == prune_
    chosen = sum(row[2] for row in rows if subnet.choice(row[0]) == row[1])
    assert chosen == pytest.approx(min(sum(row[2] for row in p) for p in fitting), abs=1e-6)


def test_an_impossible_budget_says_what_would_be_possible():
    with pytest.raises(InputError, match=r"leaves 0\.870x of the baseline's"):
        choose(table(("a", "full", 0.1, 50), ("a", "less", 0.2, 80), ("b", "full", 0.1, 50)), macs=0.5)


def test_a_table_is_saved_and_read_back(tmp_path, monkeypatch):
    spec = at_start(spec_of("deit_digits"))
    net = build_supernet(spec, random_model(spec)).double().eval()
    monkeypatch.setattr(costs, "BLOCK_SECONDS", 0.001)
    found = measure_damage(net, batches(16, *spec.input), batches(8, *spec.input, seed=3))
    assert [(row.block, row.recipe) for row in found.rows] == [(name, "mlp") for name in net.available]
    assert all(row.damage > 0 and row.macs < row.macs_before for row in found.rows)
    assert found.images == 24
    assert net.subnet == net.all_keep()
    found.save(tmp_path / "damage.json")
    assert DamageTable.load(tmp_path / "damage.json") == found
    choose(found, prune=2)


@pytest.mark.parametrize("change", [{"version": 1}, {"rows": [{"block": "a"}]}, {"macs": "many"}, {"rows": 3}])
def test_a_damaged_table_is_refused(tmp_path, change):
    data = {"version": 2, **dataclasses.asdict(table(("a", "full", 0.1, 5))), **change}
    (tmp_path / "damage.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"damage\.json: not a table of damages"):
        DamageTable.load(tmp_path / "damage.json")


def test_equations_of_many_blocks_stay_below_the_stated_memory(monkeypatch):
    spec = at_start(spec_of("convnext_digits"))
    net = build_supernet(spec, random_model(spec))
    pairs = damage_module.pairs_in(net)
    monkeypatch.setattr(damage_module, "MEMORY", 8 << 20)
    groups = damage_module.groups(net, pairs)
    assert sorted(pair for group in groups for pair in group) == sorted(pairs)
    sizes = [[equation_bytes(flow_of(net, pair)) for pair in group] for group in groups]
    assert len(groups) > 4
    assert all(sum(size) <= 8 << 20 or len(size) == 1 for size in sizes)


def test_damage_is_the_divergence_of_the_answers():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()
    expected = (0.5 * torch.tensor(0.5 / 0.25).log() + 0.5 * torch.tensor(0.5 / 0.75).log()) / 2
    assert damage_module.divergence([p], [q]) == pytest.approx(expected.item())
    assert damage_module.divergence([p], [p]) == 0


COMPOSE = """
version: 1
model: {timm: resnet18}
input: [3, 32, 32]
structures:
  plain: [{sum: [[conv1, bn1, drop_block, act1, conv2, bn2, {optional: drop_path}], []]}, act2]
recipes:
  full: {replace: {act1: identity}, resize: {conv1: {kernel: 1, at: 2/3}}, append: [batchnorm], compose: start}
blocks:
  - {match: layer2.1, structure: plain, recipes: [full]}
"""


def test_a_spec_may_say_when_to_compose():
    spec = parse(COMPOSE)
    assert spec.recipes["full"].compose == "start"
    net = build_supernet(spec, seed=0)
    flow = net.blocks["layer2.1"].choices["full"]
    assert not flow.pending, "a kernel change cannot come later"
    assert [type(part).__name__ for part in flow.named_parts.values()] == ["Conv2d", "ReLU", "BatchNorm"]
