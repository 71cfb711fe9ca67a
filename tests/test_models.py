"""Networks made by a function of the user's own module: never because a file says so, and every kind of mistake."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from commands import TINY, Caller, options
from torch import nn

import updp
from updp.errors import InputError, SpecError
from updp.spec import load_spec, parse_spec
from updp.structure import create_model
from updp.subnet import SubnetConfig

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cifar_resnet"
MODULE = """
from os import system
from pathlib import Path

from timm.models.resnet import BasicBlock
from torch import nn

Path(__file__).with_name("imported").touch()


class Net(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.layers = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


def small(width=4, num_classes=10):
    return Net(width, num_classes)


def ten():
    return Net(4, 10)


def anything(**options):
    return Net(4, options["num_classes"])


def nameless(num_classes=7):
    network = Net(4, num_classes)
    del network.num_classes
    return network


def silent():
    network = Net(4, 3)
    del network.num_classes
    return network


def broken():
    raise RuntimeError("out of\\nluck")


def text():
    return "a network"
"""
SPEC = """version: 1
model: {python: toy_networks:small, width: 4}
input: [3, 16, 16]
data: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop_pct: 1, interpolation: bilinear}
structures:
  plain:
    - sum:
        - [conv1, bn1, drop_block, act1, conv2, bn2]
        - []
    - act2
recipes:
  full: {replace: {act1: identity}, resize: {conv1: 1}, append: [batchnorm]}
blocks:
  - {match: "layers.*", structure: plain, recipes: [full]}
"""
ALLOW = ("--allow-module", "toy_networks")


@pytest.fixture
def call(capsys):
    return Caller(capsys)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with the module and a spec; the module is imported anew in each test."""
    (tmp_path / "toy_networks.py").write_text(MODULE)
    (tmp_path / "toy.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("toy_networks", None)


def spec_with(function, module="toy_networks"):
    return parse_spec(SPEC.replace("toy_networks:small, width: 4", f"{module}:{function}"), file="s.yaml", name="s")


def refused(spec, **options):
    """The one message that such a spec gets."""
    with pytest.raises(SpecError) as caught:
        create_model(spec, **options)
    (problem,) = caught.value.problems
    assert "\n" not in problem.message
    assert (problem.place.file, problem.place.line, problem.where) == ("s.yaml", 2, "model.python")
    return problem.message


# --- only on the user's word ---


def test_no_file_makes_updp_import_a_module(call, folder):
    (folder / "subnet.json").write_text(SubnetConfig("toy", {"layers.0": "full"}).to_json())
    (folder / "weights.safetensors").touch()
    commands = [
        ("check", "toy.yaml"),
        ("count", "toy.yaml"),
        ("eval", "toy.yaml", "--data", "digits"),
        ("merge", "toy.yaml", "--subnet", "subnet.json", "--out", "net.safetensors"),
        ("run", "toy.yaml", "--data", "digits", "--prune", 1, "--out", "run"),
        ("calibrate", "toy.yaml", "--weights", "weights.safetensors", "--data", "digits", "--prune", 1, "--out", "c"),
    ]
    before = sorted(folder.iterdir())
    for command in commands:
        for others in ((), ("--allow-module", "toy_network", "--allow-module", "other.toy_networks")):
            call.refuses(*command, *others, names=("toy.yaml:2:17", "'toy_networks'", "--allow-module toy_networks"))
    assert "toy_networks" not in sys.modules
    assert sorted(folder.iterdir()) == before
    assert call("check", "toy.yaml", *ALLOW).status == 0
    assert (folder / "imported").is_file()
    call.refuses("check", "toy.yaml", names=("--allow-module toy_networks",))  # it was one command's word


def test_neither_does_a_run_nor_a_saved_network(call, folder):
    settings = options([*TINY, "data.crop_pct=0.9"])
    asked = ("run", "toy.yaml", "--data", "digits", "--prune", 1, "--out", "run", "--threads", 1, *settings)
    assert call(*asked, "--until", "baseline", *ALLOW).status == 0
    sys.modules.pop("toy_networks")
    (folder / "imported").unlink()
    for command in (asked, ("train", "run")):
        call.refuses(*command, names=("model.python", "--allow-module toy_networks"))
    assert call(*asked, *ALLOW).status == 0
    sys.modules.pop("toy_networks")
    (folder / "imported").unlink()
    saved = folder / "run" / "merge" / "merged.safetensors"
    for command in (("verify", saved), ("eval", saved, "--data", "digits"), ("export", saved)):
        call.refuses(*command, names=("merged.safetensors!spec", "--allow-module toy_networks"))
    with pytest.raises(InputError, match="allow_modules"):
        updp.load(saved)
    assert call("report", "run").status == 0
    assert "toy_networks" not in sys.modules
    assert not (folder / "imported").exists()
    assert json.loads(call("verify", saved, "--json", *ALLOW).out)["ok"]
    with updp.allow_modules("toy_networks"):
        assert updp.load(saved)(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_a_calibration(call, folder):
    from updp.artefact import save_tensors
    from updp.randomize import randomize

    with updp.allow_modules("toy_networks"):
        save_tensors("weights.safetensors", randomize(create_model(load_spec(folder / "toy.yaml")), 0).state_dict())
    done = call("calibrate", "toy.yaml", "--weights", "weights.safetensors", "--data", "digits", "--prune", 1,
                "--images", 50, "--out", "out", "--threads", 1, *ALLOW)  # fmt: skip
    assert done.status == 0, done
    assert "certificate holds" in done.out


def test_only_one_module_of_updp_imports_what_it_is_told():
    found = set()
    for path in (ROOT / "updp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_import = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
            if is_import and not isinstance(node.args[0], ast.Constant):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"updp/__init__.py", "updp/allowed.py"}  # the first: updp's own public names


def test_allowed_for_a_block_or_for_good(folder):
    with updp.allow_modules("toy_networks"), updp.allow_modules("others"):
        assert create_model(spec_with("small")).num_classes == 10
    assert "--allow-module toy_networks" in refused(spec_with("small"))
    word = updp.allow_modules("toy_networks")
    assert create_model(spec_with("small")).num_classes == 10
    word.__exit__()


@pytest.mark.parametrize("name", ["", "toy-networks", "./toy_networks", "toy_networks:small", "toy..networks"])
def test_names_that_no_module_can_have(call, folder, name):
    call.refuses("check", "toy.yaml", "--allow-module", name, names=(f"--allow-module: got {name!r}, allowed:",))


# --- what the function is given, and what it must give ---


def test_the_function_gets_what_it_takes(folder):
    with updp.allow_modules("toy_networks"):
        first, again, other = (create_model(load_spec("toy.yaml"), num_classes=5, seed=seed) for seed in (0, 0, 1))
        assert (first.num_classes, first.stem.out_channels) == (5, 4)
        assert first.stem.weight.equal(again.stem.weight)
        assert not first.stem.weight.equal(other.stem.weight)
        assert create_model(spec_with("anything"), num_classes=5, drop_path=0.5).num_classes == 5
        assert create_model(spec_with("nameless")).num_classes == 7
        assert create_model(spec_with("nameless"), num_classes=2).num_classes == 2
        assert create_model(spec_with("Net, width: 3"), num_classes=2).stem.out_channels == 3
        assert create_model(spec_with("ten"), num_classes=10, drop_path=0.5).num_classes == 10
        assert "asked for 5 classes, toy_networks:ten gives 10: it takes no" in refused(spec_with("ten"), num_classes=5)
        assert "does not say how many classes" in refused(spec_with("silent"))


def test_a_bad_function_is_told(folder):
    cases = {
        "smal": ("'smal'", "toy_networks.py", "did you mean 'small'?"),
        "system": ("no function or class 'system' is defined in 'toy_networks'",),  # os.system is not the module's own
        "Path": ("no function or class 'Path'",),
        "BasicBlock": ("no function or class 'BasicBlock'",),
        "__file__": ("no function or class '__file__'",),
        "broken": ("toy_networks:broken fails with {}: RuntimeError: out of luck",),
        "text": ("toy_networks:text gives a str, allowed: a torch.nn.Module",),
        "small, depth: 3": ("toy_networks:small fails with {'depth': 3}: TypeError: ", "'depth'"),
    }
    with updp.allow_modules("toy_networks"):
        for function, names in cases.items():
            message = refused(spec_with(function))
            assert [name for name in names if name not in message] == [], message


def test_a_bad_module_is_told(folder):
    (folder / "half.py").write_text("def small(:\n")
    (folder / "needs.py").write_text("import no_such_library\n")
    (folder / "package").mkdir()
    with updp.allow_modules("half", "needs", "nowhere", "package.nowhere"):
        assert "module 'half' cannot be imported: SyntaxError: " in refused(spec_with("small", "half"))
        message = refused(spec_with("small", "needs"))
        assert message == "module 'needs' cannot be imported: ModuleNotFoundError: No module named 'no_such_library'"
        for name in ("nowhere", "package.nowhere"):
            message = refused(spec_with("small", name))
            assert message == f"no module {name!r} on sys.path or in the current directory ({folder})"
    assert str(folder) not in sys.path


def test_a_network_that_is_not_one_for_these_images(folder):
    with updp.allow_modules("toy_networks"), pytest.raises(SpecError, match="does not run on"):
        updp.build_supernet(
            parse_spec(SPEC.replace("[3, 16", "[1, 16").replace("5, 0.5, 0.5]", "5]"), file="s", name="s")
        )


# --- the spec ---


def test_mistakes_in_the_spec():
    cases = {
        "small, width": ("smal-l, width", (2, "model.python: got 'toy_networks:smal-l', allowed: MODULE:FUNCTION")),
        "{python: toy_networks:small": ("{python: toy_networks", (2, "model.python: got 'toy_networks', allowed")),
        "{python: toy_networks": ("{pyton: toy_networks", (2, "allowed: {timm: NAME, …}; {python: MODULE:FUNC")),
        "width: 4}": ("timm: any}", (2, "model: got both 'timm' and 'python', allowed: one of them")),
        "crop_pct: 1, ": ("", (4, "data: lacks crop_pct, which no network but timm's brings along")),
        "data: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop_pct: 1, interpolation: bilinear}\n": (
            "", (2, "data: lacks mean, std, crop_pct, interpolation")),
        "width: 4": ("num_classes: 4", (2, "model: bad key: got 'num_classes'")),
    }  # fmt: skip
    for old, (new, (line, message)) in cases.items():
        assert old in SPEC
        with pytest.raises(SpecError) as caught:
            parse_spec(SPEC.replace(old, new), file="s.yaml", name="s")
        (problem,) = caught.value.problems
        assert (problem.place.line, message in str(problem)) == (line, True), str(problem)


def test_the_source_in_words():
    spec = spec_with("small, width: 4")
    assert (spec.model.module, spec.model.name, dict(spec.model.kwargs)) == ("toy_networks", "small", {"width": 4})
    assert str(spec.model) == "toy_networks:small"
    assert hash(spec) == hash(spec_with("small, width: 4"))


# --- the example ---


def test_the_example(call, monkeypatch):
    monkeypatch.chdir(EXAMPLE)
    spec = load_spec("resnet56_cifar10.yaml")
    with updp.allow_modules("cifar_resnet"):
        model = create_model(spec)
        supernet = updp.build_supernet(spec)
    assert (sum(p.numel() for p in model.parameters() if p.dim() == 4), len(supernet.available)) == (850864, 27)
    shortcut = model.layer2[0].downsample[0].weight
    x = torch.randn(1, 16, 6, 6)
    padded = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert nn.functional.conv2d(x, shortcut, stride=2).equal(padded)
    counted = json.loads(call("count", "resnet56_cifar10.yaml", "--json", "--allow-module", "cifar_resnet").out)
    assert (counted["depth"], len(counted["blocks"])) == (56, 27)
    checked = call("check", "resnet56_cifar10.yaml", "--allow-module", "cifar_resnet", "--json")
    assert json.loads(checked.out)["ok"]
