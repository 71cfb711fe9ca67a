"""`updp bench`: what is timed was right before, what is missing is listed, and bad input is one message."""

import importlib.util
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from commands import SPEC, Caller

from updp import measure
from updp.bench import layers, networks, runtimes
from updp.bench.runtimes import RUNTIMES, Eager
from updp.deployment import tune
from updp.measure import Timing

QUICK = ("--runtimes", "torch,deployed,onnxruntime", "--seconds", "0")


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("UPDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runtimes, "_LOOK", 0.0)
    monkeypatch.setattr(tune, "_SECONDS", 0.0)
    return Caller(capsys)


@pytest.fixture
def clock(monkeypatch):
    """A clock on which everything takes a millisecond."""
    ticks = iter(range(0, 10**12, 10**6))
    monkeypatch.setattr(measure.time, "perf_counter_ns", lambda: next(ticks))


class Wrong(Eager):
    """Computes something else."""

    name, title, in_torch = "wrong", "wrong", False

    def logits(self, result):
        return result + 1e-2 * result.abs().max()


class Broken(Eager):
    """Cannot run it."""

    name, title = "broken", "broken"

    def prepare(self, subject, x, threads):
        raise NotImplementedError("no such operator\nand a long story")


def test_networks_in_every_runtime(call, clock, tmp_path):
    done = call("bench", SPEC, "--subnet", "all:full", "--batch", "1,2", *QUICK, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done
    (result,) = json.loads(done.out)
    assert json.loads((tmp_path / "out" / f"{SPEC}-all_full.json").read_text()) == result
    ElementTree.parse(tmp_path / "out" / f"{SPEC}-all_full.svg")
    assert (result["kind"], result["missing"], result["network"]["input"]) == ("networks", [], [3, 32, 32])
    assert result["network"]["macs"]["merged"] != result["network"]["macs"]["unpruned"]
    assert {"cpu", "cpus", "torch", "updp", "isa", "load", "packages", "native"} <= set(result["environment"])
    assert "onnxruntime" in result["environment"]["packages"]
    assert [(table["batch"], table["threads"]) for table in result["tables"]] == [(1, 1), (2, 1)]
    for table in result["tables"]:
        rows = {(row["runtime"], row["network"]): row for row in table["rows"]}
        assert set(rows) == {(r, n) for r in ("torch", "deployed", "onnxruntime") for n in ("unpruned", "merged")}
        for row in rows.values():
            assert (row["status"], row["precision"], row["reason"]) == ("ok", "float32", "")
            assert row["error"] < 1e-5
            assert Timing.from_dict(row["timing"]).median_ms == 1
        assert rows["deployed", "merged"]["memory"]["weights"] > 0
        assert {each["runtime"]: each["ratio"] for each in table["merging"]} == {r: 1 for r, _ in rows}
        assert all(each["other"] != each["runtime"] and each["ratio"] == 1 for each in table["against"])
        assert len(table["against"]) == 6


def test_what_is_shown(call, clock):
    done = call("bench", SPEC, *QUICK[:1], "torch,deployed", *QUICK[2:])
    assert done.status == 0, done
    assert [
        word for word in ("batch 1, 1 thread", "deployed", "unpruned", "1.00x", "load") if word not in done.out
    ] == []
    assert "merged" not in done.out.split("\nmerging: ")[0]
    assert "timing" in done.err


def test_a_saved_network(call, clock, tmp_path):
    net = tmp_path / "net.safetensors"
    subnet = tmp_path / "subnet.json"
    subnet.write_text(json.dumps({"version": 1, "spec": SPEC, "choices": {"stages.1.blocks.0": "full"}}))
    assert call("merge", SPEC, "--subnet", subnet, "--out", net).status == 0
    done = call("bench", net, "--runtimes", "torch", "--seconds", "0", "--json")
    (result,) = json.loads(done.out)
    assert (result["network"]["name"], result["network"]["weights"]) == ("net", "net.safetensors")
    assert [row["network"] for row in result["tables"][0]["rows"]] == ["unpruned", "merged"]
    call.refuses("bench", net, "--subnet", subnet, names=("--subnet", "merged already"))


def test_what_is_not_installed_is_listed(call, clock, monkeypatch):
    find = importlib.util.find_spec
    gone = {"onnxruntime", "ncnn"}
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name in gone else find(name))
    names = "torch,onnxruntime,ncnn"
    (result,) = json.loads(call("bench", SPEC, "--runtimes", names, "--seconds", "0", "--json").out)
    assert [(each["runtime"], each["packages"]) for each in result["missing"]] == [
        ("onnxruntime", "onnxruntime"), ("ncnn", "ncnn"),
    ]  # fmt: skip
    assert {row["runtime"] for row in result["tables"][0]["rows"]} == {"torch"}
    assert "pip install 'updp[bench]'" in call("bench", SPEC, "--runtimes", names, "--seconds", "0").out


def test_what_is_wrong_is_not_timed(call, clock, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "wrong", Wrong())
    monkeypatch.setitem(RUNTIMES, "broken", Broken())
    done = call("bench", SPEC, "--runtimes", "torch,wrong,broken", "--seconds", "0", "--json")
    assert done.status == 0
    rows = {row["runtime"]: row for row in json.loads(done.out)[0]["tables"][0]["rows"]}
    assert (rows["wrong"]["status"], rows["wrong"]["timing"]) == ("wrong", None)
    assert rows["wrong"]["error"] == pytest.approx(1e-2, rel=0.1)
    assert (rows["broken"]["status"], rows["broken"]["timing"]) == ("failed", None)
    assert rows["broken"]["reason"] == "NotImplementedError: no such operator"
    assert rows["torch"]["timing"]["median_ms"] == 1
    shown = call("bench", SPEC, "--runtimes", "torch,wrong,broken", "--seconds", "0").out
    assert "wrong, unpruned: differs from torch" in shown
    assert "no such operator" in shown


def test_threads_are_put_back_and_too_many_are_noted(call, clock, monkeypatch):
    monkeypatch.setattr(networks, "available_cpus", lambda: 1)
    before = torch.get_num_threads()
    done = call("bench", SPEC, "--runtimes", "torch", "--threads", "2,1", "--seconds", "0", "--json")
    assert "2 threads on 1 CPUs" in done.err
    assert [table["threads"] for table in json.loads(done.out)[0]["tables"]] == [2, 1]
    assert torch.get_num_threads() == before


def test_layers(call, clock, monkeypatch, tmp_path):
    for name, value in (("_SECONDS", 0.0), ("_MATRIX", 64), ("_ARRAYS", (1 << 12, 1 << 16))):
        monkeypatch.setattr(layers, name, value)
    arguments = ("bench", SPEC, "--subnet", "all:full", "--layers", "--seconds", "0")
    done = call(*arguments, "--out", tmp_path, "--json")
    assert done.status == 0, done
    (result,) = json.loads(done.out)
    ElementTree.parse(tmp_path / f"{SPEC}-all_full.layers.svg")
    assert result["roofline"]["gmacs"] > 0 and result["roofline"]["gbytes"] > 0
    found = {layer["problem"]: layer for layer in result["layers"]}
    dense = found["24x24x3x3 pad 1,1,1,1 gelu affine"]
    assert (dense["count"], dense["input"], dense["macs"]) == (2, "1x24x8x8", 24 * 24 * 9 * 64)
    assert sum(layer["macs"] * layer["count"] for layer in result["layers"]) == result["network"]["macs"]["merged"]
    for layer in result["layers"]:
        assert {"torch"} <= {row["form"] for row in layer["forms"]}
        assert all(row["status"] == "ok" and row["error"] < 1e-5 for row in layer["forms"])
        assert layer["torch"]["gmacs"] == pytest.approx(layer["macs"] / 1e6)  # in a millisecond
    shown = call(*arguments).out
    assert "GMAC/s" in shown and "24x24x3x3" in shown


@pytest.mark.parametrize(("arguments", "names"), [
    (("nothing_here",), ("nothing_here", "allowed")),
    (("nothing.safetensors",), ("nothing.safetensors",)),
    ((SPEC, "--subnet", "nope"), ("nope",)),
    ((SPEC, "--subnet", "all:nope"), ("nope", "pointwise, full")),
    ((SPEC, "--runtimes", "torch,onnx"), ("--runtimes", "onnxruntime")),
    ((SPEC, "--batch", "0"), ("--batch", "'0'")),
    ((SPEC, "--threads", "1,,2"), ("--threads", "1,,2")),
    ((SPEC, "--seconds", "-1"), ("--seconds", "-1")),
    ((SPEC, "--layers", "--batch", "1,8"), ("--layers",)),
    ((SPEC, "--out", "/dev/null/x"), ("--out",)),
])  # fmt: skip
def test_bad_input(call, arguments, names):
    call.refuses("bench", *arguments, names=names)


def test_every_peer_is_used_with_the_threads_it_is_given(call):
    with networks.opened(SPEC, "all:full") as case, runtimes.settled(1):
        subject = case.subjects["merged"]
        x = torch.randn(2, *case.input)
        expected = subject.module(x).detach()
        for name in ("onnxruntime", "openvino", "openvino-bf16", "ncnn"):
            runtime = RUNTIMES[name]
            if runtime.missing():
                continue
            got = runtime.logits(runtime.prepare(subject, x, 1)())
            assert got.shape == expected.shape
            assert (got - expected).abs().max() <= runtime.tolerance * expected.abs().max()
        folder = subject.folder
        assert (folder / "network.onnx").exists()
    assert not folder.exists()
