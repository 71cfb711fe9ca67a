"""The policies: the sandwich on a supernet, and progressive training of one subnet."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import calibration, loader, rates, same, settings, small_net, subnet, train

from updp.spec import BlendSettings, TrainSettings
from updp.subnet import SubnetConfig
from updp.supernet import Supernet
from updp.train import Progressive, Sandwich, Session, blend_at, create_accelerator

# --- the sandwich ---


class Listening(Sandwich):
    """Writes down which subnets ran."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.heard: list[SubnetConfig] = []

    def before_training(self, session: Session) -> None:
        super().before_training(session)
        session.network.register_forward_pre_hook(lambda network, args: self.heard.append(network.subnet))


def test_a_sandwich_is_all_kept_two_random_and_all_pruned() -> None:
    network = small_net()
    policy = Listening()
    result = train(network, settings(6), policy)
    assert len(policy.heard) == 6 * 3 * 4
    assert {c.pruned for c in policy.heard[0::4]} == {()}
    assert {len(c.pruned) for c in policy.heard[3::4]} == {5}
    counts = [len(c.pruned) for c in policy.heard[1::4] + policy.heard[2::4]]
    assert set(counts) == {1, 2, 3, 4}
    assert set(result.history[0]) == {"epoch", "loss_keep", "loss_random", "loss_pruned", "lr", "seconds"}
    for name in ("loss_keep", "loss_random", "loss_pruned"):
        assert result.history[-1][name] < result.history[0][name]
    assert network.subnet == network.all_keep()


def test_a_sandwich_step_uses_the_sum_of_the_four_gradients() -> None:
    network = small_net()
    by_hand = copy.deepcopy(network)
    batch = next(iter(loader()))
    policy = Listening()
    how = settings(1, optimizer="momentum", momentum=0.0, lr=0.1, weight_decay=0.0, scheduler="none")
    train(network, how, policy, loader=[batch])
    by_hand.train()
    for module in by_hand.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    again = copy.deepcopy(by_hand)
    assert len({c.key() for c in policy.heard}) == 4
    total = sum(_gradient(copy.deepcopy(by_hand), c, batch) for c in policy.heard)
    train(again, how, Sandwich(), loader=[batch])
    moved = _flat(again) - _flat(by_hand)
    torch.testing.assert_close(moved, -0.1 * total, rtol=1e-3, atol=1e-6)


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def _gradient(network: Supernet, config: SubnetConfig, batch: tuple[Tensor, Tensor]) -> Tensor:
    network.set_subnet(config)
    nn.functional.cross_entropy(network(batch[0]), batch[1]).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in network.parameters()])


# --- progressive training ---


def test_progressive_training_ends_with_the_pruned_network_alone() -> None:
    network = small_net()
    chosen = subnet(network, 0, 2, 3)
    result = train(network, settings(4), Progressive(chosen, BlendSettings(K=2), calibration()))
    assert [record["blend"] for record in result.history] == pytest.approx(
        [blend_at(e - 1 / 3, 4, BlendSettings(K=2)) for e in (1, 2, 3, 4)]
    )
    assert result.history[-1]["blend"] == 1.0
    assert network.subnet == chosen
    for name, block in network.blocks.items():
        assert (block.keep is None) == (name in chosen.pruned)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_progressive_training_is_deterministic() -> None:
    networks = [small_net(), small_net()]
    for network in networks:
        how = settings(4, ema=0.9)
        train(network, how, Progressive(subnet(network, 0, 3), BlendSettings(K=2), calibration()))
    assert same(*networks)


def test_direct_training_never_runs_the_baseline() -> None:
    network = small_net()
    name = next(iter(network.available))
    ran: list[bool] = []
    network.blocks[name].keep.register_forward_hook(lambda *args: ran.append(True))
    policy = Progressive(subnet(network, 0), BlendSettings(mode="direct"), calibration())
    result = train(network, settings(1), policy)
    assert ran == []
    assert result.history[0]["blend"] == 1.0


def test_a_blend_that_would_not_reach_1_ends_at_1_before_the_last_evaluation() -> None:
    network = small_net()
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append([block.keep is None for block in model.blocks.values()])
        return {}

    policy = Progressive(subnet(network, 0, 1, 2, 3, 4), BlendSettings(K=1.0), calibration())
    result = train(network, settings(2), policy, evaluate=evaluate)
    assert seen == [[False] * 5, [True] * 5]
    assert result.history[-1]["blend"] == 1.0
    assert all(not block.choices["full"].pending for block in network.blocks.values())


def test_no_epochs_of_progressive_training_still_leave_the_final_shape() -> None:
    network = small_net()
    train(network, settings(0), Progressive(subnet(network, 0), BlendSettings(), calibration()))
    block = next(iter(network.blocks.values()))
    assert block.keep is None
    assert not block.choices["full"].pending


def test_new_norms_are_calibrated_before_training_though_the_blend_is_0() -> None:
    network = small_net()
    session = Session(network, settings(4), accelerator=create_accelerator(), seed=0, steps_per_epoch=3)
    Progressive(subnet(network, 1), BlendSettings(), calibration()).before_training(session)
    block = network.blocks[list(network.available)[1]]
    norms = list(block.norms())
    assert len(norms) == 2
    assert block.blend == 0.0
    for norm in norms:
        assert not torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))


class Steps:
    """A session driven step by step."""

    def __init__(self, network: Supernet, policy: Progressive, how: TrainSettings) -> None:
        self.session = Session(network, how, accelerator=create_accelerator(), seed=0, steps_per_epoch=3)
        self.policy = policy
        policy.before_training(self.session)
        self.session.start_average()
        self.session.connect()
        self.session.start_epoch()
        self.batches = self._batches()

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from loader()

    def __call__(self) -> None:
        self.policy.before_step(self.session, self.session.position)
        self.policy.step(self.session, *self.session.receive(*next(self.batches)))
        self.session.update()

    def held(self) -> dict[int, Tensor]:
        groups = self.session.optimizer.param_groups
        return {id(p): p for group in groups for p in group["params"]}

    def moments(self) -> dict[Tensor, Tensor]:
        """Adam's first moments of the network's present parameters."""
        state = self.session.optimizer.state
        return {p: state[p]["exp_avg"].clone() for p in self.session.network.parameters() if p in state}

    def averages(self) -> dict[str, Tensor]:
        named = self.session.average.module.named_parameters(remove_duplicate=False)
        return {name: p.detach().clone() for name, p in named}


def test_the_optimizer_follows_freed_and_swapped_weights() -> None:
    network = small_net()
    policy = Progressive(subnet(network, 0, 2), BlendSettings(K=2), calibration())
    run = Steps(network, policy, settings(4))
    while run.session.updates < 6:
        run()
    before, held = run.moments(), set(run.held())
    policy.before_step(run.session, run.session.position)  # blend 1: baseline branches go
    assert policy.blend == 1.0
    assert set(run.held()) == {id(p) for p in network.parameters()} < held
    after = run.moments()
    assert len(after) == len(run.held())
    assert all(torch.equal(after[p], before[p]) for p in after)
    assert run.session.learning_rate == pytest.approx(rates(settings(4), 3)[6])
    while run.session.updates < 9:
        run()
    before = run.moments()
    policy.before_step(run.session, run.session.position)  # 3/4: kernels change
    after = run.moments()
    new = [p for p in network.parameters() if p not in before]
    assert sorted(tuple(p.shape) for p in new if p.dim() == 4) == [(8, 1, 3, 3)] * 2
    assert len(after) == len(run.held()) - len(new)
    assert all(torch.equal(after[p], before[p]) for p in after)
    assert set(run.held()) == {id(p) for p in network.parameters()}
    run()
    assert set(run.moments()) == set(network.parameters())


def test_norms_are_calibrated_again_after_a_swap() -> None:
    network = small_net()
    policy = Progressive(subnet(network, 0, 2), BlendSettings(K=2), calibration())
    run = Steps(network, policy, settings(4))
    while run.session.updates < 9:
        run()
    policy.before_step(run.session, run.session.position)
    twin = copy.deepcopy(network)
    twin.calibrate(calibration())
    assert same(network, twin)
    assert network.training
    run()
    assert not same(network, twin)


def test_the_average_goes_through_the_same_changes() -> None:
    network = small_net()
    policy = Progressive(subnet(network, 0, 2), BlendSettings(K=2), calibration())
    run = Steps(network, policy, settings(4, ema=0.5))
    while run.session.updates < 9:
        before = run.averages()
        policy.before_step(run.session, run.session.position)
        after = run.averages()
        assert all(torch.equal(after[name], before[name]) for name in after)  # nothing starts anew
        run()
    assert policy.blend == 1.0
    before = run.averages()
    policy.before_step(run.session, run.session.position)  # 3/4: kernels change
    after = run.averages()
    assert {n: p.shape for n, p in network.named_parameters(remove_duplicate=False)} == {
        name: value.shape for name, value in after.items()
    }
    cropped = [name for name in after if after[name].shape != before[name].shape]
    assert len(cropped) == 2
    for name, value in after.items():
        assert torch.equal(value, before[name][..., 2:5, 2:5] if name in cropped else before[name])
    run()
    run.session.finish()
    assert same(network, run.session.average.module)


def test_the_averaged_weights_are_evaluated_and_returned() -> None:
    network = small_net()
    seen: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert model is not network
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"top1": 0.0}

    policy = Progressive(subnet(network, 0, 1), BlendSettings(K=2), calibration())
    train(network, settings(4, ema=0.9), policy, evaluate=evaluate)
    state = network.state_dict()
    assert state.keys() == seen[-1].keys()
    assert all(torch.equal(state[name], seen[-1][name]) for name in state)
    assert not network.training
