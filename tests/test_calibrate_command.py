"""`updp calibrate`: from weights and images without labels to a run directory, and every kind of bad input."""

import json
import re
import shutil

import pytest
import torch
from commands import SPEC, TINY, Caller, contents, options
from networks import spec_of
from PIL import Image
from safetensors.torch import load_file

import updp
from updp.artefact import save_tensors
from updp.calibrate import DamageTable, costs, damage, load_operators
from updp.cli import main
from updp.errors import InputError
from updp.pipeline import RunDirectory, finish
from updp.pipeline.context import open_images
from updp.randomize import randomize
from updp.report import report
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
        patch.setattr(costs, "NETWORK_SECONDS", 0.01)
        patch.setattr(costs, "BLOCK_SECONDS", 0.001)
        yield


def asked(weights, out, *more, data="digits", images=100):
    words = ["calibrate", SPEC, "--weights", weights, "--data", data, "--out", out, "--images", images]
    return [*words, "--candidates", 1, "--threads", 1, *options(["distill.epochs=0"]), *more]


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
        "run.json", "spec.yaml", "report.html", "log.jsonl",
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
    for budget in ("macs=0.1x", "latency=0.01x"):
        told = ("--budget: ", budget.partition("=")[0], "allowed: at least that")
        call.refuses(*asked(weights, copy, "--budget", budget, "--recipe", "full"), names=told)
    assert contents(copy) == before


def test_a_budget_out_of_reach_is_told_before_anything_is_solved(weights, call, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(damage, "solve_blocks", never)
    told = ("macs: got 0.1x", "allowed: at least that")
    call.refuses(*asked(weights, tmp_path / "net", "--budget", "macs=0.1x"), names=told)


def test_interrupted_it_goes_on_behind_what_is_solved(done, weights, call, tmp_path, monkeypatch):
    solve, calls = damage.solve_blocks, []

    def interrupted(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    monkeypatch.setattr(damage, "solve_blocks", interrupted)
    out = tmp_path / "net"
    words = asked(weights, out, "--prune", 2, "--recipe", "full")
    stopped = call(*words)
    assert stopped.status == 130, stopped
    assert f"updp {' '.join(map(str, words))}" in stopped.err
    assert [name for name in contents(out) if name.startswith("damage/")] == [
        "damage/costs.json", "damage/operators-000.safetensors",
    ]  # fmt: skip
    first = contents(out)
    again = call(*words)
    assert again.status == 0, again
    assert len(calls) == 3, "the first group was solved once"
    assert [
        name for name in first if contents(out)[name] != first[name] and name not in ("run.json", "log.jsonl")
    ] == []
    tensors = [name for name in contents(done) if name.endswith(".safetensors")]
    assert [name for name in tensors if contents(out)[name] != contents(done)[name]] == []


def test_solved_operators_are_at_hand(done):
    run = RunDirectory.open(done)
    table = DamageTable.load(done / "damage" / "table.json")
    model = create_model(run.spec, num_classes=10)
    model.load_state_dict(load_file(done / "baseline" / "weights.safetensors"))
    supernet = updp.build_supernet(run.spec, model, resized=True).eval()
    row = max(table.rows, key=lambda row: row.damage)
    subnet = SubnetConfig(run.record.spec, {row.block: row.recipe})
    images = open_images(run.spec, "digits").any_images(100, 0)
    judge = [torch.stack([image for image, _ in (images[i] for i in range(80, 100))])]
    fresh = damage.network_damage(supernet, subnet, lambda: judge)
    assert load_operators(supernet, done / "damage", subnet) == [(row.block, row.recipe)]
    assert damage.network_damage(supernet, subnet, lambda: judge) == pytest.approx(row.damage, rel=1e-6)
    assert fresh != pytest.approx(row.damage, rel=1e-3)
    assert len(load_operators(supernet, done / "damage")) == len(table.rows)
    with pytest.raises(InputError, match="no solved operators"):
        load_operators(supernet, done / "merge")


def test_the_table_has_the_time_of_every_block(done):
    table = DamageTable.load(done / "damage" / "table.json")
    assert table.latency > 0
    assert table.environment["threads"] == 1
    assert all(row.latency > 0 and row.latency_before > 0 for row in table.rows)
    assert len({row.latency for row in table.rows}) == len(table.rows)
    times = json.loads((done / "damage" / "costs.json").read_text())["times"]
    assert {"network", table.rows[0].block, f"{table.rows[0].block} full"} <= {row["name"] for row in times["rows"]}


def test_training_starts_from_a_calibration(done, weights, call, tmp_path):
    out = tmp_path / "run"
    words = ["run", SPEC, "--data", "digits", "--init", done, "--out", out, "--threads", 1, *options(TINY)]
    told = call(*words)
    assert told.status == 0, told
    run = RunDirectory.open(out)
    assert run.record.stages == ("baseline", "finetune", "merge")
    chosen = SubnetConfig.load(done / "calibrate" / "subnet.json")
    assert run.record.subnet == chosen.choices
    assert contents(out)["calibrate/weights.safetensors"] == contents(done)["calibrate/weights.safetensors"]
    assert contents(out)["baseline/weights.safetensors"] == contents(done)["baseline/weights.safetensors"]
    begun, ended = (load_file(out / stage / "weights.safetensors") for stage in ("calibrate", "finetune"))
    assert begun.keys() == ended.keys()
    assert call(*words).out.count("finished before") == 3
    assert call(*words[:4], *words[6:]).out.count("finished before") == 3, "kept where it is left out"
    call.refuses(*words, "--weights", weights, names=("--weights: has no meaning with --init",))
    call.refuses(*words, "--set", "model.drop_path_rate=0.1", names=("--init: ", "under other settings"))


def test_without_training_the_start_is_the_calibrated_network(done, call, tmp_path):
    out = tmp_path / "run"
    direct = [*options(TINY), "--set", "finetune.epochs=0"]
    told = call("run", SPEC, "--data", "digits", "--init", done, "--out", out, "--threads", 1, *direct)
    assert told.status == 0, told
    assert result(out, "merge")["top1"] == pytest.approx(result(done, "merge")["top1"], abs=1.0)


def test_a_run_calibrates_its_own_start(call, tmp_path):
    out = tmp_path / "run"
    words = ["run", SPEC, "--data", "digits", "--init", "calibrated", "--prune", 2, "--recipe", "full", "--out", out]
    told = call(*words, "--threads", 1, *options([*TINY, "distill.epochs=0"]))
    assert told.status == 0, told
    stages = ("baseline", "damage", "calibrate", "finetune", "merge")
    assert RunDirectory.open(out).record.stages == stages
    assert all((out / stage / "result.json").is_file() for stage in stages)
    finetune = result(out, "finetune")
    assert finetune["epochs"] == 2
    assert [epoch["blend"] for epoch in finetune["history"]] == [1.0, 1.0], "solved blocks are not blended in"


def test_what_is_no_calibration_is_refused(copy, call, tmp_path):
    def refused(place, *names):
        words = ("run", SPEC, "--data", "digits", "--init", place, "--out", tmp_path / "run", *options(TINY))
        call.refuses(*words, names=("--init: ", *names))
        assert not (tmp_path / "run").exists()

    refused(tmp_path / "none", "no such directory")
    refused(tmp_path, "not a run directory")
    record = json.loads((copy / "run.json").read_text())
    (copy / "calibrate" / "result.json").unlink()
    refused(copy, "is not finished")
    (copy / "run.json").write_text(json.dumps({**record, "calibration": None}))
    refused(copy, "is a run without calibrated blocks")
    (copy / "run.json").write_text(json.dumps({**record, "calibration": {"picture": 3}}))
    refused(copy, "run.json", "picture")
    told = ("--subnet: has no meaning",)
    words = ("run", SPEC, "--data", "digits", "--init", "calibrated", "--subnet", copy / "calibrate" / "subnet.json")
    call.refuses(*words, "--out", tmp_path / "run", names=told)


def test_a_run_of_the_first_version_still_opens(copy):
    record = json.loads((copy / "run.json").read_text())
    old = {name: value for name, value in record.items() if name not in ("calibration", "init")}
    (copy / "run.json").write_text(json.dumps(old))
    assert RunDirectory.open(copy).record.calibration is None


@pytest.mark.parametrize("stages", range(5))
def test_every_state_has_a_page(copy, stages):
    for stage in STAGES[stages:]:
        shutil.rmtree(copy / stage)
    page = report(copy).read_text()
    assert page.count('class="done"') == stages
    assert page.count('class="todo"') == 4 - stages


def test_images_without_labels_do(weights, call, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        Image.effect_noise((40, 40), 30 + number).convert("RGB").save(folder / f"{number}.png")
    out = tmp_path / "net"
    told = call(*asked(weights, out, "--prune", 1, "--recipe", "full", data=f"folder:{folder}"))
    assert told.status == 0, told
    for shown in ("baseline +no labels", "merge +no labels", "damage, no labels +depth"):
        assert re.search(shown, told.out), told.out
    assert "few images: at most" in told.out
    assert "memory: up to" in told.out
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
        (("--prune", 1, "--recipe", "fulll"), ("--recipe: got 'fulll'", "did you mean 'full'?")),
        (("--prune", 1, "--judge", "nowhere"), ("nowhere",)),
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
    told = ("nan.safetensors", next(iter(model.state_dict())), "not finite")
    call.refuses(*asked(tmp_path / "nan.safetensors", tmp_path / "net", "--prune", 1), names=told)
    assert not (tmp_path / "net").exists()


def test_images_that_cannot_be_read(weights, call, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    told = (str(folder), "no images")
    call.refuses(*asked(weights, tmp_path / "net", "--prune", 1, data=f"folder:{folder}"), names=told)
    for number in range(9):
        Image.new("RGB", (40, 40)).save(folder / f"{number}.png")
    told = ("9 images, allowed: at least 10",)
    call.refuses(*asked(weights, tmp_path / "net", "--prune", 1, data=f"folder:{folder}"), names=told)
    (folder / "broken.png").write_bytes(b"no image")
    told = ("broken.png", "cannot be read as an image")
    call.refuses(*asked(weights, tmp_path / "net", "--prune", 1, data=f"folder:{folder}"), names=told)
    assert not list((tmp_path / "net").rglob("operators*"))


def test_a_network_without_prunable_blocks(weights, call, tmp_path):
    spec = tmp_path / "none.yaml"
    text = spec_of(SPEC).text.replace("recipes: [full, pointwise]", "recipes: [same]")
    start, end = (text.index(f"\n{key}:\n") for key in ("recipes", "blocks"))
    spec.write_text(f"{text[:start]}\nrecipes:\n  same: {{kind: reparam, merge: []}}\n{text[end:]}")
    words = asked(weights, tmp_path / "net", "--prune", 1)
    call.refuses(words[0], spec, *words[2:], names=("no block that a recipe prunes",))


def test_a_place_that_cannot_be_written(weights, call, tmp_path):
    (tmp_path / "file").write_text("kept")
    call.refuses(*asked(weights, tmp_path / "file", "--prune", 1), names=("--out", "is a file"))
    call.refuses(*asked(weights, tmp_path / "file" / "net", "--prune", 1), names=("file",))
    assert (tmp_path / "file").read_text() == "kept"
