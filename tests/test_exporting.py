"""Exports: other runtimes compute the same at any batch size; what cannot be exported leaves nothing behind."""

import functools
import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from commands import Caller
from networks import parse, spec_of
from safetensors.torch import save_file
from torch import Tensor, nn

from updp import exporting
from updp.artefact import load, save_network
from updp.certificate import merge
from updp.errors import CertificateError, InputError
from updp.exporting import TOLERANCE, export, export_network
from updp.randomize import randomize
from updp.spec import ArchSpec
from updp.supernet import build_supernet

SMALL = "convnext_digits"
PRUNED = {
    SMALL: ["stages.0.blocks.0", "stages.1.blocks.1", "stages.2.blocks.3"],
    "deit_digits": ["blocks.0", "blocks.5"],
    "tf_efficientnet_lite0": ["blocks.1.0", "blocks.1.1", "blocks.4.2"],
}
SLOW_IN_ONNX = [pytest.param(name, marks=pytest.mark.slow) for name in PRUNED if name != SMALL]


def network_spec(name: str) -> ArchSpec:
    """At a small input. Stride 2 on even maps: SAME pads only behind, which no plain convolution does."""
    spec = spec_of(name)
    if spec.input[1] <= 64:
        return spec
    text = spec.text.replace("input: [3, 224, 224]", "input: [3, 64, 64]")
    return parse(text, name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")

    @functools.cache
    def save(name: str) -> Path:
        supernet = build_supernet(network_spec(name), num_classes=10, seed=0, resized=True).eval()
        randomize(supernet, 0)
        supernet.reduce(supernet.configure(PRUNED[name]))
        supernet.free_baseline()
        network, certificate = merge(supernet)
        path = folder / f"{name}.safetensors"
        save_network(path, network, supernet, certificate)
        return path

    return save


def batch_of(name: str, size: int) -> Tensor:
    return torch.randn(size, *network_spec(name).input, generator=torch.Generator().manual_seed(size))


def assert_equal_logits(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float(expected.std(dim=0, correction=0).max()) > 0 or len(expected) == 1
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written ---


def test_the_bound_is_the_one_that_is_promised():
    assert TOLERANCE == 1e-4


@pytest.mark.parametrize("name", [SMALL, *SLOW_IN_ONNX])
def test_onnx_is_standard_and_computes_the_same_at_any_batch(name, saved, tmp_path):
    out = tmp_path / "net.onnx"
    written = export(saved(name), out=out)
    assert (written.path, written.format, written.note) == (out, "onnx", "")
    assert written.error is not None and written.error <= TOLERANCE
    assert files(tmp_path) == ["net.onnx"], "weights are inside"
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    assert [opset.domain for opset in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["images"]
    assert [node.name for node in session.get_outputs()] == ["logits"]
    batch, *shape = session.get_inputs()[0].shape
    assert isinstance(batch, str), "a name, not a number"
    assert shape == list(network_spec(name).input)
    network = load(saved(name))
    for size in (1, 2, 5):
        images = batch_of(name, size)
        with torch.no_grad():
            expected = network(images)
        assert_equal_logits(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), expected)


@pytest.mark.parametrize("name", PRUNED)
def test_torch_export_computes_the_same_at_any_batch(name, saved, tmp_path):
    out = tmp_path / "net.pt2"
    written = export(saved(name), format="torch-export", out=out)
    assert written.error is not None and written.error <= TOLERANCE
    assert files(tmp_path) == ["net.pt2"]
    program = torch.export.load(out)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert [target for target in called if target.startswith("updp")] == []
    assert any(target.startswith("aten.conv2d") for target in called)
    network = load(saved(name))
    for size in (1, 2, 5):
        images = batch_of(name, size)
        with torch.no_grad():
            assert_equal_logits(program.module()(images), network(images))


def test_without_out_it_lies_beside_the_network(saved, tmp_path, capsys):
    path = Path(shutil.copy(saved(SMALL), tmp_path / "net.safetensors"))
    done = Caller(capsys)("export", path, "--format", "torch-export")
    assert done.status == 0, done
    assert files(tmp_path) == ["net.pt2", "net.safetensors"]
    assert str(tmp_path / "net.pt2") in done.out.replace("\n", "")


# --- what is refused ---


def refuses(path: Path, *told: str, **options: object) -> None:
    with pytest.raises(InputError) as caught:
        export(path, **options)
    assert [word for word in told if word not in str(caught.value)] == [], caught.value
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_only_networks_of_updp_are_exported(format, tmp_path):
    out = tmp_path / "out"
    foreign, broken = tmp_path / "foreign.safetensors", tmp_path / "broken.safetensors"
    save_file(nn.Linear(3, 2).state_dict(), foreign, {"format": "pt"})
    broken.write_bytes(foreign.read_bytes()[:20])
    refuses(foreign, str(foreign), "not a network saved by updp", format=format, out=out)
    refuses(broken, str(broken), "not a whole safetensors file", format=format, out=out)
    refuses(tmp_path, "is a folder", format=format, out=out)
    refuses(tmp_path / "none.safetensors", "no such file", format=format, out=out)
    assert files(tmp_path) == ["broken.safetensors", "foreign.safetensors"]


def test_what_is_not_merged_is_refused(tmp_path):
    """Weights of the stages before merging have timm's names, or the supernet's: neither is a network."""
    supernet = build_supernet(spec_of(SMALL), seed=0)
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in supernet.state_dict().items()}, path)
    refuses(path, "not a network saved by updp", out=tmp_path / "net.onnx")
    assert files(tmp_path) == ["weights.safetensors"]


def test_an_unknown_format_is_told_with_the_known_ones(saved, tmp_path):
    refuses(
        saved(SMALL),
        "got 'onxx'",
        "allowed: onnx, torch-export",
        "did you mean 'onnx'",
        format="onxx",
        out=tmp_path / "n",
    )
    assert files(tmp_path) == []


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_missing_folder_is_one_message(format, saved, tmp_path, capsys):
    out = tmp_path / "no" / "net.bin"
    Caller(capsys).refuses(
        "export", saved(SMALL), "--format", format, "--out", out, names=("net.bin", "there is no folder")
    )
    assert files(tmp_path) == []


def test_a_folder_is_not_overwritten(saved, tmp_path):
    out = tmp_path / "taken"
    out.mkdir()
    refuses(saved(SMALL), str(out), "cannot be written", format="torch-export", out=out)
    assert files(tmp_path) == ["taken"]
    assert files(out) == []


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs onnx and onnxscript: pip install 'updp\[export\]'"):
        export_network(nn.Conv2d(3, 4, 3), (3, 8, 8), tmp_path / "net.onnx", "onnx")
    assert files(tmp_path) == []


class TwoFaced(nn.Module):
    """Computes something else once exported."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        return y if torch.compiler.is_exporting() else 2 * y


def test_an_export_that_differs_is_not_written(tmp_path):
    out = tmp_path / "net.pt2"
    out.write_bytes(b"old")
    with pytest.raises(CertificateError, match="differs by"):
        export_network(TwoFaced(), (3, 8, 8), out, "torch-export")
    assert out.read_bytes() == b"old"
    assert files(tmp_path) == ["net.pt2"]
