"""Deployed networks: what is folded and fused computes the same, in every form; plans and times are kept."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from networks import random_model, spec_of
from torch import nn

import updp
from updp import ops
from updp.certificate import relative
from updp.deployment import Plan, deploy, network
from updp.deployment.forms import Operands, Problem, build, forms_for
from updp.deployment.plan import Cache, cache_folder, here
from updp.deployment.programs import Lines
from updp.deployment.trial import Memory
from updp.errors import CertificateError, InputError
from updp.randomize import randomize

NATIVE = any(row.op == "conv" and row.available for row in ops.kernel_rows())


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    """Own cache, and no more rounds of measuring than it takes to have a figure."""
    monkeypatch.setenv("UPDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("updp.deployment.tune._SECONDS", 0.0)
    monkeypatch.setattr("updp.deployment.tune._ROUNDS", (1, 1))


def images(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(model, x, tolerance=1e-12, **more):
    """The deployed network, which computes what the model does."""
    deployed = deploy(model, x, cache=False, **more)
    with torch.no_grad():
        assert relative(deployed(x), model(x)) <= tolerance
    return deployed


def problems(deployed):
    return [each.problem for each in deployed.plan.choices]


def left(deployed, name):
    """How many operators of that name were left to torch."""
    nodes = deployed.graph_module.graph.nodes
    return sum(node.op == "call_function" and name in str(node.target) for node in nodes)


# --- what is folded, and into what ---


def conv(i, o, k=3, **more):
    return nn.Conv2d(i, o, k, **{"padding": k // 2, **more})


class Residual(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + x), as in a ResNet; or without the last activation, as in a MobileNetV2."""

    def __init__(self, active):
        super().__init__()
        self.body = nn.Sequential(
            conv(4, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True), conv(4, 4, bias=False), nn.BatchNorm2d(4)
        )
        self.active = active

    def forward(self, x):
        x = x + self.body(x)
        return F.relu(x, inplace=True) if self.active else x


class Turned(nn.Module):
    """A ConvNeXt block: depthwise, norm and linear layers on channels at the end, a scale, the input added."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.norm = conv(4, 4, 7, groups=4), nn.LayerNorm(4)
        self.one, self.two, self.gamma = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.rand(4))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.two(F.gelu(self.one(y))).permute(0, 3, 1, 2)
        return x + y * self.gamma.reshape(1, -1, 1, 1)


class Tokens(nn.Module):
    """A norm over tokens behind an activation, and a sum."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(4, 6, 4, 4), nn.BatchNorm1d(6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = F.silu(self.one(x))
        y = self.norm(y.reshape(-1, 6)).reshape(y.shape)
        return (x + self.two(y)).mean(1)


class Same(nn.Module):
    """Padding of its own, one zero more behind than in front."""

    def __init__(self, value=0.0):
        super().__init__()
        self.conv, self.value = nn.Conv2d(4, 5, 3, 2), value

    def forward(self, x):
        return F.hardswish(self.conv(F.pad(x, (0, 1, 1, 2), value=self.value)))


class Twice(nn.Module):
    """One convolution used twice, whose output is needed twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(4, 4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return F.relu(y) + self.norm(self.conv(y)) + y


class Border(nn.Module):
    """A bias that depends on the position, from ones of the input's size."""

    def __init__(self):
        super().__init__()
        self.conv, self.taps = conv(4, 5), nn.Parameter(torch.randn(5, 1, 3, 3))

    def forward(self, x):
        return F.relu(self.conv(x) + F.conv2d(torch.ones_like(x[:1, :1]), self.taps, padding=1))


class Attentive(nn.Module):
    """Tokens that attend to each other, the way that networks write it."""

    def __init__(self, way):
        super().__init__()
        self.embed, self.qkv, self.out, self.way = nn.Conv2d(4, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 8), way
        self.register_buffer("mask", torch.randn(15, 15))

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(-1, 15, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = getattr(self, self.way)(q, k, v).transpose(1, 2).reshape(-1, 15, 8)
        return self.out(y)

    def operator(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 * self.training)

    def own_scale(self, q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9], scale=0.3)

    def others(self, q, k, v):
        return F.scaled_dot_product_attention(k, q, v)

    def read_twice(self, q, k, v):
        y = F.scaled_dot_product_attention(q, k, v)
        return y + y.amax()

    def masked(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    def causal(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def products(self, q, k, v):
        return F.dropout(((0.25 * q) @ k.transpose(-2, -1)).softmax(dim=-1), 0.1, self.training) @ v

    def scaled_behind(self, q, k, v):
        return ((q @ k.transpose(-2, -1)) * 0.3).softmax(dim=-1) @ v

    def biased(self, q, k, v):
        return (q @ k.transpose(-2, -1) + self.mask).softmax(dim=-1) @ v

    def other_axis(self, q, k, v):
        return (q @ k.transpose(-2, -1)).softmax(dim=-2) @ v


ATTENTIONS = {
    "operator": "attention 2 heads 15x15 tokens 4x4 channels scale 0.5",
    "own_scale": "attention 2 heads 15x9 tokens 4x4 channels scale 0.3",
    "products": "attention 2 heads 15x15 tokens 4x4 channels scale 0.25",
    "scaled_behind": "attention 2 heads 15x15 tokens 4x4 channels scale 0.3",
    "others": "attention 2 heads 15x15 tokens 4x4 channels scale 0.5",
    "read_twice": "attention 2 heads 15x15 tokens 4x4 channels scale 0.5",
    "masked": None, "causal": None, "biased": None, "other_axis": None,
}  # fmt: skip


@pytest.mark.parametrize("way", ATTENTIONS)
def test_attention_is_one_piece_unless_it_is_masked(way):
    model, x = randomize(Attentive(way), 0).eval(), images(3, 4, 12, 20)
    deployed = same(copy.deepcopy(model).double(), x.double())
    layers = ["8x4x4x4 stride 4x4", "24x8", "8x8"]
    assert problems(deployed) == layers + [ATTENTIONS[way]] * (ATTENTIONS[way] is not None)
    if ATTENTIONS[way] is None:
        return
    assert deployed.plan.choices[-1].name == "attention"
    assert left(deployed, "matmul") == left(deployed, "softmax") == left(deployed, "scaled_dot") == 0
    views = sum(left(deployed, name) for name in ("permute", "unbind", "getitem"))
    assert (views == 0) == (way in ("operator", "products", "scaled_behind")), (
        "without views, where the parts are whole"
    )
    with torch.no_grad():
        other = images(5, 4, 12, 20, seed=1)
        assert relative(deployed(other.double()), model.double()(other.double())) <= 1e-12, "the batch size is free"


@pytest.mark.skipif(not NATIVE, reason="no native kernel runs here")
@pytest.mark.parametrize("way", ["operator", "own_scale"])  # with all of q, k and v in one, and with parts of them
def test_native_attention_in_a_network(way):
    model, x = randomize(Attentive(way), 0).eval(), images(3, 4, 12, 20)
    deployed = with_forms(model, x, "attention_")
    assert [each.form for each in deployed.plan.choices][-1].startswith("attention_tiled_f32")
    assert set(deployed.plan.choices[-1].times) == set()  # the plan said it
    with torch.no_grad():
        expected = deployed(x)
        assert relative(expected, model(x)) <= 1e-5
        torch.testing.assert_close(torch.compile(deployed, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(deployed, (x,)).module()(x), expected)
        assert torch.equal(copy.deepcopy(deployed)(x), expected)


def test_a_plan_from_before_attention_is_followed_for_the_rest(tmp_path):
    model, x = randomize(Attentive("operator"), 0).eval(), images(3, 4, 12, 20)
    plan = deploy(model, x, cache=False).plan
    assert Plan.load(_saved(plan, tmp_path)) == plan
    old = Plan(plan.environment, plan.choices[:-1], version=1)
    again = deploy(model, x, plan=_saved(old, tmp_path), cache=False).plan
    assert [each.times for each in again.choices[:-1]] == [{}] * 3
    assert "torch" in again.choices[-1].times or not NATIVE  # measured anew
    with pytest.raises(InputError, match="for attention it has nothing"):
        deploy(model, x, plan=dataclasses.replace(old, version=2), cache=False)


def _saved(plan, folder):
    plan.save(folder / "plan.json")
    return folder / "plan.json"


NORMED = ["4x1x7x7 pad 3,3,3,3 groups 4", "8x4 gelu", "4x8 add", "layer norm 4 channels eps 1e-05"]
MODULES = {
    "conv, norm, activation": (nn.Sequential(conv(4, 6), nn.BatchNorm2d(6), nn.ReLU()), ["6x4x3x3 pad 1,1,1,1 relu"]),
    "conv, activation, norm": (
        nn.Sequential(conv(4, 6), nn.GELU(), nn.BatchNorm2d(6)), ["6x4x3x3 pad 1,1,1,1 gelu affine"],
    ),
    "norm, unpadded conv": (
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), nn.SiLU()), ["6x2x3x3 groups 2 silu"],
    ),
    "norm between, folded forward": (
        nn.Sequential(conv(4, 6), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)),
        ["6x4x3x3 pad 1,1,1,1 relu", "2x6x1x1"],
    ),
    "another gelu": (nn.Sequential(conv(4, 6), nn.GELU(approximate="tanh")), ["6x4x3x3 pad 1,1,1,1"]),
    "dilation and stride": (
        nn.Sequential(conv(4, 6, padding=2, dilation=2, stride=(1, 2)), nn.ReLU6()),
        ["6x4x3x3 stride 1x2 pad 2,2,2,2 dilation 2x2 relu6"],
    ),
    "padding by name": (nn.Conv2d(4, 6, (2, 3), padding="same"), ["6x4x2x3 pad 0,1,1,1"]),
    "residual first": (Residual(True), ["4x4x3x3 pad 1,1,1,1 relu6", "4x4x3x3 pad 1,1,1,1 add relu"]),
    "residual last": (Residual(False), ["4x4x3x3 pad 1,1,1,1 relu6", "4x4x3x3 pad 1,1,1,1 add"]),
    "channels at the end": (Turned(), NORMED),
    "tokens": (Tokens(), ["6x4x4x4 stride 4x4", "6x6 silu", "6x6 add"]),
    "own padding": (Same(), ["5x4x3x3 stride 2x2 pad 1,0,2,1 hardswish"]),
    "padding that is no zero": (Same(1.0), ["5x4x3x3 stride 2x2 hardswish"]),
    "used twice": (Twice(), ["4x4x3x3 pad 1,1,1,1", "4x4x3x3 pad 1,1,1,1 add"]),
    "border": (Border(), ["5x4x3x3 pad 1,1,1,1 add relu"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_every_rule_computes_the_same(name):
    module, expected = MODULES[name]
    model = randomize(copy.deepcopy(module), 0).double().eval()
    deployed = same(model, images(3, 4, 12, 20, dtype=torch.float64))
    assert problems(deployed) == expected
    assert left(deployed, "batch_norm") == 0
    with torch.no_grad():
        other = images(5, 4, 12, 20, dtype=torch.float64, seed=1)
        assert relative(deployed(other), model(other)) <= 1e-12, "the batch size is free"


def test_a_norm_in_front_of_a_padded_convolution_stays():
    model = randomize(nn.Sequential(nn.BatchNorm2d(4), conv(4, 6)), 0).double().eval()
    assert left(same(model, images(2, 4, 9, 9, dtype=torch.float64)), "channel_affine") == 1


def test_layer_norms_give_their_weights_away():
    model = randomize(Turned(), 0).double().eval()
    deployed = same(model, images(2, 4, 9, 9, dtype=torch.float64))
    assert problems(deployed)[-1] == "layer norm 4 channels eps 1e-05"
    assert deployed.plan.choices[-1].name == "norm"
    assert left(deployed, "layer_norm") == 0


class Normed(nn.Module):
    """Norms with weights of their own: over the channels of a map, over tokens before a sum, over two dimensions."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.down = conv(4, 6), nn.LayerNorm(6, eps=1e-6), nn.Conv2d(6, 8, 3, 2, padding=1)
        self.no_bias, self.bare = nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False)
        self.two = nn.LayerNorm((12, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.down(x).flatten(2).transpose(1, 2)
        x = self.no_bias(x) + self.bare(x)
        return self.head(self.two(x)[:, 0])


NORMS = {
    "norm": "layer norm 6 channels eps 1e-06 weight bias",
    "no_bias": "layer norm 8 channels eps 1e-05 weight",
    "bare": "layer norm 8 channels eps 1e-05",
}


def norms(deployed):
    return {each.name: each for each in deployed.plan.choices if each.problem.startswith("layer norm")}


def test_layer_norms_are_pieces_of_their_own():
    model, x = randomize(Normed(), 0).double().eval(), images(3, 4, 6, 8, dtype=torch.float64)
    deployed = same(model, x)
    assert {name: each.problem for name, each in norms(deployed).items()} == NORMS
    assert left(deployed, "layer_norm") == 1  # the one over two dimensions
    with torch.no_grad():
        other = images(5, 4, 6, 8, dtype=torch.float64, seed=1)
        assert relative(deployed(other), model(other)) <= 1e-12, "the batch size is free"


@pytest.mark.skipif(not NATIVE, reason="no native kernel runs here")
def test_native_layer_norms_in_a_network():
    model, x = randomize(Normed(), 0).eval(), images(3, 4, 6, 8)
    deployed = with_forms(model, x, "layer_norm_")
    assert {each.form.partition("_f32")[0] for each in norms(deployed).values()} == {"layer_norm_rows"}
    with torch.no_grad():
        expected = deployed(x)
        assert relative(expected, model(x)) <= 1e-5
        assert relative(deployed(x[:1]), model(x[:1])) <= 1e-5
        torch.testing.assert_close(torch.compile(deployed, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(deployed, (x,)).module()(x), expected)
        assert torch.equal(copy.deepcopy(deployed)(x), expected)


@pytest.mark.skipif(not NATIVE, reason="no native kernel runs here")
def test_native_layer_norms_of_maps_copy_nothing():
    model, x = randomize(Normed(), 0).eval(), images(3, 4, 6, 8)
    deployed = with_forms(model, x, "layer_norm_")
    seen = {}
    for name in ("norm", "down"):
        piece = deployed.get_submodule(f"graph_module.fused.{name}")
        piece.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    with torch.inference_mode():
        deployed(x)
    assert seen["norm"][0].is_contiguous()
    assert seen["down"][0].data_ptr() == seen["norm"][1].data_ptr()
    assert seen["down"][0].is_contiguous(memory_format=torch.channels_last)


def test_a_plan_from_before_layer_norms_is_followed_for_the_rest(tmp_path):
    model, x = randomize(Normed(), 0).eval(), images(3, 4, 6, 8)
    plan = deploy(model, x, cache=False).plan
    rest = tuple(each for each in plan.choices if each.name not in NORMS)
    again = deploy(model, x, plan=_saved(Plan(plan.environment, rest, version=2), tmp_path), cache=False)
    assert all(not each.times for each in again.plan.choices if each.name not in NORMS)
    assert all("torch" in each.times for each in norms(again).values()) or not NATIVE  # measured anew
    with pytest.raises(InputError, match="for norm it has nothing"):
        deploy(model, x, plan=Plan(plan.environment, rest), cache=False)


# --- whole networks ---


def merged(name):
    spec = spec_of(name)
    net = updp.build_supernet(spec, random_model(spec))
    net.set_subnet(net.all_pruned())
    return updp.merge(net)[0].eval(), spec.input


@pytest.mark.parametrize("name", ["convnext_digits", "deit_digits", "tf_efficientnet_lite0"])
def test_merged_networks(name):
    model, (channels, height, width) = merged(name)
    size = (height, width) if name != "tf_efficientnet_lite0" else (65, 63)
    deployed = same(model.double(), images(2, channels, *size, dtype=torch.float64), 1e-10)
    assert left(deployed, "channel_affine") == 0
    same(model.float(), images(2, channels, *size), 1e-5)


def test_the_original_is_left_as_it_is():
    model = randomize(Residual(True), 0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deployed = deploy(model, images(2, 4, 8, 8), cache=False)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not deployed.training
    assert not deployed(images(2, 4, 8, 8)).requires_grad
    with pytest.raises(RuntimeError, match="for inference"):
        deployed.train()


@pytest.mark.skipif(not NATIVE, reason="no native convolution runs here")
def test_it_is_compiled_and_exported_and_copied():
    model, x = randomize(Residual(True), 0).eval(), images(2, 4, 8, 8)
    deployed = with_forms(model, x, "conv_")
    with torch.no_grad():
        expected = deployed(x)
        torch.testing.assert_close(torch.compile(deployed, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(deployed, (x,)).module()(x), expected)
        assert torch.equal(copy.deepcopy(deployed)(x), expected)


def with_forms(model, x, beginning):
    """Deployed by a plan that takes the first form of that beginning wherever there is one."""
    found = deploy(model, x, cache=False)
    choices = [
        dataclasses.replace(each, form=next((form for form in each.times if form.startswith(beginning)), each.form))
        for each in found.plan.choices
    ]
    plan = Plan(found.plan.environment, tuple(choices))
    deployed = deploy(model, x, plan=plan, cache=False)
    assert [each.form for each in deployed.plan.choices] == [each.form for each in choices]
    return deployed


# --- forms ---


@pytest.mark.parametrize("residual", ["none", "first", "last"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "gelu", "silu", "hardswish"])
@pytest.mark.parametrize("weight", [(6, 4, 3, 3), (6, 4), (6, 1, 5, 3)])
def test_all_forms_compute_the_same(weight, activation, scaled, residual):
    pads = (0, 0, 0, 0) if len(weight) == 2 else (1, 1, 1, 1)
    groups = 6 if weight[1] == 1 else 1
    problem = Problem(weight, (1, 1), pads, (1, 1), groups, activation, scaled, residual)
    shape = (2, 5, 4) if problem.is_linear else (2, weight[1] * groups, 7, 6)
    scale, shift = (images(6, seed=seed) if scaled else None for seed in (2, 3))
    operands = Operands(images(*weight), images(6, seed=1), scale, shift)
    arguments = [images(*shape, seed=4)]
    if residual != "none":
        arguments.append(images(*problem.out_shape(shape), seed=5))
    forms = forms_for(problem, shape, torch.float32, torch.device("cpu"))
    before = [each.clone() for each in arguments]
    expected, *others = (build(form, problem, operands)(*arguments) for form in forms)
    assert len(others) >= 1 + NATIVE
    for form, out in zip(forms[1:], others, strict=True):
        assert relative(out, expected) <= 2e-5, form
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True)), "nothing that is given is changed"


def test_packed_weights_are_kept_for_a_few_shapes():
    problem = Problem((6, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, "none", False, "none")
    assert "onednn" in forms_for(problem, (1, 4, 8, 8), torch.float32, torch.device("cpu"))
    form = build("onednn", problem, Operands(images(6, 4, 3, 3), None, None, None))
    plain = build("torch", problem, Operands(images(6, 4, 3, 3), None, None, None))
    for batch in range(1, 8):
        x = images(batch, 4, 8, 8)
        assert relative(form(x), plain(x)) <= 1e-5
        assert 1 <= len(form._packed) <= 4
    assert copy.deepcopy(form)(x).shape == (7, 6, 8, 8)


def test_other_precisions_are_torchs():
    problem = Problem((6, 4, 3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1, "none", False, "none")
    assert forms_for(problem, (1, 4, 8, 8), torch.bfloat16, torch.device("cpu")) == ["torch"]
    model = randomize(Residual(True), 0).eval().bfloat16()
    deployed = deploy(model, images(2, 4, 8, 8).bfloat16(), cache=False)
    assert {each.form for each in deployed.plan.choices} == {"torch"}


# --- runs of convolutions, strip by strip ---


class Early(nn.Module):
    """Large maps, as the first layers of a network have them, with a branch and a constant that is added."""

    def __init__(self):
        super().__init__()
        self.run = nn.Sequential(conv(3, 16), nn.ReLU6(), conv(16, 16, 1), nn.BatchNorm2d(16), conv(16, 8, stride=2))
        self.map = nn.Parameter(torch.randn(1, 8, 32, 33))
        self.left, self.right = conv(8, 4), conv(8, 4, 1)
        self.last = conv(4, 300, 1)

    def forward(self, x):
        x = (self.run(x) + self.map).relu()
        return self.last(self.left(x) + self.right(x))


@pytest.mark.skipif(not NATIVE, reason="no native convolution runs here")
def test_runs_with_large_maps_between_may_go_strip_by_strip():
    model, x = randomize(Early(), 0).eval(), images(2, 3, 64, 66)
    deployed = same(model, x, 1e-5)
    run = next(each for each in deployed.plan.choices if each.name == "run.0 to run.4")
    assert set(run.times) == {"apart", "strips"}
    assert run.input == (2, 3, 64, 66)
    # A map that has two readers ends a run; one that is small begins none.
    assert [each.name for each in deployed.plan.choices if " to " in each.name] == [run.name]
    for form in ("apart", "strips"):
        choices = tuple(dataclasses.replace(each, form=form) if each is run else each for each in deployed.plan.choices)
        followed = same(model, x, 1e-5, plan=Plan(deployed.plan.environment, choices))
        assert [each.form for each in followed.plan.choices if each.name == run.name] == [form]
        strips = [line for line in lines(followed) if len(line.forms) > 1]
        assert [len(line.forms) for line in strips] == ([3] if form == "strips" else [])
        with torch.no_grad():
            expected = followed(x)
            assert torch.equal(copy.deepcopy(followed)(x), expected)
            assert torch.equal(torch.export.export(followed, (x,)).module()(x), expected)
            assert relative(followed(x[:1]), model(x[:1])) <= 1e-5


def lines(deployed):
    """Of the programs that it calls."""
    return [line for module in deployed.modules() if isinstance(module, Lines) for line in module.lines]


@pytest.mark.skipif(not NATIVE, reason="no native convolution runs here")
def test_consecutive_native_convolutions_are_one_call():
    """A residual network: its shortcuts read maps from within the program."""
    layers = nn.Sequential(conv(3, 4), Residual(True), nn.MaxPool2d(2), conv(4, 4), Residual(False), conv(4, 5))
    model, x = randomize(layers, 0).eval(), images(2, 3, 12, 12)
    deployed = with_forms(model, x, "conv_")
    apart = {each.name for each in deployed.plan.choices}
    programs = [module for module in deployed.modules() if isinstance(module, Lines)]
    assert len(programs) == 2
    assert sum(len(program.parts) for program in programs) == len(apart)
    assert any(line.added is not None for line in lines(deployed))
    assert left(deployed, "conv") == 0
    with torch.no_grad():
        assert relative(deployed(x), model(x)) <= 1e-5
        assert relative(deployed(x[:1]), model(x[:1])) <= 1e-5
        assert torch.equal(copy.deepcopy(deployed)(x), deployed(x))


@pytest.mark.skipif(not NATIVE, reason="no native convolution runs here")
def test_memory_counts_the_maps_within_a_program():
    layers = nn.Sequential(conv(3, 8), conv(8, 16), conv(16, 4))
    x = images(2, 3, 12, 12)
    deployed = with_forms(randomize(layers, 0).eval(), x, "conv_")
    found = Memory.of(deployed, x.contiguous(memory_format=torch.channels_last))
    assert found.maps == 4 * 2 * 12 * 12 * (8 + 16 + 4)
    assert found.weights == sum(each.nbytes for each in deployed.buffers())


class Forked(nn.Module):
    """A map that is read from without in the middle, and one that two read."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(3, 8), conv(8, 8), conv(8, 8)

    def forward(self, x):
        middle = self.second(self.first(x))
        return self.third(middle), middle.softmax(1)


@pytest.mark.skipif(not NATIVE, reason="no native convolution runs here")
def test_a_map_that_others_read_ends_a_program():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.forked = Forked()

        def forward(self, x):
            left, right = self.forked(x)
            return left + right

    model, x = randomize(Both(), 0).eval(), images(2, 3, 12, 12)
    deployed = with_forms(model, x, "conv_")
    assert [len(module.parts) for module in deployed.modules() if isinstance(module, Lines)] == [2]
    with torch.no_grad():
        assert relative(deployed(x), model(x)) <= 1e-5


@pytest.mark.skipif(not NATIVE, reason="no native convolution runs here")
def test_runs_do_not_grow_over_large_weights_or_small_maps():
    layers = nn.Sequential(conv(3, 64), conv(64, 64), conv(64, 8, 1), conv(8, 8))
    deployed = same(randomize(layers, 0).eval(), images(1, 3, 40, 40), 1e-5)
    assert not [each.name for each in deployed.plan.choices if " to " in each.name]


# --- plans, and what was measured ---


def test_a_plan_is_saved_and_followed(tmp_path, monkeypatch):
    model, x = randomize(Residual(True), 0).eval(), images(2, 4, 8, 8)
    deployed = deploy(model, x)
    deployed.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == deployed.plan
    monkeypatch.setattr(network, "tune", lambda chains, *rest: iter(() if not chains else [1 / 0]))
    again = deploy(model, x, plan=tmp_path / "plan.json", cache=False)
    assert [each.form for each in again.plan.choices] == [each.form for each in deployed.plan.choices]


def test_what_was_measured_on_this_machine_is_not_measured_again(monkeypatch):
    model, x = randomize(Residual(True), 0).eval(), images(2, 4, 8, 8)
    first = deploy(model, x)
    assert list((cache_folder() / "plans").iterdir())
    monkeypatch.setattr(network, "tune", lambda chains, *rest: iter(() if not chains else [1 / 0]))
    assert deploy(model, x).plan == first.plan
    with pytest.raises(ZeroDivisionError):
        deploy(model, images(3, 4, 8, 8))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"environment": 1}', b"\xff"])
def test_a_damaged_cache_is_measured_anew(content):
    model, x = randomize(Residual(True), 0).eval(), images(2, 4, 8, 8)
    cache = Cache(here(x.dtype, x.device))
    cache.file.parent.mkdir(parents=True)
    cache.file.write_bytes(content)
    deploy(model, x)
    assert json.loads(cache.file.read_text())["entries"]


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UPDP_CACHE", str(tmp_path / "file"))
    deploy(randomize(Residual(True), 0).eval(), images(2, 4, 8, 8))


def test_a_plan_of_another_network_is_refused(tmp_path):
    plan = deploy(randomize(Residual(True), 0).eval(), images(2, 4, 8, 8), cache=False).plan
    with pytest.raises(InputError, match=r"of another network: for body\.0 it has .* relu6, the network 4x4x3x3 pad"):
        deploy(Named(), images(2, 4, 8, 8), plan=plan)
    for content in ("[]", "{", '{"version": 1}', '{"version": 1, "environment": {}, "choices": [{"name": 1}]}'):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(InputError, match=r"plan\.json"):
            Plan.load(tmp_path / "plan.json")


class Named(nn.Module):
    """Has a layer of the same name, that does something else."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(4, 4))

    def forward(self, x):
        return self.body(x)


@pytest.mark.skipif(not NATIVE, reason="no native convolution runs here")
def test_a_plan_from_a_machine_with_other_kernels_is_measured_where_it_cannot_be_followed():
    model, x = randomize(Residual(True), 0).eval(), images(2, 4, 8, 8)
    plan = deploy(model, x, cache=False).plan
    choices = tuple(dataclasses.replace(each, form="conv_direct_f32_neon") for each in plan.choices)
    deployed = deploy(model, x, plan=Plan(plan.environment, choices), cache=False)
    assert all(each.form in each.times for each in deployed.plan.choices)


# --- what cannot be done ---


def test_a_network_that_computes_something_else_is_not_handed_out(monkeypatch):
    monkeypatch.setattr(
        "updp.deployment.chains.activation_of", lambda node: "relu" if "relu" in str(node.target) else None
    )
    model = randomize(nn.Sequential(conv(4, 4), nn.ReLU()), 0).eval()
    deploy(model, images(2, 4, 8, 8), cache=False)
    monkeypatch.setattr(
        "updp.deployment.chains.activation_of", lambda node: "silu" if "relu" in str(node.target) else None
    )
    with pytest.raises(CertificateError, match="differs from the original"):
        deploy(model, images(2, 4, 8, 8), cache=False)


class Moody(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cannot_be_captured_is_told():
    with pytest.raises(InputError, match=r"Moody cannot be deployed: torch.export: "):
        deploy(Moody(), images(2, 4, 8, 8))
    with pytest.raises(InputError, match=r"example: got torch.int64 of shape \(2, 3\), need images"):
        deploy(Residual(True), torch.zeros(2, 3, dtype=torch.int64))
