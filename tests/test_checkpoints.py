"""A training that is stopped at any step goes on with the bits that it would have had."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import Watcher, plain_model
from torch import nn
from torch.utils.data import TensorDataset
from training import BATCH, calibration, same, settings, small_data, small_net, subnet, train

from updp.data import loader
from updp.errors import InputError
from updp.spec import BlendSettings, TrainSettings
from updp.structure import evaluating
from updp.train import Checkpoints, Every, Plain, Policy, Progressive, Sandwich
from updp.train.checkpoint import fingerprint

EACH = Every(seconds=None, steps=1)
"""Behind every step."""
STEPS = 3
"""Steps of an epoch."""


def progressive(network: Any) -> Progressive:
    """Blended up to the middle of training; a kernel changes at three quarters."""
    return Progressive(subnet(network, 0, 3), BlendSettings(K=2), calibration())


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Policy], TrainSettings]] = {
    "plain": (plain_model, lambda network: Plain(), settings(2, ema=0.9, clip_grad=1.0)),
    "mixed": (plain_model, lambda network: Plain(), settings(2, mixup=0.5, cutmix=0.5, optimizer="sgd")),
    "lookahead": (plain_model, lambda network: Plain(), settings(2, optimizer="lookahead_adamw")),
    "sandwich": (small_net, lambda network: Sandwich(), settings(2)),
    "progressive": (small_net, progressive, settings(4, ema=0.9)),
}


def batches() -> Any:
    return loader(TensorDataset(*small_data(BATCH * STEPS)), BATCH, train=True, seed=3)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def score(network: nn.Module) -> dict[str, float]:
    torch.rand(3)  # scoring may draw
    with evaluating(network), torch.no_grad():
        return {"top1": float(network(small_data(4)[0]).double().sum())}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_any_step_and_begun_again_it_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    make, policy_of, how = KINDS[kind]
    undisturbed = make()
    expected = train(undisturbed, how, policy_of(undisturbed), loader=batches(), evaluate=score)
    # Stopped again and again: each time one step further, or at once, before a new state was kept.
    network, stops = make(), itertools.chain(*((step, step + 1) for step in range(1, how.epochs * STEPS)))
    for stop in [*stops, None]:
        network = make()
        checkpoints = Checkpoints(tmp_path / "kept", EACH)
        try:
            found = train(network, how, policy_of(network), loader=batches(), evaluate=score, checkpoints=checkpoints,
                          progress=Watcher(stop_at=stop))  # fmt: skip
        except KeyboardInterrupt:
            assert stop is not None
    assert without_times(found.history) == without_times(expected.history)
    assert same(network, undisturbed)
    assert 0 < found.earlier < found.seconds
    assert len(list((tmp_path / "kept").iterdir())) == 2


def begun(folder: Path, **changes: Any) -> Checkpoints:
    """States behind the steps 3 and 4 of a training of 6."""
    with pytest.raises(KeyboardInterrupt):
        trained(Checkpoints(folder, EACH), Watcher(stop_at=5))
    return Checkpoints(folder, EACH, **changes)


def trained(checkpoints: Checkpoints, watcher: Watcher | None = None, **changes: Any) -> nn.Module:
    network = plain_model()
    train(network, settings(2, **changes), Plain(), loader=batches(), checkpoints=checkpoints, progress=watcher)
    return network


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other format"])
def test_a_damaged_state_is_passed_over_for_the_one_before(damage: str, tmp_path: Path) -> None:
    notes: list[str] = []
    checkpoints = begun(tmp_path, note=notes.append)
    older, newest = sorted(tmp_path.iterdir())
    data = newest.read_bytes()
    if damage == "other format":
        save_file({"x": torch.zeros(1)}, newest)
    else:
        flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        newest.write_bytes({"cut": data[:-100], "flipped": flipped, "emptied": b""}[damage])
    watcher = Watcher()
    network = trained(checkpoints, watcher)
    assert next(call["step"] for call in watcher.calls if isinstance(call, dict) and "step" in call) == 4
    assert same(network, trained(Checkpoints(tmp_path / "none")))
    assert [str(newest) in note and "what was kept before it is used" in note for note in notes] == [True]
    assert older.name == "0000000003.safetensors"


def test_a_damaged_state_takes_no_place_of_a_whole_one(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    for updates in (4, 5):
        kept.save("key", {"updates": updates})
    (tmp_path / "0000000009.safetensors").write_bytes(b"damaged")
    kept.save("key", {"updates": 6})
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["0000000005", "0000000006"]


def test_where_all_are_damaged_it_begins_anew(tmp_path: Path) -> None:
    checkpoints = begun(tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"nothing")
    assert same(trained(checkpoints), trained(Checkpoints(tmp_path / "none")))


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    checkpoints = begun(tmp_path)
    before = {file.name: load_file(file) for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"got the state of another training.*remove the folder"):
        trained(checkpoints, lr=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == set(before)


def test_states_are_due_by_steps_or_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    steps, seconds = Checkpoints(tmp_path, Every(None, 10)), Checkpoints(tmp_path, Every(60.0))
    assert [steps.due(9), steps.due(10), seconds.due(1000)] == [False, True, False]
    now = 60.0
    assert seconds.due(1)
    seconds.waited(1)
    assert not seconds.due(2)


@pytest.mark.parametrize(("text", "seconds", "steps"), [("90s", 90, None), ("2h", 7200, None), ("500", None, 500)])
def test_how_often_is_said_in_words(text: str, seconds: float | None, steps: int | None) -> None:
    assert Every.parse(text) == Every(seconds, steps)


@pytest.mark.parametrize("text", ["", "0", "5 minutes", "-1", "1.5h", "0s"])
def test_words_that_do_not_say_how_often(text: str) -> None:
    with pytest.raises(InputError, match="allowed: a time such as 90s, 10m or 2h, or a number of steps"):
        Every.parse(text)


def test_what_an_optimizer_has_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/optimizer/x: a set of the optimizer's cannot be kept"):
        Checkpoints(tmp_path).save("key", {"updates": 1, "optimizer": {"x": {1, 2}}})
    assert list(tmp_path.iterdir()) == []


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "updates": 7, "history": [{"loss": 0.1, "nothing": None, "nan": float("inf")}],
        "tensors": [torch.arange(6.0).reshape(2, 3).t(), torch.tensor(3), torch.zeros(0, 4), torch.ones(2).bfloat16()],
    }  # fmt: skip
    Checkpoints(tmp_path).save("key", state)
    found = Checkpoints(tmp_path).latest("key")
    assert found is not None
    tensors, expected = found.pop("tensors"), state.pop("tensors")
    assert found == state
    for ours, theirs in zip(tensors, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_a_fingerprint_sees_every_element_and_part() -> None:
    x = torch.arange(4.0)
    keys = [fingerprint({"a": x}), fingerprint({"b": x}), fingerprint({"a": x + 1e-6}), fingerprint({"a": x}, 1)]
    assert len(set(keys)) == 4
    assert fingerprint({"a": x}) == keys[0]
