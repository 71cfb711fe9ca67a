"""The commands: what they print, their exit statuses, and every kind of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import SPEC, Caller, contents, tiny_run
from PIL import Image
from safetensors.torch import load_file, save_file

import updp
from updp.cli import _COMMANDS
from updp.cli.console import quantity
from updp.spec import list_specs, load_spec
from updp.subnet import SubnetConfig

ROOT = Path(__file__).parents[1]
COMMANDS = [name for group in _COMMANDS.values() for name in group]
TEXT = load_spec(SPEC).text
BLOCKS = [f"stages.{stage}.blocks.{block}" for stage, depth in enumerate((2, 4, 4)) for block in range(depth)]


@pytest.fixture
def call(capsys):
    return Caller(capsys)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merged network with random weights, and the subnet file it was made from."""
    folder = tmp_path_factory.mktemp("merged")
    SubnetConfig(SPEC, {BLOCKS[1]: "pointwise", BLOCKS[5]: "full"}).save(folder / "subnet.json")
    out = folder / "net.safetensors"
    with pytest.raises(SystemExit) as ended:
        updp.cli.main(["merge", SPEC, "--subnet", str(folder / "subnet.json"), "--out", str(out)])
    assert not ended.value.code
    return out


# --- what commands print ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(call, command):
    done = call(command, "--help")
    assert done.status == 0
    assert f"Example: updp {command}" in done.out


def test_there_are_as_many_commands_as_there_should_be(call):
    assert len(COMMANDS) == 18
    done = call("--help")
    assert [name for name in COMMANDS if name not in done.out] == []


def test_version(call):
    assert call("--version").out == f"updp {updp.__version__}\n"


def test_list(call):
    rows = json.loads(call("list", "--json").out)
    assert [row["spec"] for row in rows] == list_specs()
    mine = rows[list_specs().index(SPEC)]
    assert (mine["input"], mine["recipes"]) == ([3, 32, 32], ["full", "pointwise"])
    shown = call("list").out
    assert [name for name in list_specs() if name not in shown] == []


def test_info(call):
    data = json.loads(call("info", "--json").out)
    assert data["versions"]["updp"] == updp.__version__
    assert {"cpu", "cpu features", "threads", "device"} == set(data["machine"])
    assert data["native"] in call("info").out
    from updp.ops import kernel_rows

    assert [row["name"] for row in data["kernels"]] == [row.name for row in kernel_rows()]


def test_count(call, merged):
    kept = json.loads(call("count", SPEC, "--json").out)
    pruned = json.loads(call("count", SPEC, "--subnet", merged.with_name("subnet.json"), "--json").out)
    assert {"macs", "params", "bn_elements", "depth", "blocks"} <= set(kept)
    assert (kept["depth"], pruned["depth"]) == (36, 33)
    assert pruned["params"] == sum(parameter.numel() for parameter in updp.load(merged).parameters())
    assert [block["choice"] for block in pruned["blocks"]].count("keep") == 8
    larger = json.loads(call("count", SPEC, "--size", "48x32", "--json").out)
    assert larger["macs"] > kept["macs"]
    weighted = json.loads(call("count", "mobilenetv2_100", "--bn-weight", "5", "--json").out)
    plain = json.loads(call("count", "mobilenetv2_100", "--json").out)
    assert weighted["macs"] - plain["macs"] == 5 * plain["bn_elements"] > 0
    assert BLOCKS[0] in call("count", SPEC).out


def test_check(call):
    done = call("check", SPEC)
    assert done.status == 0
    assert done.out.count("exact") == 4  # two recipes at two sizes
    assert " 32x32 " in done.out
    data = json.loads(call("check", SPEC, "--json", "--size", "40").out)
    assert data["ok"]
    assert data["specs"][0]["input"] == [3, 40, 40]
    assert data["specs"][0]["worst"] <= 1e-9


def test_check_reports_bad_specs_beside_good_ones(call, tmp_path):
    bad = write(tmp_path / "bad.yaml", TEXT.replace("merge: all", "merge: al"))
    done = call("check", bad, SPEC, "nosuch")
    assert done.status == 2
    assert done.out.count("exact") == 4
    assert f"{bad}:" in done.err
    assert "no such spec: got 'nosuch'" in done.err
    data = json.loads(call("check", bad, SPEC, "--json").out)
    assert (data["ok"], len(data["specs"]), data["failed"][0]["spec"]) == (False, 2, str(bad))


def test_merge_verify_export_and_eval_of_a_saved_network(call, merged, tmp_path):
    done = call("verify", merged)
    assert done.status == 0
    assert done.out.count("holds") == 3
    assert json.loads(call("verify", merged, "--json").out)["ok"]
    exported = call("export", merged, "--format", "torch-export", "--out", tmp_path / "net.pt2")
    assert (exported.status, (tmp_path / "net.pt2").is_file()) == (0, True)


def test_merging_without_weights_says_that_they_are_random(call, merged, tmp_path):
    subnet = merged.with_name("subnet.json")
    done = call("merge", SPEC, "--subnet", subnet, "--out", tmp_path / "a.safetensors")
    assert "weights are random" in done.out
    weights = tmp_path / "w.safetensors"
    save_file(_baseline().state_dict(), weights)
    done = call("merge", SPEC, "--subnet", subnet, "--weights", weights, "--out", tmp_path / "b.safetensors")
    assert done.status == 0, done
    assert "random" not in done.out
    kept = load_file(tmp_path / "b.safetensors")
    assert kept["stem.0.weight"].equal(load_file(weights)["stem.0.weight"])


def _baseline():
    from updp.structure import create_model

    return create_model(load_spec(SPEC), seed=3)


def test_eval_of_a_spec_takes_settings_of_data(call):
    done = call("eval", SPEC, "--data", "digits", "--json", "--set", "data.mean=[0.5,0.5,0.5]", "--set", "seed=2")
    data = json.loads(done.out)
    assert (data["weights"], data["data"]["mean"]) == ("random", [0.5, 0.5, 0.5])
    assert data["images"] == data["data"]["val_images"] > 100
    assert 0 <= data["top1"] <= data["top5"] <= 100
    assert "weights are random" in call("eval", SPEC, "--data", "digits").err


def test_a_tampered_network_is_status_1(call, merged, tmp_path):
    from updp.artefact import load_tensors, save_tensors, source_path

    tensors, metadata = load_tensors(merged)
    name = next(name for name in tensors if BLOCKS[5] in name and tensors[name].dim() == 4)
    tensors[name].view(-1)[0] += 0.01
    save_tensors(tmp_path / merged.name, tensors, metadata)
    (tmp_path / source_path(merged).name).write_bytes(source_path(merged).read_bytes())
    done = call("verify", tmp_path / merged.name)
    assert done.status == 1
    assert "FAILS" in done.out
    assert done.err.startswith("error: ")


# --- bad input ---


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


BAD_SPECS = {
    "syntax": ("input: [3, 32, 32]", "input: [3, 32, 32", "not YAML"),
    "duplicate key": ("version: 1", "version: 1\nversion: 1", "there already"),
    "tag": ("version: 1", "version: !!int 1", "tags are not allowed"),
    "bomb": ("version: 1", f"version: {'[' * 200}1{']' * 200}", "deep"),
    "unknown key": ("recipes:\n", "recipies:\n", "did you mean 'recipes'"),
    "wrong type": ("[3, 32, 32]", "[3, 32, wide]", "got 'wide' (a string)"),
    "step that does not exist": ("- mlp.drop1\n", "- mlp.drop9\n", "got 'mlp.drop9'"),
    "another computation": ("- mlp.act\n", "- mlp.act\n      - mlp.act\n", "computes something else"),
    "drop path left out": ("      - drop_path\n", "", "computes something else"),
    "recipe names a missing step": ("mlp.act: identity", "mlp.gelu: identity", "mlp.gelu"),
    "unknown layer": ("append: [gelu, batchnorm]", "append: [gelo, batchnorm]", "did you mean 'gelu'"),
    "match that matches nothing": ("stages.*.blocks.*", "layers.*.blocks.*", "matches no module"),
    "two groups on one block": (
        "recipes: [full, pointwise]\n",
        "recipes: [full, pointwise]\n- {match: stages.0.blocks.*, structure: block, recipes: [full]}\n",
        "is a block already",
    ),
}


@pytest.mark.parametrize(("old", "new", "told"), BAD_SPECS.values(), ids=BAD_SPECS)
def test_bad_specs(call, tmp_path, old, new, told):
    assert TEXT.count(old) >= 1
    file = write(tmp_path / "bad.yaml", TEXT.replace(old, new, 1))
    message = call.refuses("check", file, names=(f"{file}:", told))
    arguments = tiny_run(tmp_path / "out")
    arguments[1] = file
    assert call.refuses(*arguments, names=(f"{file}:", told)) == message
    assert contents(tmp_path).keys() == {"bad.yaml"}


def test_a_false_claim(call, tmp_path):
    text = load_spec("deit_digits").text.replace("enters: attn.qkv", "enters: attn.proj")
    file = write(tmp_path / "bad.yaml", text)
    call.refuses("check", file, names=(f"{file}:", "enters", "attn.proj"))


def test_all_errors_of_a_spec_come_together(call, tmp_path):
    text = TEXT.replace("merge: all", "merge: al").replace("[gelu, batchnorm]", "[gelo, batchnorm]")
    file = write(tmp_path / "bad.yaml", text)
    message = call.refuses("check", file, names=("2 problems", "gelo", "'al'"))
    assert len(message.splitlines()) == 3


def test_specs_that_cannot_be_read(call, tmp_path):
    call.refuses("check", tmp_path / "none.yaml", names=("none.yaml", "No such file"))
    call.refuses("check", tmp_path, names=(str(tmp_path),))
    (tmp_path / "bytes.yaml").write_bytes(b"version: \xff")
    call.refuses("count", tmp_path / "bytes.yaml", names=("bytes.yaml:1:10", "not UTF-8"))


def image_folder(path: Path, classes: int) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            folder = path / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return path


@pytest.fixture
def wrong(tmp_path):
    """Files that do not fit, by name: an empty folder, three files of weights, two subnets."""
    names = ("empty", "w.safetensors", "cut.safetensors", "shapes.safetensors", "other.json", "unknown.json")
    empty, weights, cut, shapes, other, unknown = files = [tmp_path / name for name in names]
    empty.mkdir()
    save_file(_baseline().state_dict(), weights)
    cut.write_bytes(weights.read_bytes()[:-1000])
    save_file({name: tensor[..., :1].contiguous() for name, tensor in load_file(weights).items()}, shapes)
    SubnetConfig("resnet34", {"layer1.0": "full"}).save(other)
    SubnetConfig(SPEC, {BLOCKS[0]: "fulll", "stages.9": "full"}).save(unknown)
    return files


def test_bad_runs(call, tmp_path, wrong):
    """Everything that is refused before a run begins, and that nothing is left of it."""
    out, (empty, weights, cut, shapes, other, unknown) = tmp_path / "out", wrong
    before = contents(tmp_path)
    cases = [
        (tiny_run(out, prune=11), ("--prune: got 11, allowed: 1 to 10",)),
        (tiny_run(out, prune=0), ("--prune: got 0",)),
        (tiny_run(out, prune=None), ("--prune: say how many",)),
        (tiny_run(out, "--recipe", "ful"), ("recipe got 'ful'", "did you mean 'full'")),
        (tiny_run(out, "--subnet", other, prune=None), (str(other), "got 'resnet34'")),
        (tiny_run(out, "--subnet", unknown, prune=None), (str(unknown), "'fulll'", "'stages.9'", "2 problems")),
        (tiny_run(out, "--subnet", tmp_path / "none.json", prune=None), ("none.json", "cannot read")),
        (tiny_run(out, "--weights", tmp_path / "none"), ("none: no such file",)),
        (tiny_run(out, "--weights", cut), (str(cut), "not a whole safetensors file")),
        (tiny_run(out, "--weights", shapes), (str(shapes), "have another shape")),
        (tiny_run(out, "--weights", weights), ("has 10 classes, but the model has 1000",)),
        (tiny_run(out, "--data", f"folder:{tmp_path / 'none'}"), (f"{tmp_path / 'none'}: no such folder",)),
        (tiny_run(out, "--data", f"folder:{empty}"), (f"{empty}: no images",)),
        (tiny_run(out, "--data", "digit"), ("did you mean 'digits'",)),
        (tiny_run(out, "--set", "finetune.epoch=3"), ("--set finetune.epoch=3", "did you mean 'epochs'")),
        (tiny_run(out, "--set", "finetune.epochs=many"), ("finetune.epochs", "'many'")),
        (tiny_run(out, "--set", "train.optimizer=adamwx"), ("optimizer: got 'adamwx'",)),
        (tiny_run(out, "--set", "finetune.auto_augment=no-such"), ("finetune.auto_augment: got 'no-such'",)),
        (tiny_run(out, "--set", "supernet.scheduler=no-such"), ("supernet: scheduler no-such",)),
        (tiny_run(out, "--device", "tpu"), ("--device: got 'tpu'",)),
        (tiny_run(out, "--precision", "int4"), ("--precision: got 'int4'",)),
        (tiny_run(out, "--until", "search2"), ("--until: got 'search2'",)),
        (tiny_run(tmp_path), (f"--out: {tmp_path} has files in it",)),
        (tiny_run(weights), (f"--out: {weights} is a file",)),
        (tiny_run(weights / "below"), (str(weights),)),
    ]
    for arguments, names in cases:
        call.refuses(*arguments, names=names)
    assert contents(tmp_path) == before
    assert not out.exists()


def test_several_problems_of_a_run_come_together(call, tmp_path):
    message = call.refuses(
        *tiny_run(tmp_path / "out", "--data", "folder:/nope", "--weights", "/none.safetensors", prune=99),
        names=("3 problems", "/nope", "/none.safetensors", "--prune: got 99"),
    )
    assert len(message.splitlines()) == 4


def test_eval_refuses_what_does_not_fit(call, tmp_path, merged):
    few = image_folder(tmp_path / "few", 3)
    weights = tmp_path / "w.safetensors"
    save_file(_baseline().state_dict(), weights)
    data = f"folder:{few}"
    call.refuses("eval", SPEC, "--data", data, "--weights", weights, names=("3 classes", "1000"))
    call.refuses("eval", merged, "--data", data, names=("3 classes", "1000"))
    call.refuses("eval", merged, "--data", data, "--weights", weights, names=("--weights",))
    call.refuses("eval", merged, "--data", data, "--set", "model.x=1", names=("--set model.x=1", "data.mean"))
    call.refuses("eval", weights, "--data", data, names=("not a network saved by updp",))
    call.refuses("eval", tmp_path / "no.safetensors", "--data", data, names=("no such file",))
    call.refuses("eval", SPEC, "--data", "npz:/nope", names=("/nope",))


def test_other_commands_refuse(call, tmp_path, merged):
    subnet = merged.with_name("subnet.json")
    call.refuses("merge", SPEC, names=("--subnet and --out",))
    call.refuses("merge", SPEC, "--subnet", subnet, "--out", tmp_path / "a.txt", names=("NAME.safetensors",))
    missing = tmp_path / "no" / "a.safetensors"
    call.refuses("merge", SPEC, "--subnet", subnet, "--out", missing, names=("in a folder that exists",))
    call.refuses("merge", tmp_path, names=("no run.json",))
    call.refuses("merge", tmp_path, "--subnet", subnet, names=("is a run",))
    call.refuses("verify", tmp_path / "none.safetensors", names=("no such file",))
    call.refuses("export", merged, "--format", "onxx", names=("got 'onxx'", "did you mean 'onnx'"))
    call.refuses("count", SPEC, "--size", "big", names=("--size: got 'big'",))
    call.refuses("count", SPEC, "--subnet", merged, names=(str(merged),))
    for command in ("train", "search", "finetune", "report"):
        call.refuses(command, tmp_path / "none", names=(str(tmp_path / "none"),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["count"], ["nosuch"], ["count", "a", "--nosuch"], ["run", SPEC], []])
def test_usage_errors_are_status_2(call, arguments):
    done = call(*arguments)
    assert done.status == 2, done
    assert "Traceback" not in done.err


# --- how commands end ---


def test_an_unknown_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("updp.oracle.count_subnet", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        updp.cli.main(["count", SPEC])


def test_ctrl_c_is_status_130(call, monkeypatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("updp.conformance.check_spec", interrupted)
    done = call("check", SPEC)
    assert done.status == 130
    assert "Interrupted" in done.err
    assert f"updp check {SPEC}" in done.err


def test_a_process_ends_with_the_status_and_colours_nothing_in_a_pipe():
    command = [sys.executable, "-m", "updp", "count"]
    bad = subprocess.run([*command, "nosuch"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: no such spec: got 'nosuch', allowed: ")
    assert len(bad.stderr.splitlines()) == 1
    good = subprocess.run([*command, SPEC], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\x1b" not in good.stdout
    assert good.stderr == ""


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (31, 3, "31"),
        (1234.5, 3, "1.23 k"),
        (519_350_000, 3, "519.4 M"),
        (519_350_000, 5, "519.35 M"),
        (999.96e6, 3, "1 G"),
        (999.96e6, 5, "999.96 M"),
        (2_574_500_000, 3, "2.57 G"),
    ],
)
def test_quantities(value, digits, shown):
    assert quantity(value, digits) == shown


def test_count_names_the_file_of_a_wrong_subnet(call, tmp_path):
    SubnetConfig(SPEC, {"stages.9": "full"}).save(tmp_path / "subnet.json")
    told = (f"{tmp_path / 'subnet.json'}: ", "no such prunable block: got 'stages.9'")
    call.refuses("count", SPEC, "--subnet", tmp_path / "subnet.json", names=told)
