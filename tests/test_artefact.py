"""Saved networks: the same bits back, the same bytes again; damaged files are refused, and verify sees every change."""

import functools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import parse, spec_of
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from updp.artefact import FORMAT_VERSION, inspect, load, load_state, load_tensors, save_network, save_tensors, verify
from updp.artefact import source_path as source_of
from updp.certificate import Certificate, merge
from updp.errors import InputError
from updp.files import check_writable, sha256
from updp.randomize import randomize
from updp.spec import ArchSpec
from updp.supernet import Supernet, build_supernet

SAME = """
version: 1
model: {timm: tf_efficientnet_lite0}
input: [3, 64, 64]
structures:
  residual:
    - sum:
        - [conv_pw, bn1, conv_dw, bn2, conv_pwl, bn3, drop_path]
        - []
recipes:
  full:
    replace: {bn1.act: identity, bn2.act: identity}
    append: [relu6, batchnorm]
    merge: all
blocks:
  - {match: "blocks.*.*", except: "blocks.*.0", structure: residual, recipes: [full]}
"""
SLICES = """
version: 1
model: {timm: resnet18d}
input: [3, 33, 37]
structures:
  single: ["0", "1", "2"]
  pair: ["0", "1", "2", "3"]
recipes:
  one: {replace: {"2": identity}, append: [relu6]}
  two: {replace: {"2": identity}, append: [batchnorm]}
blocks:
  - {match: "conv1[0:3]", structure: single, recipes: [one]}
  - {match: "conv1[3:7]", structure: pair, recipes: [two]}
"""
TEXTS = {"same": SAME, "slices": SLICES}
PRUNED = {
    "convnext_digits": ["stages.0.blocks.0", "stages.1.blocks.1", "stages.2.blocks.3"],
    "deit_digits": ["blocks.0", "blocks.5"],
    "same": ["blocks.1.1", "blocks.4.2"],
    "slices": ["conv1[3:7]"],  # the other slice is kept
}
DAMAGED = "convnext_digits"


def network_spec(name: str) -> ArchSpec:
    return parse(TEXTS[name], name) if name in TEXTS else spec_of(name)


def make(name: str, seed: int = 0, pruned: list[str] | None = None) -> Supernet:
    """A supernet with random statistics, its subnet set for good."""
    supernet = build_supernet(network_spec(name), num_classes=10, seed=seed, resized=True).eval()
    randomize(supernet, seed)
    supernet.reduce(supernet.configure(PRUNED[name] if pruned is None else pruned))
    supernet.free_baseline()
    return supernet


@functools.cache
def merged(name: str) -> tuple[Supernet, nn.Module, Certificate]:
    supernet = make(name)
    return supernet, *merge(supernet)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Networks as saved; tests that change files work on copies."""
    folder = tmp_path_factory.mktemp("saved")

    @functools.cache
    def save(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        supernet, network, certificate = merged(name)
        save_network(path, network, supernet, certificate)
        return path

    return save


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a saved network with its source beside it."""

    def copy(name: str = DAMAGED) -> Path:
        path = tmp_path / f"{name}.safetensors"
        shutil.copy(saved(name), path)
        shutil.copy(source_of(saved(name)), source_of(path))
        return path

    return copy


def images(name: str) -> torch.Tensor:
    return torch.randn(2, *network_spec(name).input, generator=torch.Generator().manual_seed(3))


def rewrite(path: Path, change=None, **metadata: str | None) -> None:
    """Write a file again with other tensors or other metadata; None takes a key away."""
    with safe_open(path, framework="pt") as file:
        kept = dict(file.metadata())
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    save_file(tensors, path, {k: v for k, v in {**kept, **metadata}.items() if v is not None})


def refuses(action, path: Path, *told: str) -> str:
    """One message that names the file and all this."""
    with pytest.raises(InputError) as caught:
        action(path)
    text = str(caught.value)
    assert str(path) in text
    assert [word for word in told if word not in text] == [], text
    assert len(caught.value.problems) == 1
    return text


# --- saved and loaded ---


@pytest.mark.parametrize("name", PRUNED)
def test_a_saved_network_computes_the_same_bits(name, saved):
    _, network, certificate = merged(name)
    assert certificate.ok, certificate.failures()
    loaded = load(saved(name))
    assert not loaded.training
    x = images(name)
    with torch.no_grad():
        expected = network.eval()(x)
        assert torch.equal(loaded(x), expected)
    assert expected.shape == (2, 10)
    assert float(expected.std()) > 0
    state, again = network.state_dict(), loaded.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[key], state[key]) and again[key].dtype == state[key].dtype for key in state)


@pytest.mark.parametrize("name", PRUNED)
def test_saved_twice_is_the_same_bytes(name, saved, tmp_path):
    supernet, network, certificate = merged(name)
    again = tmp_path / saved(name).name
    save_network(again, network, supernet, certificate)
    assert again.read_bytes() == saved(name).read_bytes()
    assert source_of(again).read_bytes() == source_of(saved(name)).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([again.name, source_of(again).name])


@pytest.mark.parametrize("name", PRUNED)
def test_a_file_says_what_it_is(name, saved):
    supernet, _, certificate = merged(name)
    header = inspect(saved(name))
    assert replace(header.spec, file=supernet.spec.file) == supernet.spec
    assert header.spec.text == supernet.spec.text
    assert sorted(header.subnet.pruned) == sorted(PRUNED[name])
    assert header.num_classes == 10
    assert header.certificate == certificate
    assert header.versions["torch"] == torch.__version__


def test_a_loaded_network_loads_without_the_source(saved, tmp_path):
    alone = Path(shutil.copy(saved(DAMAGED), tmp_path / "alone.safetensors"))
    x = images(DAMAGED)
    with torch.no_grad():
        assert torch.equal(load(alone)(x), merged(DAMAGED)[1].eval()(x))


# --- tensors ---


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    path = tmp_path / "tied.safetensors"
    weight = torch.arange(6.0).reshape(2, 3)
    other = weight.clone()
    save_tensors(path, {"a": weight, "b": other, "c": weight, "t": weight.t()}, {"note": "kept"})
    assert sorted(load_file(path)) == ["a", "b", "t"]
    tensors, metadata = load_tensors(path)
    assert metadata["note"] == "kept"
    assert tensors["c"].data_ptr() == tensors["a"].data_ptr()
    assert tensors["b"].data_ptr() != tensors["a"].data_ptr()
    assert torch.equal(tensors["c"], weight) and torch.equal(tensors["b"], weight)
    assert torch.equal(tensors["t"], weight.t())


def test_parts_of_one_memory_are_not_ties(tmp_path):
    path = tmp_path / "views.safetensors"
    whole = torch.arange(8.0)
    save_tensors(path, {"first": whole[:4], "second": whole[4:], "empty": whole[:0], "none": torch.zeros(0)})
    tensors, metadata = load_tensors(path)
    assert "ties" not in metadata
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "first": [0, 1, 2, 3], "second": [4, 5, 6, 7], "empty": [], "none": [],
    }  # fmt: skip


def test_an_unwritable_place_is_told_before_the_work():
    """A folder that exists and takes no files, even of an administrator."""
    place = Path("/proc/net.safetensors")
    if not place.parent.is_dir():
        pytest.skip("no /proc here")
    for write in (check_writable, lambda path: save_tensors(path, {"a": torch.zeros(1)})):
        with pytest.raises(InputError, match=r"^/proc/net\.safetensors: cannot be written: "):
            write(place)


def test_a_library_that_fails_to_write_is_told_as_one(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("updp.artefact.save_file", full)
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be written: .*No space left"):
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_tensors(path, {"a": torch.zeros(2)}, {"number": 1})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    refuses(lambda file: save_tensors(file, {"a": torch.ones(2)}), tmp_path / "no" / "net.safetensors", "no folder")


@pytest.mark.parametrize(
    ("ties", "told"),
    [
        ("{", "'ties' is not JSON"),
        ("[1]", "got list"),
        ('{"b": "nowhere"}', "'b' is tied to 'nowhere'"),
        ('{"b": 3}', "'b' is tied to 3"),
    ],
)
def test_ties_that_lead_nowhere_are_refused(tmp_path, ties, told):
    path = tmp_path / "net.safetensors"
    save_file({"a": torch.ones(2)}, path, {"ties": ties})
    refuses(load_tensors, path, told)


def test_nothing_is_loaded_where_something_does_not_fit():
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    wrong = {"bias": torch.full((2,), 7.0), "weight": torch.zeros(2, 4)}
    with pytest.raises(InputError, match=re.escape("weight: got [2, 4], expected [2, 3]")):
        load_state(module, wrong, "net.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


# --- damaged files ---


@pytest.mark.parametrize("action", [load, verify, inspect])
def test_what_is_no_safetensors_file_is_refused(action, copied, tmp_path):
    path = copied()
    data = path.read_bytes()
    for length in (0, 4, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refuses(action, path, "not a whole safetensors file")
    path.write_bytes(data + b"\0")
    refuses(action, path, "not a whole safetensors file")
    path.write_text("version: 1\n" * 20)
    refuses(action, path, "not a whole safetensors file")
    refuses(action, tmp_path, "is a folder")
    refuses(action, tmp_path / "none.safetensors", "no such file")


def _of_merged(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The float tensors of merged operators, in the order of their blocks."""
    names = [name for name in tensors if ".merged." in name or ".parts." in name]
    floats = [name for name in sorted(names) if tensors[name].is_floating_point()]
    assert len(floats) >= 3
    return floats


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = _of_merged(tensors)[0]
    tensors[name] = torch.zeros(*tensors[name].shape, 2)


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[_of_merged(tensors)[0]]


def _missing_outside(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["stem.0.weight"]


def _unknown(tensors: dict[str, torch.Tensor]) -> None:
    tensors["extra.weight"] = torch.ones(1)


@pytest.mark.parametrize("action", [load, verify])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_other_shape, "1 tensors have another shape"),
        (_missing, "1 tensors are missing"),
        (_missing_outside, "stem.0.weight"),
        (_unknown, "1 tensors do not belong (extra.weight)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(action, change, told, copied):
    path = copied()
    rewrite(path, change)
    refuses(action, path, told)


NEWER = str(int(FORMAT_VERSION) + 1)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"updp": None}, ["not a network saved by updp"]),
        ({"updp": "source"}, ["not a network saved by updp"]),
        ({"format_version": NEWER}, ["format_version", f"got '{NEWER}'", f"allowed: {FORMAT_VERSION}"]),
        ({"format_version": None}, ["format_version"]),
        ({"spec": None, "subnet": None}, ["lacks spec, subnet"]),
        ({"spec_hash": "0" * 64}, ["spec_hash"]),
        ({"certificate": "{"}, ["'certificate' is not JSON"]),
        ({"certificate": "[" * 100_000}, ["'certificate' is not JSON"]),
        ({"certificate": "{}"}, ["incomplete"]),
        ({"certificate": "[]"}, ["incomplete"]),
        ({"versions": "nonsense"}, ["'versions' is not JSON"]),
        ({"num_classes": "ten"}, ["incomplete", "ten"]),
        ({"num_classes": "11"}, ["head", "[10", "[11"]),
        ({"subnet": "{"}, ["subnet"]),
    ],
)
def test_metadata_that_is_not_ours_is_refused(metadata, told, copied):
    path = copied()
    rewrite(path, **metadata)
    refuses(load, path, *told)
    refuses(verify, path, *told)


def test_a_changed_spec_is_refused(copied):
    path = copied()
    text = inspect(path).spec.text
    rewrite(path, spec=text.replace("gelu", "relu"))
    assert text != text.replace("gelu", "relu")
    refuses(load, path, "spec_hash")


def test_another_subnet_does_not_fit(copied):
    path = copied()
    subnet = json.loads(inspect(path).subnet.to_json())
    del subnet["choices"][PRUNED[DAMAGED][0]]
    rewrite(path, subnet=json.dumps(subnet))
    refuses(load, path, "tensors are missing", PRUNED[DAMAGED][0])


def test_another_program_s_file_is_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, path, {"format": "pt", "author": "somebody"})
    refuses(load, path, "not a network saved by updp")
    save_file({"weight": torch.ones(2)}, path)
    refuses(load, path, "not a network saved by updp")


def test_the_source_is_no_network(saved):
    refuses(load, source_of(saved(DAMAGED)), "not a network saved by updp")


# --- verify ---


@pytest.mark.parametrize("name", PRUNED)
def test_verify_proves_what_was_saved(name, saved):
    found = verify(saved(name))
    assert found.ok, found.to_json()
    assert found.weights_checked
    assert found.given is not None and found.given.ok
    assert found.random.weights == "random" and found.given.weights == "given"
    assert {record.block for record in found.given.ops} == set(PRUNED[name])
    assert found.stored is not None and 0 < found.stored <= found.stored_bound == torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_verify_sees_what_is_no_number(place, value, copied):
    path = copied()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        names = _of_merged(tensors)
        index = {"first": 0, "middle": len(names) // 2, "last": -1}[place]
        tensors[names[index]].view(-1)[-1] = value

    rewrite(path, spoil)
    found = verify(path)
    assert not found.ok
    assert found.weights_checked and found.random.ok
    assert json.loads(json.dumps(found.to_json()))["ok"] is False


def test_verify_sees_one_element_a_millionth_off(copied):
    tensors = load_file(copied())
    for name in _of_merged(tensors):
        path = copied()

        def shift(tensors: dict[str, torch.Tensor], name: str = name) -> None:
            flat = tensors[name].view(-1)
            smallest = flat.abs().argmin()
            flat[smallest] += 1e-6 * flat.abs().max()

        rewrite(path, shift)
        found = verify(path)
        assert not found.ok, name
        assert found.worst_tensor == name
        assert found.stored == pytest.approx(1e-6, rel=0.1)


def test_without_the_source_the_weights_are_not_checked(copied):
    path = copied()
    source_of(path).unlink()
    refuses(verify, path, source_of(path).name, "--without-source")
    found = verify(path, without_source=True)
    assert found.ok and found.random.ok
    assert not found.weights_checked
    assert found.given is None and found.stored is None
    assert source_of(path).name in found.reason


@pytest.mark.parametrize("without_source", [False, True])
def test_another_network_s_source_is_refused(copied, tmp_path, without_source):
    path = copied()
    other, another = make(DAMAGED, seed=1), tmp_path / "other.safetensors"
    network, certificate = merge(other)
    save_network(another, network, other, certificate)
    shutil.copy(source_of(another), source_of(path))
    with pytest.raises(InputError, match="checksum differs") as caught:
        verify(path, without_source=without_source)
    assert str(source_of(path)) in str(caught.value)


def test_a_source_of_the_same_checksum_but_other_tensors_is_refused(copied):
    path = copied()
    save_tensors(source_of(path), {"a": torch.ones(1)})
    rewrite(path, source_sha256=sha256(source_of(path)))
    with pytest.raises(InputError, match="not those of the pruned blocks") as caught:
        verify(path)
    assert str(source_of(path)) in str(caught.value)
