"""The comparison of pruning without training: resumable, to be read at equal latency, the same blocks for all."""

import importlib.util
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from networks import spec_of
from torch import nn

from updp.artefact import save_tensors
from updp.randomize import randomize
from updp.spec import parse_spec
from updp.structure import create_model
from updp.subnet import SubnetConfig, list_subnets

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cifar_resnet"
SPEC = """version: 1
include: families/resnet_basic.yaml
model: {python: cifar_resnet:cifar_resnet, blocks: 2, width: 4}
input: [3, 16, 16]
data: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop_pct: 1, interpolation: bilinear}
blocks:
  - {match: [layer2.0, layer3.0], structure: downsample, recipes: [full]}
  - {match: "layer*.*", except: [layer2.0, layer3.0], structure: plain, recipes: [full]}
"""


@pytest.fixture
def study(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield importlib.import_module("calibration")
    for name in ("calibration", "calibration_page", "cifar_resnet"):
        sys.modules.pop(name, None)


@pytest.fixture
def words(study, tmp_path, monkeypatch):
    import updp

    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(SPEC)
    with updp.allow_modules("cifar_resnet"):
        model = create_model(updp.load_spec("toy.yaml"), seed=0)
    save_tensors("weights.safetensors", randomize(model, 0).state_dict())
    return ["toy.yaml", "--weights", "weights.safetensors", "--data", "digits", "--images", "40", "--half", "even",
            "--allow-module", "cifar_resnet", "--seconds", "0.1", "--out", "out", "--ks"]  # fmt: skip


def read(name="toy.json"):
    return json.loads(Path("out", name).read_text())


def test_the_comparison(study, words, monkeypatch, capsys):
    assert study.main([*words, "2"]) == 0, capsys.readouterr()
    first = read()
    rows = first["points"]["2"]["rows"]
    assert set(rows) == set(study.METHODS)
    assert len(first["points"]["2"]["choices"]) == 2
    assert first["baseline"]["images"] == 180
    assert (first["baseline"]["depth"], rows["full"]["depth"]) == (14, 12)
    assert rows["drop"]["depth"] in (10, 11)  # the shortcut of a block between stages is a convolution
    assert len({(row["macs"], row["depth"]) for method, row in rows.items() if method != "drop"}) == 1
    assert all(row["latency"]["low"] <= row["latency"]["high"] for row in rows.values())
    assert rows["full"]["latency"] == rows["linear"]["latency"] == rows["removal"]["latency"] != rows["drop"]["latency"]
    assert str(Path.cwd()) not in json.dumps(first)

    made = []
    monkeypatch.setattr(study.Study, "calibration", lambda self, k: made.append(k))
    assert study.main([*words, "2"]) == 0
    assert study.main([*words, "2", "--latency-only"]) == 0
    assert made == []  # nothing was worked out again
    again = read()
    for result in (first, again):
        for row in (*result["points"]["2"]["rows"].values(), result["baseline"], result):
            row.pop("latency")
    assert again == first
    page = Path("out/toy.md").read_text()
    assert page.count("| 2 |") == len(rows) + 1
    ElementTree.parse("out/toy.svg")
    assert study.main([*words, "2", "--images", "50"]) == 2
    assert "is of another study" in capsys.readouterr().err


def test_equal_latency_is_read_off_straight_lines():
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "calibration_page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    points = [(1.0, 80.0), (0.8, 70.0), (0.6, 40.0)]
    assert page.top1_at(points, 0.9) == pytest.approx(75)
    assert page.top1_at(points, 0.7) == pytest.approx(55)
    assert page.top1_at(points, 0.5) is None


def test_a_dropped_block_is_its_shortcut_or_a_fitted_convolution(study):
    spec = spec_of("resnet18")
    model = create_model(spec, seed=0).eval()
    downsample = model.layer2[0].downsample
    network, fitted = study.dropped(
        model, spec, SubnetConfig("resnet18", {"layer1.1": "full", "layer2.0": "full"}), None
    )
    assert fitted == []
    x = torch.randn(1, 64, 8, 8)
    assert network.layer1[1](x) is x
    with torch.no_grad():
        assert network.layer2[0](x).equal(downsample(x).relu())

    class Halving(nn.Module):
        """Affine, so that the fit is exact."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1, stride=2)

        def forward(self, x):
            return self.conv(x)

    net = nn.Sequential(Halving())
    conv = nn.Conv2d(3, 5, 1, stride=2)
    study._fit(net, {"0": conv}, [torch.randn(4, 3, 7, 7) for _ in range(2)])
    assert torch.allclose(conv.weight, net[0].conv.weight, atol=1e-4)
    assert torch.allclose(conv.bias, net[0].conv.bias, atol=1e-4)


def test_what_cannot_be_dropped_is_said(study):
    text = spec_of("mobilenetv2_100").text
    spec = parse_spec(text, file="s", name="s")
    model = create_model(spec, seed=0)
    block = next(name for name in ("blocks.1.0",) if model.get_submodule(name))
    network, fitted = study.dropped(model, spec, SubnetConfig("s", {block: next(iter(spec.recipes))}), None)
    assert fitted == [block]
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


# --- performance ---


@pytest.fixture
def performance(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("performance")
    for name in ("performance", "performance_page"):
        sys.modules.pop(name, None)


def test_the_page_of_performance_is_what_the_files_give(performance):
    assert performance.PAGE.read_text() == performance.performance_page.page(performance.RESULTS)


def test_performance_measures_every_network_once(performance, monkeypatch, tmp_path, capsys):
    shipped = len(list_subnets())
    parts = {part: list(performance.jobs(part, tmp_path, 1.0)) for part in performance.PARTS}
    assert {part: len(found) for part, found in parts.items()} == {
        "runtimes": 5, "papers": shipped, "layers": 2 * (shipped + 1),
    }  # fmt: skip
    assert len({job.file for found in parts.values() for job in found}) == 5 + shipped + 2 * (shipped + 1)
    names = {job.file.stem for job in parts["papers"]}
    assert set(performance.performance_page.PUBLISHED) <= names

    def made(command, **options):
        """As a table of results, without measuring."""
        assert command[1:3] == ["-m", "updp"]
        made.calls.append(command)
        spec, subnet, folder = command[4], command[6], Path(command[-1])
        layers = "--layers" in command
        name = f"{spec}-{subnet.replace(':', '_')}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}{'.layers' * layers}.json").write_text(json.dumps(fake_result(name, layers)))
        return subprocess.CompletedProcess(command, 0)

    made.calls = []
    monkeypatch.setattr(performance.subprocess, "run", made)
    assert performance.main(["--out", str(tmp_path)]) == 0
    assert len(made.calls) == 5 + shipped + 2 * (shipped + 1)
    text = (tmp_path / "performance.md").read_text()
    assert "| resnet34 updp_p10 | 8 | 1 | 9.00 (18.0) | **6.00 (12.0)** | **1.50** (1.40 to 1.60; torch) |" in text
    assert "| resnet34 updp_p10 | 8 | 9.0 | 6.0 | 18.0 | 12.0 |" in text
    assert "| resnet34 updp_p10 | 1.43 (table 1) | 1.50 | 2.00 | 2.00 |" in text
    assert "| resnet34 updp_p10 | 1 | 1 of 1 | 2.50 (1) | 2.50 | 99 |".replace("99 |", "99, 150 %") in text
    assert performance.main(["--out", str(tmp_path)]) == 0
    assert len(made.calls) == 5 + shipped + 2 * (shipped + 1)  # nothing twice


def fake_result(name, layers):
    spec, _, subnet = name.partition("-")
    env = {"cpu": "a CPU", "cpus": 2, "isa": ["avx2"], "updp": "1", "python": "3", "torch": "2", "packages": {}}
    network = {"name": name, "spec": spec, "subnet": subnet, "macs": {"unpruned": 3, "merged": 2}}
    if layers:
        layer = {"problem": "8x8x3x3 pad 1,1,1,1", "against_torch": {"ratio": 2.5}, "native": {"of_roofline": 1.5}}
        return {"environment": env, "network": network, "roofline": {"gmacs": 99.0}, "layers": [layer]}
    rows = [
        {
            "runtime": runtime, "network": which, "status": "ok", "reason": "", "timing": {"median_ms": ms * factor},
            "memory": {"weights": 1e6 * ms, "maps": 2e6 * ms},
        }
        for runtime, ms in (("torch", 9.0), ("deployed", 6.0)) for which, factor in (("unpruned", 2), ("merged", 1))
    ]  # fmt: skip
    ratio = {"ratio": 1.5, "low": 1.4, "high": 1.6}
    against = [{"runtime": "deployed", "network": "merged", "other": "torch", **ratio}]
    merging = [{"runtime": runtime, "ratio": 2.0} for runtime in ("torch", "deployed")]
    table = {"batch": 8, "threads": 1, "rows": rows, "against": against, "merging": merging}
    return {"environment": env, "network": network, "missing": [], "tables": [table]}
