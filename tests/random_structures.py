"""Random blocks with random flows and random recipes: what no network of timm has, drawn by hypothesis.

A block is a real module with submodules and a forward pass of its own; its flow goes through `bind`, its recipe
through `prune` and `merge_flow`. Only shapes are drawn: every value is filled by `updp.randomize`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import timm.layers
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from updp.layers import PaddedConv2d, conv_padding
from updp.randomize import randomize
from updp.spec import ArchSpec, Recipe
from updp.spec.language import Append, BlockGroup, Flow, ModelSource, Negate, Replace, Resize, Step, Sum
from updp.structure import BoundBlock, bind

WIDTHS = (1, 2, 4, 6)
KERNELS = ((3, 3), (3, 3), (3, 3), (2, 2), (4, 4), (5, 5), (1, 3), (3, 2))
STRIDES = ((1, 1),) * 5 + ((2, 2), (2, 2), (3, 3), (4, 4), (1, 2))
DILATIONS = ((1, 1),) * 3 + ((2, 2), (3, 3), (1, 2))
SMALLEST, LARGEST = 33, 225  # of a side of the input
MOST_STRIDE = 12  # of a whole block, so that something is left to look at
LAST = (nn.Linear, nn.LayerNorm, timm.layers.LayerScale)
Pair = tuple[int, int]


class RandomBlock(nn.Module):
    """Runs a flow on its own submodules, in its own way; channels stand first or last in its input."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.steps: Flow = ()
        self.unused = nn.Parameter(torch.ones(1))  # tells the dtype of a block that has no other

    def forward(self, x: Tensor) -> Tensor:
        if self.last:
            return self._flow(self.steps, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self._flow(self.steps, x)

    def _flow(self, flow: Flow, x: Tensor) -> Tensor:
        for node in flow:
            x = self._node(node, x)
        return x

    def _node(self, node: Any, x: Tensor) -> Tensor:
        if isinstance(node, Sum):
            return sum((self._flow(branch, x) for branch in node.branches[1:]), self._flow(node.branches[0], x))
        if isinstance(node, Negate):
            return -x
        part = getattr(self, node.path)
        if isinstance(part, nn.Parameter):
            return x * part[:, None, None]
        return part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if type(part) in LAST else part(x)


@dataclass(frozen=True)
class At:
    """A point of a flow: channels, the map of the smallest input, the stride so far."""

    channels: int
    size: Pair = (SMALLEST, SMALLEST)
    stride: Pair = (1, 1)


@dataclass(frozen=True)
class Example:
    """A block, a recipe, and the second input size at which the merged block must work."""

    block: BoundBlock
    recipe: Recipe
    other_size: Pair
    seed: int

    def __repr__(self) -> str:
        return f"Example({self.block.module}\n{self.block.flow.nodes}\n{self.recipe}\n{self.block.input_shape})"

    def input(self, other: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = list(self.block.input_shape)
        if other:
            first = 1 if self.block.flow.entry == "last" else 2
            shape[first : first + 2] = self.other_size
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def bind_block(
    block: RandomBlock,
    flow: Flow,
    recipe: Recipe,
    size: Pair,
    channels: int,
    other_size: Pair = (40, 37),
    seed: int = 0,
) -> Example:
    """Bind a block, its flow and its recipe, in float64, everything random; the batch is 1."""
    block.steps = flow
    model = nn.Sequential(randomize(block.double().eval(), seed))
    group = BlockGroup(("0",), (), "random", (recipe.name,))
    source = ModelSource("random", {})
    spec = ArchSpec("random", "", "random.yaml", "", source, (channels, *size), {"random": flow}, {}, (group,))
    bound = bind(spec, _Permuted(model) if block.last else model)["0"]
    bound.input_shape = (1, *bound.input_shape[1:])
    bound.output_shape = (1, *bound.output_shape[1:])
    return Example(bound, recipe, other_size, seed)


class _Permuted(nn.Sequential):
    """Gives its block an input with the channels last."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__(*model)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1))


@dataclass
class Builder:
    """Draws a flow, and the submodules that it names."""

    draw: st.DrawFn
    block: RandomBlock
    plain: bool = False  # one chain of affine steps with fixed paddings, which no merge may refuse
    same: bool = False  # every padding is SAME, as in the networks that have any
    bare: bool = False  # of a plain chain: nothing is padded behind a stride, rather than all so that the size stays
    kinds: dict[str, str] = field(default_factory=dict)  # step or named sum -> what it is
    flows: list[list[str]] = field(default_factory=list)  # the names along every flow, "" where there is none

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) < percent

    def step(self, kind: str, module: nn.Module | nn.Parameter) -> Step:
        name = f"{'gamma' if isinstance(module, nn.Parameter) else kind}{len(self.kinds)}"
        self.kinds[name] = kind
        setattr(self.block, name, module)
        return Step(name)

    # --- flows ---

    def flow(self, at: At, depth: int = 0, *, even: bool = False, most: int = 6) -> tuple[Flow, At]:
        """A chain of steps and sums. ``even``: only strides change the size, as the branches of a sum need it."""
        nodes: list[Any] = []
        kinds = ["conv"] * 6 + ["norm"] * 3 + ["act"] * 3 + ["scale", "other"] + ["sum"] * (4 - 2 * depth)
        for _ in range(self.draw(st.integers(min(4, most - 2), most))):
            kind = self.choose(*(k for k in kinds if k != "sum" or not self.plain))
            if kind == "conv":
                node, at = self.conv(at, even)
            elif kind == "sum":
                node, at = self.sum(at, depth + 1)
            else:
                node = getattr(self, kind)(at.channels)
            nodes.append(node)
        self.flows.append([getattr(node, "path", None) or getattr(node, "name", None) or "" for node in nodes])
        return tuple(nodes), at

    def sum(self, at: At, depth: int) -> tuple[Sum, At]:
        first, end = self.flow(at, depth, even=True, most=3)
        branches: list[Flow] = [first]
        if (end.channels, end.stride) == (at.channels, at.stride) and self.chance(75):
            branches.append(())
        if len(branches) == 1 or self.chance(20):
            branches.append(self.shortcut(at, end))
        if self.chance(30):
            branches.reverse()
        name = None
        if self.chance(50):
            name = f"sum{len(self.kinds)}"
            self.kinds[name] = "sum"
        return Sum(tuple(branches), name), end

    def shortcut(self, at: At, end: At) -> Flow:
        """A convolution to where the other branch ends, 1x1 mostly, and perhaps a norm."""
        stride = (end.stride[0] // at.stride[0], end.stride[1] // at.stride[1])
        kernel = self.choose((1, 1), (1, 1), (1, 1), (3, 3), (5, 5), (2, 2))
        conv = self.padded(at.channels, end.channels, kernel, stride, (1, 1), 1, at, even=True)
        return (conv, self.norm(end.channels)) if self.chance(50) else (conv,)

    # --- convolutions ---

    def conv(self, at: At, even: bool) -> tuple[Step, At]:
        style = self.choose("pointwise", "pointwise", "depthwise", "depthwise", "grouped", "dense", "linear")
        out = self.choose(*WIDTHS)
        if style == "linear":
            step = self.step("linear", nn.Linear(at.channels, out, bias=self.chance(70)))
            return step, At(out, at.size, at.stride)
        kernel = (1, 1) if style == "pointwise" else self.choose(*KERNELS)
        dilation = (1, 1) if style == "pointwise" else self.choose(*DILATIONS)
        stride = self.choose(*STRIDES)
        if max(s * t for s, t in zip(stride, at.stride, strict=True)) > MOST_STRIDE:
            stride = (1, 1)
        if self.bare and at.stride != (1, 1) and min(at.size) <= max(kernel) * max(dilation):
            kernel = (1, 1)
        groups = 1
        if style == "depthwise":
            out, groups = at.channels * self.choose(1, 1, 1, 2), at.channels
        elif style == "grouped" and at.channels % 2 == 0:
            out, groups = 2 * self.choose(1, 2, 3), 2
        step = self.padded(at.channels, out, kernel, stride, dilation, groups, at, even)
        conv = getattr(self.block, step.path)
        size = conv(torch.zeros(1, at.channels, *at.size)).shape[-2:]
        return step, At(out, (size[0], size[1]), (at.stride[0] * stride[0], at.stride[1] * stride[1]))

    def padded(
        self, inp: int, out: int, kernel: Pair, stride: Pair, dilation: Pair, groups: int, at: At, even: bool
    ) -> Step:
        """A convolution with one of the paddings that its place allows."""
        span = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        options = ["half"] * 5 + ["uneven"] * 2 + ["same"] * (not self.plain)
        options += ["torch"] * (stride == (1, 1)) + ["none"] * (span == [0, 0]) * 5
        if self.same and span != [0, 0]:
            options = ["same"]
        behind = at.stride != (1, 1)
        roomy = all(n > s + 6 for n, s in zip(at.size, span, strict=True))
        if roomy and not even and not self.same and not (self.plain and behind):
            options += ["none", "none", "any"]
        style = "none" if self.plain and self.bare and behind else self.choose(*options)
        common = {"stride": stride, "dilation": dilation, "groups": groups, "bias": self.chance(60)}
        if style == "same":
            conv: nn.Module = timm.layers.Conv2dSame(inp, out, kernel, **common)
        elif style in ("torch", "none"):
            conv = nn.Conv2d(inp, out, kernel, padding="same" if style == "torch" else 0, **common)
        else:
            conv = self.with_pads(inp, out, kernel, self.pads(style, span), common)
        return self.step("conv", conv)

    def pads(self, style: str, span: list[int]) -> tuple[int, int, int, int]:
        if style == "any":
            top, bottom, left, right = (self.draw(st.integers(0, 3)) for _ in range(4))
            return top, bottom, left, right
        before = [s // 2 if style == "half" else self.draw(st.integers(0, s)) for s in span]
        return before[0], span[0] - before[0], before[1], span[1] - before[1]

    def with_pads(
        self, inp: int, out: int, kernel: Pair, pads: tuple[int, int, int, int], common: dict[str, Any]
    ) -> nn.Module:
        """A plain convolution wherever that can say it."""
        if pads[0] == pads[1] and pads[2] == pads[3] and self.chance(80):
            return nn.Conv2d(inp, out, kernel, padding=(pads[0], pads[2]), **common)
        return PaddedConv2d(inp, out, kernel, pads=pads, tap_bias=False, **common)

    # --- everything else ---

    def norm(self, channels: int) -> Step:
        style = self.choose("batch", "batch", "batch", "plain", "act", "layer", "group", "last")
        if self.plain or style == "batch":
            return self.step("batchnorm", nn.BatchNorm2d(channels, eps=self.choose(1e-3, 1e-5)))
        if style == "plain":
            return self.step("batchnorm", nn.BatchNorm2d(channels, affine=False))
        if style == "act":
            step = self.step("normact", timm.layers.BatchNormAct2d(channels))
            self.kinds[f"{step.path}.act"] = "activation"
            return step
        module = {"layer": timm.layers.LayerNorm2d, "last": nn.LayerNorm}.get(style)
        return self.step("norm", nn.GroupNorm(1, channels) if module is None else module(channels))

    def act(self, channels: int) -> Step:
        return self.step("activation", self.choose(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish)())

    def scale(self, channels: int) -> Step | Negate:
        style = self.choose("bare", "first", "last", "negate")
        if style == "negate":
            return Negate()
        if style == "bare":
            return self.step("scale", nn.Parameter(torch.ones(channels)))
        kind = timm.layers.LayerScale2d if style == "first" else timm.layers.LayerScale
        return self.step("scale", kind(channels))

    def other(self, channels: int) -> Step:
        kind = self.choose(nn.Identity, nn.Dropout, timm.layers.DropPath)
        return self.step("identity", kind() if kind is nn.Identity else kind(0.3))


# --- recipes ---


def replacements(builder: Builder) -> Iterator[tuple[str, str]]:
    for name, kind in builder.kinds.items():
        if kind == "activation" and (builder.plain or builder.chance(85)):
            yield (
                name,
                builder.choose("identity", "identity", "identity", "batchnorm", *["relu6"] * (not builder.plain)),
            )
        elif kind == "norm" and builder.chance(85):
            yield name, builder.choose("batchnorm", "batchnorm", "identity")
        elif kind == "batchnorm" and builder.chance(10):
            yield name, "identity"


def resizes(builder: Builder) -> Iterator[tuple[str, Resize]]:
    for name, kind in builder.kinds.items():
        if kind != "conv" or not builder.chance(20):
            continue
        conv = getattr(builder.block, name)
        anything = not builder.plain and builder.chance(10)
        sizes = [k for k in range(1, min(conv.kernel_size)) if anything or _crops(conv, k)]
        if sizes:
            yield name, Resize(builder.choose(*sizes))


def _crops(conv: nn.Conv2d, size: int) -> bool:
    """Whether the padding of a convolution can shrink with its kernel on all four sides."""
    padding = conv_padding(conv)
    cut = [((k - size) // 2 * d, -(-(k - size) // 2) * d) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    return isinstance(padding, tuple) and all(p >= c for p, c in zip(padding, (*cut[0], *cut[1]), strict=True))


def merges(builder: Builder, replaced: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    """Up to two stretches of affine steps, each named by its ends or in full; they may overlap."""

    def mergeable(name: str) -> bool:
        kind = replaced.get(name) or builder.kinds.get(name, "")
        return kind in ("conv", "linear", "batchnorm", "scale", "identity", "sum")

    stretches: list[list[str]] = []
    for names in builder.flows:
        current: list[str] = []
        for name in [*names, ""]:
            if name and mergeable(name):
                current.append(name)
                continue
            operators = sum(builder.kinds[n] in ("conv", "linear", "sum") for n in current)
            stretches += [current] if len(current) > 1 and operators else []
            current = []
    found = []
    for _ in range(builder.draw(st.integers(0, 2)) if stretches else 0):
        names = builder.choose(*stretches)
        first = builder.draw(st.integers(0, len(names) - 2))
        last = builder.draw(st.integers(first + 1, len(names) - 1))
        found.append(tuple(names[first : last + 1]) if builder.chance(50) else (names[first], names[last]))
    return tuple(found)


@st.composite
def recipes(draw: st.DrawFn, builder: Builder) -> Recipe:
    replaced = dict(replacements(builder))
    append = [Append(tuple(draw(st.lists(st.sampled_from(["relu", "gelu", "batchnorm"]), min_size=1, max_size=2))))]
    if builder.kinds and not builder.plain and builder.chance(15):
        append.append(Append(("batchnorm",), after=builder.choose(*builder.kinds)))
    partial = not builder.plain and builder.chance(35)
    return Recipe(
        "random",
        {name: Replace(target) for name, target in replaced.items()},
        dict(resizes(builder)),
        tuple(append[draw(st.integers(0, 1)) :]) if builder.plain else tuple(append),
        merges(builder, replaced) if partial else "all",
        "keep" if not builder.plain and builder.chance(40) else "first",
        "reparam" if builder.plain or builder.chance(60) else "prune",
    )


SIDES = st.one_of(st.integers(SMALLEST, 64), st.integers(SMALLEST, 64), st.integers(SMALLEST, LARGEST))
SIZES = st.tuples(SIDES, SIDES)


@st.composite
def examples(draw: st.DrawFn, plain: bool = False) -> Example:
    block = RandomBlock(last=draw(st.integers(0, 4)) == 0)
    same = not plain and draw(st.integers(0, 3)) == 0
    builder = Builder(draw, block, plain, same, bare=plain and draw(st.booleans()))
    channels = draw(st.sampled_from(WIDTHS))
    flow, _ = builder.flow(At(channels), most=8 if plain else 6)
    block.last &= any(kind in ("conv", "linear", "batchnorm", "norm") for kind in builder.kinds.values())
    recipe = draw(recipes(builder))
    return bind_block(block, flow, recipe, draw(SIZES), channels, draw(SIZES), draw(st.integers(0, 2**20)))
