"""`updp calibrate`: from weights and images without labels to a run directory, and every kind of bad input."""

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
from updp.pipeline import RunDirectory, finish
from updp.randomize import randomize
from updp.structure import create_model
from updp.subnet import SubnetConfig

STAGES = ("baseline", "damage", "calibrate", "merge")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of ten classes with random weights and statistics."""
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_tensors(file, randomize(create_model(spec_of(SPEC), num_classes=10, seed=0), 0).state_dict())
    return file


@pytest.fixture
def call(capsys):
    return Caller(capsys)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Without what takes long in the stage merge and is tested elsewhere: ONNX and timing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "find_spec", lambda name: None)
        patch.setattr(finish, "_NETWORK_SECONDS", 0.01)
        patch.setattr(finish, "_BLOCK_SECONDS", 0.001)
        yield


def asked(weights, out, *more, data="digits", images=100):
    words = ["calibrate", SPEC, "--weights", weights, "--data", data, "--out", out, "--images", images]
    return [*words, "--threads", 1, *more]


@pytest.fixture(scope="module")
def done(weights, tmp_path_factory):
    """A finished calibration; copy it before changing anything."""
    out = tmp_path_factory.mktemp("calibrated") / "net"
    words = asked(weights, out, "--prune", 2, "--recipe", "full")
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code in (0, None)
    return out


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "copy")


def result(directory, stage):
    return json.loads((directory / stage / "result.json").read_text())


def test_it_is_a_run(done, call):
    run = RunDirectory.open(done)
    assert run.record.stages == STAGES
    assert all(run.result(stage) for stage in STAGES)
    assert {name for name in contents(done) if "." in name and "/" not in name} == {
        "run.json", "spec.yaml", "report.html",
    }  # fmt: skip
    assert {"calibrate/subnet.json", "calibrate/weights.safetensors", "damage/table.json"} <= set(contents(done))


def test_the_network_is_saved_and_verified(done, call):
    network = updp.load(done / "merge" / "merged.safetensors")
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    verified = call("verify", done / "merge" / "merged.safetensors", "--json")
    assert verified.status == 0, verified
    calibrated, merged = result(done, "calibrate"), result(done, "merge")
    assert len(calibrated["choices"]) == len(calibrated["solved"]) == 2
    assert set(calibrated["choices"].values()) == {"full"}
    assert SubnetConfig.load(done / "calibrate" / "subnet.json").choices == calibrated["choices"]
    assert merged["certificate"]["ok"]
    assert merged["after"]["depth"] == merged["before"]["depth"] - 4
    damages = result(done, "damage")["rows"]
    assert len(damages) == 10
    chosen = {row["damage"] for row in damages if row["block"] in calibrated["choices"]}
    assert chosen == set(sorted(row["damage"] for row in damages)[:2]), "the least damage"


def test_labels_that_are_there_tell_accuracies(done):
    assert result(done, "baseline")["top1"] is not None
    assert result(done, "merge")["top1"] is not None
    assert json.loads((done / "run.json").read_text())["calibration"]["judge"] == "digits"


def test_another_number_of_blocks_takes_the_damages_as_they_are(copy, weights, call):
    before = contents(copy)
    told = call(*asked(weights, copy, "--prune", 4, "--recipe", "full"))
    assert told.status == 0, told
    assert "what was measured is kept" in told.out
    assert told.out.count("finished before") == 2
    after = contents(copy)
    assert [name for name in before if name.startswith("damage") and after[name] != before[name]] == []
    assert after["merge/merged.safetensors"] != before["merge/merged.safetensors"]
    assert len(SubnetConfig.load(copy / "calibrate" / "subnet.json").choices) == 4


def test_the_same_again_gives_the_same_bits(done, weights, call, tmp_path):
    told = call(*asked(weights, tmp_path / "net", "--prune", 2, "--recipe", "full"))
    assert told.status == 0, told
    first, second = contents(done), contents(tmp_path / "net")
    tensors = [name for name in first if name.endswith(".safetensors")]
    assert len(tensors) >= 4
    assert [name for name in tensors if first[name] != second[name]] == []


def test_a_finished_one_is_left_as_it_is(copy, weights, call):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.*") if path.name != "report.html"}
    told = call(*asked(weights, copy, "--recipe", "full"))
    assert told.out.count("finished before") == 4, told
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.*") if path.name != "report.html"} == before


def test_a_budget_of_operations(copy, weights, call):
    told = call(*asked(weights, copy, "--budget", "macs=0.98x", "--recipe", "full", "--json"))
    assert told.status == 0, told
    merged = json.loads(told.out)["merge"]
    assert merged["after"]["macs"] <= 0.98 * merged["before"]["macs"]
    before = contents(copy)
    message = call.refuses(*asked(weights, copy, "--budget", "macs=0.1x", "--recipe", "full"), names=("allowed: at",))
    assert "of the baseline's" in message
    assert contents(copy) == before


def test_images_without_labels_do(weights, call, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        Image.effect_noise((40, 40), 30 + number).convert("RGB").save(folder / f"{number}.png")
    out = tmp_path / "net"
    told = call(*asked(weights, out, "--prune", 1, "--recipe", "full", data=f"folder:{folder}"))
    assert told.status == 0, told
    assert told.out.count("no labels") == 2
    assert result(out, "merge")["top1"] is result(out, "baseline")["top1"] is None
    told = call(*asked(weights, tmp_path / "judged", "--prune", 1, "--recipe", "full", "--judge", "digits",
                       data=f"folder:{folder}"))  # fmt: skip
    assert result(tmp_path / "judged", "merge")["top1"] is not None, told


def test_bad_requests_leave_nothing(weights, call, tmp_path):
    out = tmp_path / "net"
    cases = [
        ((), ("--prune or --budget",)),
        (("--prune", 0), ("--prune: got 0, allowed: 1 to 10",)),
        (("--prune", 99), ("--prune: got 99, allowed: 1 to 10",)),
        (("--budget", "time=0.5x"), ("--budget: got 'time=0.5x', allowed: macs=PARTx",)),
        (("--budget", "macs=2"), ("--budget macs: got 2",)),
        (("--prune", 1, "--recipe", "fulll"), ("recipe", "full")),
        (("--prune", 1, "--until", "search"), ("--until: got 'search'", "damage")),
    ]
    for more, names in cases:
        call.refuses(*asked(weights, out, *more), names=names)
        assert not out.exists(), more
    empty = tmp_path / "empty"
    empty.mkdir()
    call.refuses(*asked(weights, out, "--prune", 1, data=f"folder:{empty}"), names=(str(empty), "no images"))
    call.refuses(*asked(tmp_path / "none.safetensors", out, "--prune", 1), names=("none.safetensors",))
    assert not out.exists()


def test_damages_of_other_images_are_not_taken(copy, weights, call, tmp_path):
    before = contents(copy)
    call.refuses(*asked(weights, copy, "--prune", 2, "--recipe", "full", images=50), names=("images: got 50",))
    assert contents(copy) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("kept")
    call.refuses(*asked(weights, tmp_path / "other", "--prune", 2), names=("has files in it",))


def test_weights_that_are_not_numbers_are_told(weights, call, tmp_path):
    model = create_model(spec_of(SPEC), num_classes=10, seed=0)
    next(model.parameters()).data.fill_(torch.nan)
    save_tensors(tmp_path / "nan.safetensors", model.state_dict())
    call.refuses(*asked(tmp_path / "nan.safetensors", tmp_path / "net", "--prune", 1), names=("not finite",))
