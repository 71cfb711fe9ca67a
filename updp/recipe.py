"""A structure and a recipe become a pruned flow: what is replaced, resized, appended, and which parts merge.

The pruned flow shares the baseline's convolutions and linear layers. Every norm in it is its own copy, because it
sees other inputs; appended layers and resized weights are new.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp.composing import affine_of, module_of
from updp.errors import Place, Problem, SpecError, suggest
from updp.flow import Call, FlowModule, Node, Nodes, Parallel, Run, children, rebuild, walk
from updp.kinds import kind_of, out_channels_of
from updp.layers import BatchNorm, Layout, conv_padding
from updp.padding import Geometry, crop_conv, move_padding
from updp.runs import chain
from updp.spec import Recipe, Resize
from updp.structure import BoundBlock, channels_of
from updp.widths import MISFITS, misfit, widths_of

_SHAPE_PRESERVING = ("norm", "norm_act", "batchnorm", "activation", "scale", "drop", "identity", "negate")
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}


class PrunedFlow(FlowModule):
    """The flow of one pruned block under one recipe: trainable, and ready to be merged.

    `resize` makes the kernel changes that are due; everything else is as in `FlowModule`. Where the recipe composes at
    the start, every run is one operator from the beginning: ``composed`` has what each stands for.
    """

    def __init__(self, draft: _Draft, recipe: Recipe) -> None:
        super().__init__((), {}, draft.entry, draft.extras)
        self.recipe = recipe
        self.appended = tuple(draft.appended)
        self.composed: dict[str, Nodes] = {}
        self._shared = draft.shared
        self._chained = draft.nodes
        self._geometry = draft.geometry
        self._pending = dict(draft.pending)
        self._lay_out(draft.parts)
        self.train(draft.training)

    def _lay_out(self, parts: Mapping[str, nn.Module]) -> None:
        """Move padding to the front of every run and stride to its end, and wire the result."""
        parts = dict(parts)
        nodes = self._chained
        if self.recipe.padding == "first":
            nodes = move_padding(nodes, parts, self._geometry)
        if self.recipe.compose == "start":
            nodes = self._compose(nodes, parts)
        self.rewire(nodes, parts)

    def _compose(self, nodes: Nodes, parts: dict[str, nn.Module]) -> Nodes:
        """The one operator that each run merges to, in its place: a new parameter, always with a bias."""
        out: list[Node] = []
        for node in nodes:
            if not isinstance(node, Run):
                out.append(rebuild(node, lambda flow: self._compose(flow, parts)))
                continue
            name = f"composed.{len(self.composed)}"
            known = (channels_of(parts[n.name]) for n in walk(node.flow) if isinstance(n, Call))
            operator = module_of(affine_of(node.flow, parts, next(filter(None, known), 0)), node.flow, parts)
            if getattr(operator, "bias", None) is None:
                weight = operator.weight
                assert isinstance(weight, nn.Parameter)
                operator.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))
            self.composed[name] = node.flow
            parts[name] = operator
            out.append(Call(name))
        return tuple(out)

    def norms(self) -> Iterator[nn.Module]:
        """The batch norms whose statistics belong to this flow."""
        for name, part in self.named_parts.items():
            if isinstance(part, _BatchNorm) and name not in self._shared:
                yield part

    def owns(self, step: str) -> bool:
        """Whether a part is this flow's alone, so that the baseline does not change with it."""
        return step not in self._shared

    @property
    def pending(self) -> dict[str, Resize]:
        """Kernel changes still to come."""
        return dict(self._pending)

    def resize(self, progress: float, epochs: int = 0) -> list[str]:
        """Make the kernel changes whose moment has come (UPDP: 3x3 -> its centre tap at epoch 100 of 150).

        Args:
            progress: position in finetuning, 0..1.
            epochs: its length, for moments given as an epoch.

        Returns:
            The steps whose weights were replaced; the optimizer must be told.
        """
        due = [step for step, change in self._pending.items() if change.at.progress(epochs) <= progress]
        if not due:
            return []
        parts = self.named_parts
        for step in due:
            change = self._pending.pop(step)
            conv = parts[step]
            assert isinstance(conv, nn.Conv2d)
            self._geometry[step] = crop_conv(parts, step, conv, self._geometry[step], change.kernel)
        self._lay_out(parts)
        return due


def prune(block: BoundBlock, recipe: Recipe, *, resized: bool = False) -> PrunedFlow:
    """Build the pruned flow of a block.

    Args:
        resized: make every kernel change now, whatever its moment: the final shape.

    Raises:
        SpecError: the recipe names a step that this block does not have, or asks for what does not fit.
        MergeError: a run that the recipe merges cannot be composed exactly.
    """
    draft = _Draft(block, recipe)
    draft.split_norm_acts()
    draft.own_norms()
    draft.replace_steps()
    draft.append_layers()
    draft.chain_runs()
    draft.resize_now(all_of_them=resized or recipe.compose == "start")
    flow = PrunedFlow(draft, recipe)
    draft.check_fit(flow)
    return flow


class _Draft:
    """A flow under construction: nodes, parts, and what the recipe touched."""

    def __init__(self, block: BoundBlock, recipe: Recipe) -> None:
        self.block, self.recipe = block, recipe
        self.nodes: Nodes = block.flow.nodes
        self.parts: dict[str, nn.Module] = dict(block.flow.named_parts)
        self.shared = set(self.parts)
        self.entry: Layout = block.flow.entry
        self.extras = dict(block.flow.extras)
        self.training = block.flow.training
        self.touched: set[str] = set()
        self.appended: list[str] = []
        self.pending: dict[str, Resize] = {}
        self.geometry: dict[str, Geometry] = {}
        self.doubtful: list[tuple[str, Place | None]] = []  # changes that may not fit what stands around them
        self._widths: dict[str, tuple[int, int]] | None = None
        example = next((p for p in block.module.parameters()), torch.zeros(()))
        self.factory: dict[str, Any] = {"device": example.device, "dtype": example.dtype}
        for name, part in self.parts.items():
            if kind_of(part).name == "conv":
                assert isinstance(part, nn.Conv2d)
                padding = conv_padding(part)
                assert padding is not None
                self.geometry[name] = Geometry((part.stride[0], part.stride[1]), padding)

    def problem(self, place: Place | None, message: str) -> SpecError:
        return SpecError([Problem(place, f"recipes.{self.recipe.name}", f"block {self.block.name}: {message}")])

    def split_norm_acts(self) -> None:
        """`BatchNormAct2d` becomes a norm, its dropout and its activation, so that each can be replaced."""

        def split(nodes: Nodes) -> Nodes:
            out: list[Node] = []
            for node in nodes:
                out.append(rebuild(node, split))
                if isinstance(node, Call) and kind_of(self.parts[node.name]).name == "norm_act":
                    for inner in ("drop", "act"):
                        module = getattr(self.parts[node.name], inner)
                        self.parts[f"{node.name}.{inner}"] = module
                        self.shared.add(f"{node.name}.{inner}")
                        out.append(Call(f"{node.name}.{inner}"))
            return tuple(out)

        self.nodes = split(self.nodes)

    def own_norms(self) -> None:
        """Copies of every norm: weights start from the baseline's, statistics are this flow's own."""
        for name, part in list(self.parts.items()):
            kind = kind_of(part).name
            if kind in ("batchnorm", "norm_act"):
                assert isinstance(part, _BatchNorm)
                self.own(name, _copy_batchnorm(part))
            elif kind == "norm":
                self.own(name, copy.deepcopy(part))

    def own(self, name: str, module: nn.Module) -> None:
        module.train(self.training)
        self.parts[name] = module
        self.shared.discard(name)

    def replace_steps(self) -> None:
        for name, change in self.recipe.replace.items():
            if name not in self.parts:
                if self._is_optional(name):
                    continue
                raise self.problem(change.place, f"replace: {suggest(name, self.parts)}")
            old = self.parts[name]
            if kind_of(old).name not in _SHAPE_PRESERVING:
                self.doubtful.append((f"replace: {name}", change.place))
            if change.target == "batchnorm":
                self._refuse_hidden_activation(name, old, change.place)
                self.own(name, self.new_batchnorm(self.channels_at(name), old))
            else:
                self.own(name, _new_layer(change.target))
            self.geometry.pop(name, None)
            self.extras.pop(name, None)
            self.touched.add(name)

    def _refuse_hidden_activation(self, name: str, old: nn.Module, place: Place | None) -> None:
        """A norm with an activation inside that cannot be split off: a batch norm in its place would drop it."""
        inside = getattr(old, "act", None)
        if kind_of(old).name == "norm" and isinstance(inside, nn.Module) and not isinstance(inside, nn.Identity):
            message = (
                f"{type(old).__name__} is a norm and {type(inside).__name__} in one, which a batch norm would drop"
            )
            raise self.problem(place, f"replace: {name}: {message}")

    def _is_optional(self, name: str) -> bool:
        return name in self.block.optional or name.rsplit(".", 1)[0] in self.block.optional

    def widths(self) -> dict[str, tuple[int, int]]:
        """Input and output channels of every step of the block's own flow, from one run of it."""
        if self._widths is None:
            try:
                self._widths = widths_of(self.block.flow, self.example_input())
            except MISFITS:
                raise self._misfit() from None
        return self._widths

    def _misfit(self) -> SpecError:
        """The structure does not fit the network: nothing can be told of its steps."""
        where, found = f"structures.{self.block.group.structure}", misfit(self.block.flow, self.example_input())
        return SpecError([Problem(self.block.place_of(), where, f"block {self.block.name}: {found}")])

    def channels_at(self, name: str) -> int:
        """Channels of the input of a step; a piece of a split norm has those of the norm."""
        widths = self.widths()
        return (widths.get(name) or widths.get(name.rsplit(".", 1)[0], (0, 0)))[0]

    def example_input(self) -> Tensor:
        return torch.zeros(self.block.input_shape, **self.factory)

    def new_batchnorm(self, channels: int, old: nn.Module | None = None) -> BatchNorm:
        """A fresh batch norm; one that takes another norm's place keeps that norm's weight and bias."""
        norm = BatchNorm(channels, **self.factory)
        if old is not None and kind_of(old).name in ("norm", "batchnorm", "norm_act"):
            for name in ("weight", "bias"):
                if (value := getattr(old, name, None)) is not None:
                    getattr(norm, name).data.copy_(value.data)
        return norm

    def append_layers(self) -> None:
        for item in self.recipe.append:
            calls = []
            for layer in item.layers:
                name = f"append.{len(self.appended)}"
                module = self.new_batchnorm(self.block.channels[1]) if layer == "batchnorm" else _new_layer(layer)
                if layer == "batchnorm" and item.after is not None:
                    module = self.new_batchnorm(self._channels_after(item.after, item.place))
                    self.doubtful.append((f"append after {item.after}", item.place))
                self.own(name, module)
                self.appended.append(name)
                calls.append(Call(name))
            self.nodes = self._insert(item.after, tuple(calls), item.place)

    def _channels_after(self, step: str, place: Place | None) -> int:
        """Output channels of a step or sum; of one that is new, told by what stands before it."""
        old = self.block.flow.named_parts.keys() - self.recipe.replace.keys()
        found: list[int] = []

        def follow(nodes: Nodes, width: int) -> int:
            for node in nodes:
                if isinstance(node, Call):
                    known = self.widths()[node.name][1] if node.name in old else out_channels_of(self.parts[node.name])
                    width = known or width
                elif ends := [follow(flow, width) for flow in children(node)]:
                    width = max(ends) if isinstance(node, Parallel) else width
                if getattr(node, "name", None) == step:
                    found.append(width)
            return width

        follow(self.nodes, self.block.channels[0])
        if not found:
            raise self.problem(place, f"append after: {suggest(step, self.names())}")
        return found[0]

    def _insert(self, after: str | None, calls: Nodes, place: Place | None) -> Nodes:
        if after is None:
            return self.nodes + calls
        placed = False

        def put(nodes: Nodes) -> Nodes:
            nonlocal placed
            out: list[Node] = []
            for node in nodes:
                out.append(rebuild(node, put))
                if isinstance(node, Call | Parallel) and node.name == after:
                    out += calls
                    placed = True
            return tuple(out)

        nodes = put(self.nodes)
        if not placed:
            raise self.problem(place, f"append after: {suggest(after, self.names())}")
        return nodes

    def names(self) -> list[str]:
        return [node.name for node in walk(self.nodes) if isinstance(node, Call | Parallel) and node.name]

    def resize_now(self, all_of_them: bool) -> None:
        for name, change in self.recipe.resize.items():
            conv = self.parts.get(name)
            if name in self.recipe.replace and conv is not None:
                replaced = self.recipe.replace[name].target
                raise self.problem(change.place, f"resize: {name} is replaced by {replaced}: it has no kernel")
            if conv is None or name not in self.geometry:
                convs = [n for n in self.parts if n in self.geometry]
                raise self.problem(change.place, f"resize: {suggest(name, convs)}")
            assert isinstance(conv, nn.Conv2d)
            if change.kernel > min(conv.kernel_size):
                raise self.problem(
                    change.place, f"resize: {name} is {conv.kernel_size[0]}x{conv.kernel_size[1]} already"
                )
            if conv.kernel_size == (change.kernel, change.kernel):
                continue
            if all_of_them or change.at.fraction == 0.0 or change.at.epoch == 0:
                self.geometry[name] = crop_conv(self.parts, name, conv, self.geometry[name], change.kernel)
                self.shared.discard(name)
            else:
                self.pending[name] = change
            self.touched.add(name)

    def chain_runs(self) -> None:
        """Wrap every chain that merges in a `Run`."""
        touched = self.touched | set(self.recipe.resize)
        self.nodes = chain(self.nodes, self.parts, self.recipe, touched, self.problem)

    def check_fit(self, flow: PrunedFlow) -> None:
        """Run the pruned flow where a change may not fit: other channels, another stride, further arguments."""
        if self.doubtful and (found := misfit(flow, self.example_input(), self.block.output_shape)) is not None:
            what = ", ".join(change for change, _ in self.doubtful)
            raise self.problem(self.doubtful[0][1], f"{what}: the pruned block {found}")


def unchanged(name: str) -> Recipe:
    """The recipe that changes nothing."""
    return Recipe(name, {}, {}, merge=())


def _new_layer(name: str) -> nn.Module:
    return nn.Identity() if name == "identity" else _ACTIVATIONS[name]()


def _copy_batchnorm(norm: _BatchNorm) -> BatchNorm:
    own = BatchNorm(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        device=_device(norm),
        dtype=_dtype(norm),
    )
    own.load_state_dict({k: v for k, v in norm.state_dict().items() if k in own.state_dict()})
    return own


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _dtype(module: nn.Module) -> torch.dtype:
    tensors: Iterable[Tensor] = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
