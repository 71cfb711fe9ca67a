"""`updp calibrate`: from weights and images without labels to a saved network, and every kind of bad input."""

import json
import shutil

import pytest
import torch
from commands import SPEC, Caller, contents
from networks import spec_of
from PIL import Image

import updp
from updp.artefact import save_tensors
from updp.cli import main
from updp.randomize import randomize
from updp.structure import create_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of ten classes with random weights and statistics."""
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_tensors(file, randomize(create_model(spec_of(SPEC), num_classes=10, seed=0), 0).state_dict())
    return file


@pytest.fixture
def call(capsys):
    return Caller(capsys)


def asked(weights, out, *more, data="digits", images=100):
    return ["calibrate", SPEC, "--weights", weights, "--data", data, "--out", out, "--images", images, *more]


@pytest.fixture(scope="module")
def done(weights, tmp_path_factory):
    """A finished calibration; copy it before changing anything."""
    out = tmp_path_factory.mktemp("calibrated") / "net"
    words = asked(weights, out, "--prune", 2, "--recipe", "full", "--threads", 1)
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code in (0, None)
    return out


def test_the_network_is_saved_and_verified(done, call):
    network = updp.load(done / "network.safetensors")
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    verified = call("verify", done / "network.safetensors", "--json")
    assert verified.status == 0, verified
    result = json.loads((done / "result.json").read_text())
    assert len(result["choices"]) == len(result["solved"]) == 2
    assert set(result["choices"].values()) == {"full"}
    assert result["certificate"]["ok"]
    assert result["after"]["depth"] == result["before"]["depth"] - 4
    damages = json.loads((done / "damage.json").read_text())["rows"]
    assert len(damages) == 10
    chosen = {row["damage"] for row in damages if row["block"] in result["choices"]}
    assert chosen == set(sorted(row["damage"] for row in damages)[:2]), "the least damage"


def test_another_number_of_blocks_takes_the_damages_as_they_are(done, weights, call, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(done, out)
    before = contents(out)
    told = call(*asked(weights, out, "--prune", 4, "--recipe", "full", "--threads", 1))
    assert told.status == 0, told
    assert "certificate holds" in told.out
    after = contents(out)
    assert after["damage.json"] == before["damage.json"]
    assert after["network.safetensors"] != before["network.safetensors"]
    assert len(json.loads((out / "subnet.json").read_text())["choices"]) == 4


def test_the_same_again_gives_the_same_bits(done, weights, call, tmp_path):
    told = call(*asked(weights, tmp_path / "net", "--prune", 2, "--recipe", "full", "--threads", 1))
    assert told.status == 0, told
    first, second = contents(done), contents(tmp_path / "net")
    assert first["network.safetensors"] == second["network.safetensors"]


def test_a_budget_of_operations(done, weights, call, tmp_path):
    out = tmp_path / "budget"
    shutil.copytree(done, out)
    options = ("--recipe", "full", "--threads", 1, "--json")
    told = call(*asked(weights, out, "--budget", "macs=0.98x", *options))
    assert told.status == 0, told
    result = json.loads(told.out)
    assert result["after"]["macs"] <= 0.98 * result["before"]["macs"]
    message = call.refuses(*asked(weights, out, "--budget", "macs=0.1x", *options), names=("macs: ", "allowed: at"))
    assert "of the baseline's" in message


def test_images_without_labels_do(weights, call, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        Image.effect_noise((40, 40), 30 + number).convert("RGB").save(folder / f"{number}.png")
    out = tmp_path / "net"
    told = call(*asked(weights, out, "--prune", 1, "--recipe", "full", data=f"folder:{folder}"))
    assert told.status == 0, told
    assert "fewer samples than unknowns" in told.out


def test_bad_requests_leave_nothing(done, weights, call, tmp_path):
    out = tmp_path / "net"
    cases = [
        ((), ("--prune or --budget",)),
        (("--prune", 0), ("--prune: got 0, allowed: 1 to 10",)),
        (("--prune", 99), ("--prune: got 99, allowed: 1 to 10",)),
        (("--budget", "latency=0.5x"), ("--budget: got 'latency=0.5x', allowed: macs=PARTx",)),
        (("--budget", "macs=2"), ("--budget macs: got 2",)),
        (("--prune", 1, "--recipe", "fulll"), ("recipe", "full")),
    ]
    for more, names in cases:
        call.refuses(*asked(weights, out, *more), names=names)
        assert not out.exists(), more
    empty = tmp_path / "empty"
    empty.mkdir()
    call.refuses(*asked(weights, out, "--prune", 1, data=f"folder:{empty}"), names=(str(empty), "no images"))
    call.refuses(*asked(tmp_path / "none.safetensors", out, "--prune", 1), names=("none.safetensors",))
    assert not out.exists()


def test_damages_of_other_images_are_not_taken(done, weights, call, tmp_path):
    out = tmp_path / "net"
    shutil.copytree(done, out)
    before = contents(out)
    call.refuses(
        *asked(weights, out, "--prune", 2, "--recipe", "full", images=50), names=("damage.json", "other images")
    )
    assert contents(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("kept")
    call.refuses(*asked(weights, tmp_path / "other", "--prune", 2), names=("has files in it",))


def test_weights_that_are_not_numbers_are_told(weights, call, tmp_path):
    model = create_model(spec_of(SPEC), num_classes=10, seed=0)
    next(model.parameters()).data.fill_(torch.nan)
    save_tensors(tmp_path / "nan.safetensors", model.state_dict())
    call.refuses(*asked(tmp_path / "nan.safetensors", tmp_path / "net", "--prune", 1), names=("are not finite",))
