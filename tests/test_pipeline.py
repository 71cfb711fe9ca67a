"""A whole run in small, and what makes it a run: stages once, in order, the same bits, nobody else's directory."""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import SPEC, TINY, Caller, contents, options, started, tiny_run
from safetensors.torch import load_file

import updp
import updp.cli
from updp.certificate import Certificate
from updp.errors import InputError
from updp.files import read_json
from updp.measure import LatencyTable
from updp.pipeline import SEARCHED, RunDirectory, directory, finish
from updp.pipeline import run as run_module
from updp.pipeline.directory import write_json
from updp.pipeline.program import program
from updp.pipeline.settings import resolve
from updp.spec import load_spec
from updp.subnet import SubnetConfig

ROOT = Path(__file__).parents[1]
TABLE = {"environment": {"device": "cpu", "cpu": "a", "threads": 1, "torch": "2"}, "rows": []}


@pytest.fixture
def call(capsys):
    return Caller(capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = [str(argument) for argument in tiny_run(out)]
    with pytest.raises(SystemExit) as ended:
        updp.cli.main(arguments)
    assert not ended.value.code
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def quick(monkeypatch):
    """Without what takes long in the stage merge and is tested elsewhere: ONNX and timing."""
    monkeypatch.setattr(finish, "find_spec", lambda name: None)
    monkeypatch.setattr(finish, "_NETWORK_SECONDS", 0.01)
    monkeypatch.setattr(finish, "_BLOCK_SECONDS", 0.001)
    monkeypatch.setattr(finish, "_TRAINING_SECONDS", 0.01)


def result(directory: Path, stage: str) -> dict:
    return json.loads((directory / stage / "result.json").read_text())


def tensors(directory: Path) -> dict[str, dict[str, bytes]]:
    """The bits of every tensor in every file of a run."""
    return {
        str(file.relative_to(directory)): {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
        for file in directory.rglob("*.safetensors")
    }


def test_a_run_leaves_its_products(finished):
    assert set(contents(finished)) == {
        "run.json", "spec.yaml", "report.html", "log.jsonl",
        "baseline/weights.safetensors", "supernet/weights.safetensors", "finetune/weights.safetensors",
        "search/subnet.json", "search/scores.jsonl", "merge/merged.safetensors", "merge/merged.source.safetensors",
        "merge/merged.onnx", *(f"{stage}/result.json" for stage in SEARCHED),
    }  # fmt: skip


def test_run_json_says_what_the_run_is(finished):
    record = json.loads((finished / "run.json").read_text())
    spec = load_spec(SPEC)
    assert (record["spec"], record["spec_hash"], record["data"]) == (SPEC, spec.hash, "digits")
    assert (record["prune"], record["recipe"], record["settings"]) == (4, None, TINY)
    assert (record["threads"], record["device"], record["num_classes"]) == (1, "cpu", 10)
    assert record["environment"]["torch"] == torch.__version__
    assert [block["name"] for block in record["blocks"]] == list(updp.build_supernet(spec).bound)
    assert {(block["structure"], *block["recipes"]) for block in record["blocks"]} == {("block", "full", "pointwise")}
    assert (finished / "spec.yaml").read_text(encoding="utf-8") == spec.text


def test_results_say_what_each_stage_came_to(finished):
    baseline, supernet, search, finetune, merge = (result(finished, stage) for stage in SEARCHED)
    assert baseline["epochs"] == len(baseline["history"]) == finetune["epochs"] == 2
    assert [record["epoch"] for record in baseline["history"]] == [1, 2]
    assert baseline["history"][-1]["top1"] == baseline["top1"] > 20
    assert {"epoch", "train_loss", "top1", "lr", "blend", "seconds"} <= set(finetune["history"][0])
    assert {"epoch", "loss_keep", "loss_random", "loss_pruned", "seconds"} <= set(supernet["history"][0])
    assert 0 <= supernet["top1_pruned"] <= 100
    assert search["candidates_scored"] == 8
    assert search["block_evaluations"]["shared"] < search["block_evaluations"]["unshared"]
    subnet = SubnetConfig.load(finished / "search" / "subnet.json")
    assert len(subnet.pruned) == 4
    assert merge["certificate"]["ok"]
    assert merge["certificate_random"]["ok"]
    assert merge["top1"] == pytest.approx(finetune["top1"], abs=0.3)
    assert merge["after"]["depth"] == merge["before"]["depth"] - 2 * 4
    assert merge["after"]["macs"] < merge["before"]["macs"]
    assert [row.name for row in LatencyTable.from_dict(merge["latency"]).rows] == ["baseline", "merged"]
    steps = {row["name"]: row for row in merge["training"]["rows"]}
    assert list(steps) == ["baseline", "supernet", "blend below 1", "blend 1", "merged"]
    assert steps["merged"]["memory"] < steps["blend 1"]["memory"] < steps["blend below 1"]["memory"]
    chosen = {row["block"]: row["choice"] for row in merge["block_latency"]}
    assert {block: choice for block, choice in chosen.items() if choice != "keep"} == subnet.choices
    assert len(chosen) == 10


def test_the_merged_network_loads_and_scores(finished, call):
    network = updp.load(finished / "merge" / "merged.safetensors")
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    done = call("eval", finished / "merge" / "merged.safetensors", "--data", "digits", "--json")
    assert json.loads(done.out)["top1"] == result(finished, "merge")["top1"]


def test_finished_stages_are_not_redone(copy, call):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.*") if path.name != "report.html"}
    done = call(*tiny_run(copy))
    assert done.status == 0, done
    assert done.out.count("finished before") == 5
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.*") if path.name != "report.html"} == before


@pytest.mark.usefixtures("quick")
def test_a_stage_redone_alone_gives_the_same_bits_and_outdates_what_follows(copy, call):
    before = tensors(copy)
    (copy / "finetune" / "result.json").unlink()
    assert call("finetune", copy).status == 0
    assert not (copy / "merge" / "result.json").exists()
    done = call("merge", copy)
    assert done.status == 0, done
    assert "no ONNX file" in done.out
    after = tensors(copy)
    assert len(before) == 5
    assert [name for name in before if after[name] != before[name]] == []


def test_a_search_started_again_scores_nothing_twice(copy, call):
    before = contents(copy)
    for stage in ("search", "finetune", "merge"):
        (copy / stage / "result.json").unlink()
    assert call("search", copy).status == 0
    after = contents(copy)
    assert [name for name in before if "search/s" in name and after[name] != before[name]] == []
    assert result(copy, "search")["candidates_scored"] == 8


def test_stages_come_in_their_order(copy, call):
    (copy / "supernet" / "result.json").unlink()
    call.refuses("search", copy, names=(str(copy), "supernet", f"updp train {copy}"))
    call.refuses("merge", copy, names=("supernet",))


def test_another_command_cannot_use_the_directory(finished, call):
    before = contents(finished)
    for change, told in (
        (["--recipe", "pointwise"], "recipe: got pointwise, the run has none"),
        (["--set", "finetune.epochs=3"], "settings"),
        (["--seed", "1"], "seed: got 1, the run has 0"),
        (["--precision", "bf16"], "precision: got bf16, the run has no"),
        (["--set", "model.drop_path_rate=0.1"], "spec_hash"),
    ):
        call.refuses(*tiny_run(finished, *change), names=(str(finished), "holds another run", told))
    call.refuses(*tiny_run(finished, prune=3), names=("prune: got 3, the run has 4",))
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("spec.yaml", "version: 1\n", "spec.yaml"),
        ("run.json", "{", "run.json:1:2: not JSON"),
        ("run.json", "[]", "got list, allowed: an object"),
        ("run.json", '{"version": 2}', "version"),
        ("baseline/result.json", "nonsense", "result.json:1:1: not JSON"),
    ],
)
def test_a_damaged_run_is_refused(copy, call, file, text, told):
    (copy / file).write_text(text)
    call.refuses("train", copy, names=(told,))


def test_a_changed_spec_is_refused(copy, call):
    with (copy / "spec.yaml").open("a") as stream:
        stream.write("# changed\n")
    call.refuses("merge", copy, names=("spec.yaml", "the spec was changed since the run began"))
    call.refuses(*tiny_run(copy), names=("the spec was changed since the run began",))


def test_given_weights_and_subnet_take_the_place_of_stages(finished, tmp_path, call, quick):
    weights, subnet = finished / "baseline" / "weights.safetensors", finished / "search" / "subnet.json"
    out = tmp_path / "given"
    done = call(*tiny_run(out, "--weights", weights, "--subnet", subnet, prune=None))
    assert done.status == 0, done
    assert [stage for stage in SEARCHED if (out / stage / "result.json").exists()] == ["baseline", "finetune", "merge"]
    given = result(out, "baseline")
    assert (given["epochs"], given["top1"]) == (0, result(finished, "baseline")["top1"])
    assert contents(out)["finetune/weights.safetensors"] == contents(finished)["finetune/weights.safetensors"]
    call.refuses("search", out, names=("the run has a given subnet",))
    other = tmp_path / "other.json"
    blocks = list(SubnetConfig.load(subnet).choices)
    SubnetConfig(SPEC, {blocks[0]: "full"}).save(other)
    call.refuses(*tiny_run(out, "--weights", weights, "--subnet", other, prune=None), names=("prune", "subnet"))


def test_until_stops_early(tmp_path, call):
    out = tmp_path / "early"
    done = call(*tiny_run(out, "--until", "baseline", "--set", "baseline.epochs=1"))
    assert done.status == 0, done
    assert [stage for stage in SEARCHED if (out / stage).exists()] == ["baseline"]
    assert f"updp train {out}" in done.out
    assert RunDirectory.open(out).result("supernet") is None


# --- what goes wrong on the way ---


def test_a_loss_that_is_no_number_is_status_1(tmp_path, call):
    out = tmp_path / "nan"
    done = call(*tiny_run(out, *options(["baseline.optimizer=sgd", "baseline.lr=1e9", "baseline.clip_grad=null"])))
    assert done.status == 1, done
    assert done.err.startswith("error: train_loss is ")
    assert "epoch 1" in done.err
    assert "Traceback" not in done.err
    assert not (out / "baseline" / "result.json").exists()


def test_a_certificate_that_fails_is_status_1(copy, call, monkeypatch):
    def wrong(*args: object, **kwargs: object) -> Certificate:
        found = finish_certify(*args, **kwargs)
        return replace(found, ops=(replace(found.ops[0], error=1e-3), *found.ops[1:]))

    finish_certify = finish.certify
    monkeypatch.setattr(finish, "certify", wrong)
    shutil.rmtree(copy / "merge")
    done = call("merge", copy)
    assert done.status == 1, done
    assert "certificate does not hold on random weights" in done.err
    assert "1.00e-03 > 1.0e-09" in done.err
    assert list((copy / "merge").iterdir()) == []


def test_ctrl_c_is_status_130_and_says_how_to_go_on(tmp_path, call, monkeypatch):
    def interrupted(context: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(run_module._WORK, "supernet", interrupted)
    out = tmp_path / "stopped"
    arguments = tiny_run(out, "--set", "baseline.epochs=1")
    done = call(*arguments)
    assert done.status == 130, done
    assert "Interrupted" in done.err
    assert f"updp {' '.join(str(argument) for argument in arguments)}" in done.err
    assert (out / "baseline" / "result.json").exists()
    assert not (out / "supernet" / "result.json").exists()


def test_sigint_ends_a_real_process_with_130(tmp_path):
    process = started(tiny_run(tmp_path / "out", "--set", "baseline.epochs=500"))
    try:
        assert process.stdout is not None
        for text in process.stdout:
            if "  epoch" in text:
                break
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "updp run" in err
    assert not list((tmp_path / "out" / "baseline").iterdir())


# --- parts ---


def test_settings_of_model_and_data_make_another_spec():
    spec = load_spec(SPEC)
    changed = resolve(
        spec, ["model.drop_path_rate=0.1", "data.mean=[0, 0, 0]", "finetune.epochs=3", "input=[3, 48, 48]"]
    )
    assert changed.model.kwargs["drop_path_rate"] == 0.1
    assert changed.model.kwargs["depths"] == spec.model.kwargs["depths"]
    assert changed.data.mean == (0, 0, 0)
    assert changed.input == (3, 48, 48)
    assert changed.schedule.finetune.epochs == 3
    assert changed.schedule.supernet == spec.schedule.supernet
    assert changed.hash != spec.hash
    assert resolve(spec, ["finetune.epochs=3"]).hash == spec.hash


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.timm", "allowed: KEY=VALUE"),
        ("data.men=[0]", "did you mean 'mean'"),
        ("input.x=3", "input is a value"),
        ("finetune.epoch=3", "did you mean 'epochs'"),
    ],
)
def test_settings_that_are_none(setting, told):
    with pytest.raises(InputError, match=told):
        resolve(load_spec(SPEC), [setting])


def test_json_has_only_numbers_that_json_has(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": (1, float("inf")), "c": {"d": 1.5}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1, None], "c": {"d": 1.5}}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_json_that_no_reader_should_follow(tmp_path):
    for text in ("[" * 100_000, '{"a": ' + "1" * 10_000 + "}"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match=r"a\.json: cannot be read"):
            read_json(tmp_path / "a.json")


# --- a run that exists, and one that begins ---


def test_what_is_left_out_a_run_keeps(finished, call):
    before = contents(finished / "baseline")
    done = call("run", SPEC, "--data", "digits", "--out", finished, *options(TINY))
    assert done.status == 0, done
    assert done.out.count("finished before") == 5
    assert contents(finished / "baseline") == before
    told = ("seed: got 5, the run has 0; give another --out, or remove it",)
    call.refuses("run", SPEC, "--data", "digits", "--out", finished, *options(TINY), "--seed", 5, names=told)


def test_given_weights_subnet_and_seed_are_kept_too(finished, tmp_path, call):
    weights, subnet = finished / "baseline" / "weights.safetensors", finished / "search" / "subnet.json"
    given = tmp_path / "given.safetensors"
    shutil.copy(weights, given)
    ending = ("--until", "baseline")
    done = call(*tiny_run(tmp_path / "a", "--weights", given, "--subnet", subnet, "--seed", 2, *ending, prune=None))
    assert done.status == 0, done
    given.unlink()
    done = call(*tiny_run(tmp_path / "a", *ending, prune=None))
    assert "given weights)  finished before" in done.out, done
    told = ("recipe: got full, the run has none",)
    call.refuses(*tiny_run(tmp_path / "a", "--recipe", "full", prune=None), names=told)


def test_weights_of_a_run_fit_its_spec(finished, tmp_path, call):
    weights = finished / "baseline" / "weights.safetensors"
    done = call("eval", SPEC, "--data", "digits", "--weights", weights, "--json")
    assert json.loads(done.out)["top1"] == result(finished, "baseline")["top1"]
    out, subnet = tmp_path / "net.safetensors", finished / "search" / "subnet.json"
    done = call("merge", SPEC, "--weights", weights, "--subnet", subnet, "--out", out)
    assert done.status == 0, done
    assert updp.load(out)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_run_in_the_empty_folder_one_is_in(tmp_path, call, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = call(*tiny_run(Path(), "--set", "baseline.epochs=0", "--until", "baseline"))
    assert done.status == 0, done
    assert "(0 epochs)" in done.out
    assert Path("run.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("full"), OSError("full")])
def test_nothing_is_left_of_a_run_that_could_not_be_made(finished, tmp_path, monkeypatch, error, there):
    def fails(*args: object) -> None:
        raise error

    monkeypatch.setattr(directory, "write_json", fails)
    run, out = RunDirectory.open(finished), tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises((KeyboardInterrupt, InputError)):
        RunDirectory.create(out, run.record, run.spec, None)
    assert list(tmp_path.rglob("*")) == ([out] if there else [])


def test_a_result_with_parts_missing_is_refused(copy, call):
    file = copy / "merge" / "result.json"
    full = json.loads(file.read_text())
    for change, told in (
        ({"certificate": {}}, "certificate.worst: is missing"),
        ({"top1": True}, "top1: is missing or not what updp writes"),
        ({"latency": {**full["latency"], "rows": [{"name": "merged"}, 3]}}, "latency.rows[baseline]"),
    ):
        file.write_text(json.dumps({**full, **change}))
        call.refuses("merge", copy, names=(str(file), told))
    (copy / "search" / "result.json").write_text("{}")
    call.refuses("finetune", copy, names=(str(copy / "search" / "result.json"), "best: is missing"))


def test_the_summary_tells_the_worst_error_of_all(copy, call):
    file = copy / "merge" / "result.json"
    full = json.loads(file.read_text())
    certificate = {**full["certificate"], "worst": 3e-10, "float32": None}
    file.write_text(json.dumps({**full, "certificate": certificate}))
    done = call("merge", copy)
    assert "merged operators 3e-10, " in done.out, done
    assert "in float32 –" in done.out


def test_an_interrupted_merge_says_how_to_go_on(copy, call, monkeypatch):
    def interrupted(context: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(run_module._WORK, "merge", interrupted)
    (copy / "merge" / "result.json").unlink()
    done = call("merge", copy)
    assert done.status == 130, done
    assert "Finished stages are kept" in done.err
    assert f"updp merge {copy}" in done.err


def test_commands_are_shown_as_they_can_be_typed(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    for file, shown in (
        (tmp_path / ".venv" / "bin" / "updp", os.path.join(".venv", "bin", "updp")),
        (tmp_path / "updp", os.path.join(".", "updp")),
        (tmp_path / "pytest", "updp"),
    ):
        monkeypatch.setattr(sys, "argv", [str(file)])
        assert program() == shown
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "updp" / "__main__.py")])
    assert program().endswith(" -m updp")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert program() == "updp"
