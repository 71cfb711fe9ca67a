"""Solving a subnet block by block: no block is run again for a later one, and nothing else changes by that."""

import pytest
import torch
from networks import random_model, spec_of
from test_calibrate import at_start, batches

from updp.calibrate import SolveSettings, solve_blocks, solve_subnet
from updp.calibrate import trail as trail_module
from updp.calibrate.memory import peak_bytes, trail_bytes
from updp.calibrate.trail import Entrance, Trail
from updp.hooks import Hooks
from updp.structure import evaluating
from updp.supernet import build_supernet
from updp.train.cost import LiveBytes

NETWORKS = [("convnext_digits", 4), ("deit_digits", 3)]


def network(name):
    spec = at_start(spec_of(name))
    return build_supernet(spec, random_model(spec)).double().eval()


def state_of(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def runs_of_first(net, blocks):
    """How often a network's first block runs, while blocks behind it are solved for."""
    count = 0

    def ran(out):
        nonlocal count
        count += 1

    first, *_ = net.blocks.values()
    images = batches(8, *net.spec.input, number=2)
    with Hooks() as hooks:
        hooks.after(next(module for module in first.keep.modules() if not list(module.children())), ran)
        solve_subnet(net, net.configure(blocks), images)
    return count


@pytest.mark.parametrize(("name", "blocks"), NETWORKS)
@pytest.mark.parametrize("held", [0, 300_000, 1 << 29])
def test_held_maps_change_no_bit(name, blocks, held, monkeypatch):
    monkeypatch.setattr(trail_module, "HELD", held)
    net = network(name)
    subnet, images = net.configure(list(net.available)[-blocks:]), batches(8, *net.spec.input)
    expected, before = [], {}
    for block in subnet.pruned:
        config = net.configure(list(before))
        expected += solve_blocks(net, {block: subnet.choice(block)}, config, images)
        before[block] = subnet.choice(block)
    state = state_of(net)
    again = network(name)
    assert solve_subnet(again, subnet, images) == expected
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_a_block_is_not_run_again_for_each_block_behind_it():
    net = network("convnext_digits")
    few, many = (runs_of_first(net, list(net.available)[-count:]) for count in (1, 6))
    assert few == 3 + 2, "to know the network's calls, and once to check them; then each batch"
    assert many == 1 + 2 * 2, "of the baseline and of the pruned network"


def test_batches_of_two_sizes():
    net = network("deit_digits")
    kept = [torch.randn(n, *net.spec.input, dtype=torch.float64) for n in (8, 8, 3)]
    solved = solve_subnet(net, net.configure(list(net.available)[:2]), lambda: iter(kept))
    assert {each.samples for each in solved} == {19 * min(64, net.bound["blocks.0"].input_shape[1])}


def test_a_network_that_cannot_be_entered_between_its_blocks_begins_at_the_input_again(monkeypatch):
    net, other = network("deit_digits"), network("deit_digits")
    monkeypatch.setattr(other, "runner", lambda images: None)
    subnet, images = net.configure(list(net.available)[1:3]), batches(8, *net.spec.input)
    assert solve_subnet(other, subnet, images) == solve_subnet(net, subnet, images)


def test_a_block_asked_for_too_late_is_reached_from_the_input():
    net = network("convnext_digits")
    names, (batch, *_) = list(net.blocks), list(batches(4, *net.spec.input)())
    with evaluating(net), torch.no_grad():
        trail = Trail(Entrance(net))
        late = trail.input_of(names[3], 0, batch)
        early = trail.input_of(names[1], 0, batch)
        fresh = Trail(Entrance(net))
        assert torch.equal(early, fresh.input_of(names[1], 0, batch))
        assert torch.equal(late, fresh.input_of(names[3], 0, batch))


@pytest.mark.parametrize("held", [100_000, 1 << 29])
def test_the_peak_is_below_what_is_stated(held, monkeypatch):
    monkeypatch.setattr(trail_module, "HELD", held)
    monkeypatch.setattr("updp.calibrate.memory.HELD", held)
    spec = at_start(spec_of("convnext_digits"))
    net = build_supernet(spec, random_model(spec).float()).eval()
    subnet = net.configure(list(net.available)[:3])
    images = batches(16, *spec.input, number=6, dtype=torch.float32)
    peaks = [peak_bytes(net, {block: subnet.choice(block)}, 16, SolveSettings()) for block in subnet.pruned]
    with LiveBytes([*net.parameters(), *net.buffers(), *images()]) as live:
        solve_subnet(net, subnet, images)
    assert live.peak < max(peaks) + trail_bytes(net, 16 * 6)
    assert trail_bytes(net, 16 * 6) == 2 * min(held, 16 * 6 * 4 * 24 * 8 * 8)
