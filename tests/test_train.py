"""The training loop: blend, history, determinism, errors, timm's part, precision, processes."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import (
    BATCH,
    CLASSES,
    calibration,
    loader,
    rates,
    same,
    settings,
    small_data,
    small_net,
    subnet,
    train,
)

from updp.errors import InputError, TrainingError
from updp.spec import BlendSettings
from updp.train import Plain, Progressive, Sandwich, Session, blend_at, create_accelerator
from updp.train.factory import make_optimizer

# --- the blend ---

positions = st.floats(0, 400, allow_nan=False)
blends = st.builds(BlendSettings, K=st.floats(1.0, 10.0), per=st.sampled_from(["iteration", "epoch"]))


@given(positions, positions, st.integers(1, 300), blends)
def test_blend_grows_from_0_to_1(a: float, b: float, epochs: int, how: BlendSettings) -> None:
    assert blend_at(0.0, epochs, how) == 0.0
    assert blend_at(math.ceil(epochs / how.K), epochs, how) == 1.0
    assert blend_at(epochs, epochs, how) == 1.0
    low, high = sorted((blend_at(min(a, b), epochs, how), blend_at(max(a, b), epochs, how)))
    assert 0.0 <= low == blend_at(min(a, b), epochs, how) <= high <= 1.0


@given(st.floats(0, 0.999), st.integers(1, 300), st.floats(1.0, 10.0))
def test_blend_is_equation_3(part: float, epochs: int, k: float) -> None:
    position = part * epochs / k
    expected = 1 - math.cos(math.pi / 2 * position * k / epochs)
    assert blend_at(position, epochs, BlendSettings(K=k)) == pytest.approx(expected, abs=1e-12)


def test_blend_per_epoch_uses_whole_epochs_and_published_schedules_reach_1_where_they_should() -> None:
    per_epoch = BlendSettings(K=3.0, per="epoch")
    assert blend_at(7.9, 30, per_epoch) == blend_at(7.0, 30, per_epoch) == blend_at(7.0, 30, BlendSettings(K=3.0))
    assert blend_at(7.9, 30, BlendSettings(K=3.0)) > blend_at(7.0, 30, per_epoch)
    for epochs, k, full in ((150, 3, 50), (450, 3, 150), (450, 4.5, 100), (450, 6, 75)):
        assert blend_at(full - 0.01, epochs, BlendSettings(K=k)) < 1.0 == blend_at(full, epochs, BlendSettings(K=k))


def test_direct_training_has_blend_1_from_the_start() -> None:
    assert blend_at(0.0, 300, BlendSettings(mode="direct")) == 1.0


# --- the loop ---


class Watcher:
    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list[Any] = []
        self.stop_at = stop_at

    def on_start(self, total_steps: int, title: str) -> None:
        self.calls.append((total_steps, title))

    def on_step(self, state: dict[str, Any]) -> None:
        self.calls.append(state)
        if state["step"] == self.stop_at:
            raise KeyboardInterrupt

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.calls.append(record)

    def on_end(self) -> None:
        self.calls.append("end")


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "convnext_atto",
        patch_size=2,
        depths=[1, 1, 1, 1],
        dims=[8, 8, 8, 8],
        num_classes=CLASSES,
        drop_path_rate=0.2,
    )


def test_plain_training_learns_and_keeps_a_history() -> None:
    watcher = Watcher()
    result = train(
        plain_model(), settings(8, lr=1e-2), Plain(), evaluate=lambda model: {"top1": 50.0}, progress=watcher
    )
    losses = [record["train_loss"] for record in result.history]
    assert losses[-1] < 0.8 * losses[0]
    assert [record["epoch"] for record in result.history] == list(range(1, 9))
    assert set(result.history[0]) == {"epoch", "train_loss", "lr", "top1", "seconds"}
    assert result.seconds >= sum(record["seconds"] for record in result.history) > 0
    assert watcher.calls[0] == (24, "baseline")
    assert watcher.calls[-1] == "end"
    steps = [call for call in watcher.calls if isinstance(call, dict) and "step" in call]
    assert [call["step"] for call in steps] == list(range(1, 25))
    assert sum(call["loss"] for call in steps[:3]) / 3 == pytest.approx(losses[0], rel=1e-5)
    assert [call for call in watcher.calls if isinstance(call, dict) and "seconds" in call] == result.history


def test_the_same_seed_gives_the_same_bits_whatever_evaluation_draws() -> None:
    networks = [plain_model() for _ in range(3)]
    how = settings(2, mixup=0.2, smoothing=0.1)
    train(networks[0], how, Plain(), evaluate=lambda model: {"top1": float(torch.rand(7).sum())})
    train(networks[1], how, Plain(), eval_every=0)
    train(networks[2], how, Plain(), seed=1)
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])


def test_evaluation_is_rare_if_asked_and_always_at_the_end() -> None:
    seen: list[bool] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        seen.append(True)
        return {"top1": 1.0}

    result = train(plain_model(), settings(5), Plain(), evaluate=evaluate, eval_every=2)
    assert ["top1" in record for record in result.history] == [False, True, False, True, True]
    assert len(seen) == 3


def test_no_epochs_leave_the_weights_alone() -> None:
    network = plain_model()
    before = copy.deepcopy(network)
    assert train(network, settings(0), Plain()).history == []
    assert same(network, before)


def test_a_loss_that_is_not_finite_is_named_with_epoch_step_and_pass() -> None:
    x, targets = small_data()
    x[17] = math.inf
    batches = DataLoader(TensorDataset(x, targets), BATCH)
    with pytest.raises(TrainingError, match=r"loss_keep is nan at epoch 1, step 3 of 3 \(pass 1 of 4\)") as caught:
        train(small_net(), settings(2), Sandwich(), loader=batches)
    assert caught.value.exit_status == 1


def test_an_interrupt_passes_through_and_the_watcher_hears_the_end() -> None:
    watcher = Watcher(stop_at=4)
    accelerator = create_accelerator()
    with pytest.raises(KeyboardInterrupt):
        train(plain_model(), settings(3), Plain(), progress=watcher, accelerator=accelerator)
    assert watcher.calls[-1] == "end"
    assert len([c for c in watcher.calls if isinstance(c, dict) and "step" in c]) == 4


def test_no_batch_is_an_input_error() -> None:
    with pytest.raises(InputError, match="fewer images than one batch"):
        train(
            plain_model(),
            settings(1),
            Plain(),
            loader=loader(4, 8, drop_last=True),
        )


# --- what timm makes of the settings ---


def test_the_learning_rate_warms_up_and_falls_to_min_lr() -> None:
    how = settings(10, lr=1e-2, warmup_epochs=1.5, min_lr=1e-4)
    found = rates(how, 10)
    assert found[0] == pytest.approx(1e-4)
    assert 9e-3 < max(found) == max(found[14:17])
    assert found[15:] == sorted(found[15:], reverse=True)
    assert found[-1] == pytest.approx(1e-4, abs=2e-5)
    watcher = Watcher()
    train(plain_model(), settings(2, lr=1e-2, warmup_epochs=1, min_lr=1e-4), Plain(), progress=watcher)
    expected = rates(settings(2, lr=1e-2, warmup_epochs=1, min_lr=1e-4), 3)
    assert [c["lr"] for c in watcher.calls if isinstance(c, dict) and "step" in c] == pytest.approx(expected)


def test_scheduler_none_keeps_the_rate() -> None:
    result = train(plain_model(), settings(2, scheduler="none"), Plain())
    assert [record["lr"] for record in result.history] == [3e-3, 3e-3]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "rmsproptf", "lookahead_adamw"])
def test_optimizers_of_timm_train_on_across_a_change_of_structure(name: str) -> None:
    network = small_net()
    blend = BlendSettings(K=2)
    result = train(
        network,
        settings(4, optimizer=name),
        Progressive(subnet(network, 1), blend, calibration()),
        eval_every=0,
    )
    assert all(math.isfinite(record["train_loss"]) for record in result.history)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adanw_"}, "optimizer: got 'adanw_'.*did you mean 'adanw'"),
        ({"optimizer": "fusedadam"}, "optimizer fusedadam: "),
        ({"scheduler": "cosin"}, "scheduler.*cosin"),
        ({"scheduler": "plateau"}, "scheduler plateau: "),
    ],
)
def test_settings_that_timm_refuses_are_input_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(plain_model(), settings(1, **change), Plain())


def test_mixup_takes_odd_and_single_batches_and_needs_a_number_of_classes() -> None:
    result = train(plain_model(), settings(1, cutmix=1.0, mixup=0.5, smoothing=0.1), Plain(), loader=loader(10, 3))
    assert math.isfinite(result.history[0]["train_loss"])
    with pytest.raises(InputError, match="num_classes"):
        train(nn.Linear(2, 2), settings(1, mixup=0.1), Plain())


def test_weight_decay_spares_norms_biases_and_what_the_model_names() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos = nn.Parameter(torch.zeros(1, 3, 4))
            self.fc = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def no_weight_decay(self) -> set[str]:
            return {"pos"}

    network = nn.Sequential(Inner())
    names = {id(p): name for name, p in network.named_parameters()}
    groups = make_optimizer(network, settings()).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"0.fc.weight"}
    assert sum(len(group["params"]) for group in groups) == 5


def test_gradients_are_clipped() -> None:
    network = plain_model()
    before = copy.deepcopy(network)
    how = settings(1, optimizer="momentum", momentum=0.0, lr=1.0, weight_decay=0.0, clip_grad=1e-3, scheduler="none")
    train(network, how, Plain(), loader=[next(iter(loader()))])
    moved = [a - b for a, b in zip(network.parameters(), before.parameters(), strict=True)]
    assert math.sqrt(sum(float((m.detach() ** 2).sum()) for m in moved)) == pytest.approx(1e-3, rel=1e-2)


# --- precision and processes ---


@pytest.fixture
def bf16() -> Iterator[Any]:
    AcceleratorState._reset_state(True)
    yield create_accelerator("bf16")
    AcceleratorState._reset_state(True)


def test_bf16_trains_while_calibration_and_evaluation_stay_in_float32(bf16: Any) -> None:
    network = small_net()
    seen: dict[str, set[torch.dtype]] = {"train": set(), "calibrate": set(), "evaluate": set()}
    now = ["calibrate"]
    network.model.stem[0].register_forward_hook(lambda m, args, out: seen[now[0]].add(out.dtype))

    class Watching(Progressive):
        def before_epoch(self, session: Session, epoch: int) -> None:
            now[0] = "train"

        def after_training(self, session: Session) -> None:
            now[0] = "calibrate"
            super().after_training(session)

    def evaluate(model: nn.Module) -> dict[str, float]:
        now[0] = "evaluate"
        with torch.no_grad():
            model(small_data()[0])
        return {}

    policy = Watching(subnet(network, 0), BlendSettings(mode="direct"), calibration())
    result = train(network, settings(1), policy, evaluate=evaluate, accelerator=bf16)
    assert seen == {"train": {torch.bfloat16}, "calibrate": {torch.float32}, "evaluate": {torch.float32}}
    assert math.isfinite(result.history[0]["train_loss"])
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_an_unknown_precision_is_an_input_error() -> None:
    with pytest.raises(InputError, match="got 'bf61', allowed: no, bf16"):
        create_accelerator("bf61")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Both end with the same weights: those of one process with batches twice as large."""
    script = Path(__file__).with_name("two_processes.py")
    for processes in (1, 2):
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        done = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert first.keys() == second.keys() == one.keys()
    for name in one:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
