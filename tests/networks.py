"""Blocks of real networks for the engine's tests: every spec, one block of every kind, in float64, all random."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from updp.affine import pads_of
from updp.layers import conv_padding, pad_map
from updp.merging import MergedBlock, Segment, claims_of, merge_flow, opaque_target
from updp.randomize import randomize
from updp.recipe import prune
from updp.spec import ArchSpec, Opaque, Recipe, list_specs, load_spec, parse_spec
from updp.structure import BoundBlock, bind, create_model

# Sizes that do not divide by the strides, not square; None where the network takes its own size only.
ODD_SIZES: dict[str, tuple[int, int, int] | None] = {
    "convnext_atto": (3, 97, 75),
    "convnext_base": (3, 97, 75),
    "convnext_digits": (3, 37, 45),
    "convnext_small": (3, 97, 75),
    "convnext_tiny": (3, 97, 75),
    "convnextv2_atto": (3, 97, 75),
    "deit_base_distilled_patch16_224": None,
    "deit_base_patch16_224": None,
    "deit_digits": None,
    "deit_small_distilled_patch16_224": None,
    "deit_small_patch16_224": None,
    "deit_tiny_distilled_patch16_224": None,
    "deit_tiny_patch16_224": None,
    "mobilenetv1_100": (3, 97, 75),
    "mobilenetv2_100": (3, 97, 75),
    "mobilenetv2_140": (3, 97, 75),
    "resnet101": (3, 97, 75),
    "resnet18": (3, 97, 75),
    "resnet34": (3, 97, 75),
    "resnet50": (3, 97, 75),
    "swin_base_patch4_window7_224": None,
    "swin_tiny_patch4_window7_224": None,
    "tf_efficientnet_lite0": (3, 97, 75),
    "tf_efficientnet_lite1": (3, 97, 75),
    "tf_efficientnet_lite2": (3, 97, 75),
    "tf_efficientnet_lite3": (3, 97, 75),
    "vgg11_bn": (3, 97, 75),
    "vgg13_bn": (3, 97, 75),
}

# The largest networks: their blocks differ from a smaller one's in widths and number only, so what is costly is left to
# the slow tests for them. `updp check` of every network is in the others.
SAME_BLOCKS_AS = {
    "convnext_base": "convnext_tiny",
    "convnext_small": "convnext_tiny",
    "deit_base_distilled_patch16_224": "deit_tiny_distilled_patch16_224",
    "deit_base_patch16_224": "deit_tiny_patch16_224",
    "resnet101": "resnet50",
    "swin_base_patch4_window7_224": "swin_tiny_patch4_window7_224",
    "vgg13_bn": "vgg11_bn",
}


@functools.cache
def spec_of(name: str) -> ArchSpec:
    return load_spec(name)


def parse(text: str, name: str = "toy") -> ArchSpec:
    """A spec written in a test."""
    return parse_spec(text, file=f"{name}.yaml", name=name)


@functools.lru_cache(maxsize=2)
def random_blocks(name: str, drop_path: float | None = None) -> dict[str, BoundBlock]:
    """The blocks of a shipped spec's network, float64, everything random. Copy before changing anything."""
    spec = spec_of(name)
    return bind(spec, random_model(spec, drop_path=drop_path))


def random_model(spec: ArchSpec, *, seed: int = 0, drop_path: float | None = None) -> nn.Module:
    """The spec's network in float64, eval mode, with every parameter and statistic random."""
    model = create_model(spec, seed=seed, drop_path=drop_path)
    return randomize(model.double().eval(), seed)


@dataclass(frozen=True)
class Case:
    """One kind of block of one spec under one recipe."""

    spec: str
    block: str
    recipe: str

    def __str__(self) -> str:
        return f"{self.spec}-{self.block}-{self.recipe}"


@functools.cache
def kinds(name: str) -> dict[str, tuple[str, ...]]:
    """One block of every kind of a spec, with its recipes; shapes only, nothing is computed."""
    return {block.name: block.group.recipes for block in first_blocks(name).values()}


def first_blocks(name: str) -> dict[str, BoundBlock]:
    """The first block of every kind, by signature, on the meta device."""
    spec = spec_of(name)
    with torch.device("meta"):
        bound = bind(spec, create_model(spec))
    first: dict[str, BoundBlock] = {}
    for block in bound.values():
        first.setdefault(block.signature(), block)
    return first


def kinds_but_widths(name: str) -> set[str]:
    """The kinds of blocks of a spec, with every module of theirs, whatever the widths and the size of the maps."""
    return {
        f"{block.group.structure} {block.group.recipes} {[_but_widths(module) for module in block.module.modules()]}"
        for block in first_blocks(name).values()
    }


def _but_widths(module: nn.Module) -> str:
    kept = ("kernel_size", "stride", "padding", "dilation", "eps")
    depthwise = getattr(module, "groups", 1) > 1
    return f"{type(module).__name__} {[getattr(module, name, None) for name in kept]} {depthwise}"


def all_cases() -> list[Case]:
    """Every spec found by listing, every kind of block, every recipe."""
    return [
        Case(name, block, recipe)
        for name in list_specs()
        for block, recipes in kinds(name).items()
        for recipe in recipes
    ]


def marks(spec: str) -> list[pytest.MarkDecorator]:
    """What is costly is slow for a spec whose blocks another one has."""
    return [pytest.mark.slow] if spec in SAME_BLOCKS_AS else []


def merge_block(block: BoundBlock, recipe: Recipe, *, seed: int = 1) -> MergedBlock:
    """Prune and merge a copy of one block, in float64 with all parts random, norms of the pruned flow included."""
    source = copy.deepcopy(prune(block, recipe, resized=True)).double().eval()
    randomize(source, seed)
    merged, segments = merge_flow(source, block.channels[0], claims_of(block))
    return MergedBlock(block.name, source, merged, segments)


def merge_case(case: Case) -> tuple[BoundBlock, MergedBlock]:
    block = random_blocks(case.spec)[case.block]
    return block, merge_block(block, spec_of(case.spec).recipes[case.recipe])


def random_input(block: BoundBlock, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(block.input_shape, generator=generator, dtype=torch.float64)


def merged_ops(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Every segment that was merged or folded, in branches too."""
    for segment in segments:
        if segment.name is not None:
            yield segment
        for branch in segment.branches:
            yield from merged_ops(branch)


@dataclass(frozen=True)
class MergedTensor:
    """A tensor that merging wrote, of one operator."""

    op: str
    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name).detach()

    def visible(self, height: int, width: int) -> Tensor:
        """The elements that can change an output, as a mask.

        Not a tap that lies on padding wherever the convolution stands, and not the biases of an attention's keys,
        which the softmax takes out again.
        """
        mask = torch.ones_like(self.tensor, dtype=torch.bool)
        if isinstance(self.module, nn.Conv2d) and self.name != "bias":
            conv = self.module
            pads = conv_padding(conv)
            assert pads is not None
            ones = pad_map(torch.ones(1, 1, height, width), pads_of(pads, height, width))
            seen = F.unfold(ones, conv.kernel_size, conv.dilation, 0, conv.stride).amax(dim=(0, 2)) > 0
            mask &= seen.reshape(conv.kernel_size)
        if self.op.startswith("fold.") and self.name == "bias":
            queries_and_values = torch.tensor([True, False, True]).repeat_interleave(mask.numel() // 3)
            mask &= queries_and_values
        return mask


def merged_tensors(block: MergedBlock, claims: dict[str, Opaque]) -> Iterator[MergedTensor]:
    """Everything that merging wrote."""
    for segment in merged_ops(block.segments):
        assert segment.name is not None
        step = segment.name.removeprefix("fold.")
        modules = [block.merged.part(step)]
        if step != segment.name:
            at = segment.source.index(segment.merged[0])
            paths = claims[step].enters * (at > 0) + claims[step].leaves * (at < len(segment.source) - 1)
            modules = [opaque_target(modules[0], step, path) for path in paths]
        for module in modules:
            for name, _ in module.named_parameters():
                yield MergedTensor(segment.name, module, name)
