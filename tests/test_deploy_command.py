"""`updp deploy`: the plan beside the network, and every kind of bad input."""

import json

import pytest
import torch
from commands import Caller
from networks import random_model, spec_of

import updp
from updp.artefact import save_network
from updp.deployment import Plan, trial


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setenv("UPDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("updp.deployment.tune._SECONDS", 0.0)
    monkeypatch.setattr("updp.deployment.tune._ROUNDS", (1, 1))
    monkeypatch.setattr(trial, "_SECONDS", 0.01)


@pytest.fixture
def call(capsys):
    return Caller(capsys)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A merged network on disk."""
    spec = spec_of("convnext_digits")
    net = updp.build_supernet(spec, random_model(spec).float())
    net.set_subnet(net.all_pruned())
    merged, certificate = updp.merge(net)
    path = tmp_path_factory.mktemp("network") / "merged.safetensors"
    save_network(path, merged, net, certificate)
    return path


def test_the_plan_is_saved_and_can_be_followed(network, call, tmp_path):
    done = call("deploy", network, "--threads", 1)
    assert done.status == 0, done.err
    assert "stages.0.blocks.0.parts.merged_0" in done.out
    plan = network.with_suffix(".plan.json")
    assert f"plan: {plan}" in done.out
    choices = Plan.load(plan).choices
    followed = call("deploy", network, "--threads", 1, "--plan", plan, "--out", tmp_path / "again.json", "--json")
    found = json.loads(followed.out)
    assert [each["form"] for each in found["plan"]["choices"]] == [each.form for each in choices]
    assert found["error"] < 1e-5
    assert found["memory_after"]["weights"] > 0
    x = torch.randn(2, 3, 32, 32)
    assert updp.deploy(updp.load(network), x, plan=plan)(x).shape == (2, 1000)


def test_bad_requests(network, call, tmp_path):
    call.refuses("deploy", tmp_path / "none.safetensors", names=("none.safetensors",))
    (tmp_path / "plan.json").write_text("{}")
    call.refuses("deploy", network, "--plan", tmp_path / "plan.json", names=("plan.json", "not a plan"))
    call.refuses("deploy", network, "--out", tmp_path / "none" / "plan.json", names=("none",))
    assert call("deploy", network, "--batch", 0).status == 2
