"""A spec bound to a real model: the declared flow of every block on that block's own submodules."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from updp import spec as language
from updp.errors import Place, Problem, SpecError, suggest
from updp.flow import Across, Call, FlowModule, Node, Nodes, Parallel, map_tensors, part_key
from updp.hooks import Hooks, is_own_method, resolve
from updp.kinds import kind_of, scale_parameter
from updp.layers import Layout, Negate, Scale
from updp.models import create_model as create_model
from updp.problems import say_once
from updp.spec import ArchSpec, BlockGroup

_BATCH = 2  # images of the recorded forward pass
_SLICE = re.compile(r"^(.*)\[(\d+):(\d+)\]$")


class MethodStep(nn.Module):
    """An opaque step that is a method of the block, on a copy of the block without its other steps."""

    def __init__(self, block: nn.Module, method: str, other_steps: set[str]) -> None:
        super().__init__()
        self.block = copy.copy(block)
        self.block._modules = {k: v for k, v in block._modules.items() if k not in other_steps}
        self.method = method

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        out: Tensor = getattr(self.block, self.method)(x, *args, **kwargs)
        return out


@dataclass
class BoundBlock:
    """One block of the model with its declared structure.

    ``flow`` runs the structure on the block's own submodules (shared, not copied). Shapes are those of the recorded
    forward pass, batch first; ``args``/``kwargs`` are what the model passed besides the tensor.
    """

    name: str
    group: BlockGroup
    module: nn.Module
    flow: FlowModule
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    opaques: dict[str, tuple[language.Opaque, tuple[int, ...]]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)

    def place_of(self, step: str | None = None) -> Place | None:
        """Where a step stands in the spec; where its structure begins, if the step is new or none is meant."""
        return self.places.get(step or "") or next(iter(self.places.values()), self.group.place)

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels."""
        axis = 1 if self.flow.entry == "first" else -1
        return self.input_shape[axis], self.output_shape[axis]

    def without_modules(self) -> BoundBlock:
        """What was recorded, without holding on to the block's modules."""
        return replace(self, module=nn.Identity(), flow=FlowModule((), {}, self.flow.entry))

    def signature(self) -> str:
        """Blocks of equal signature are of one kind: structure, recipes, shapes, modules without drop rates."""
        text = re.sub(r"(drop_prob|p)=[0-9.e-]+", "", repr(self.module))
        return f"{self.group.structure}|{self.group.recipes}|{self.input_shape[1:]}|{self.output_shape[1:]}|{text}"


def find_blocks(spec: ArchSpec, model: nn.Module) -> dict[str, BlockGroup]:
    """Block name -> group, in the model's order.

    Raises:
        SpecError: a match that matches nothing, two groups on one block, a block inside another.
    """
    names = [name for name, _ in model.named_modules() if name]
    lengths = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.Sequential)}
    return language.match_blocks(spec.blocks, names, lengths)


def get_block(model: nn.Module, name: str) -> nn.Module:
    """A block by name; a slice ``features[8:14]`` comes as a new `nn.Sequential` of the same modules."""
    found = _SLICE.match(name)
    if found is None:
        return model.get_submodule(name)
    parent = model.get_submodule(found[1])
    assert isinstance(parent, nn.Sequential)
    return nn.Sequential(*list(parent)[int(found[2]) : int(found[3])])


def set_block(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in a block's place; of a slice it takes the first place and `Identity` fills the rest."""
    found = _SLICE.match(name)
    if found is None:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
        return
    parent_module = model.get_submodule(found[1])
    assert isinstance(parent_module, nn.Sequential)
    for index in range(int(found[2]), int(found[3])):
        parent_module[index] = module if index == int(found[2]) else nn.Identity()


def bind(spec: ArchSpec, model: nn.Module, size: tuple[int, int, int] | None = None) -> dict[str, BoundBlock]:
    """Bind every block of a spec, in order of execution, from one recorded forward pass.

    Raises:
        SpecError: with every problem found: steps that do not exist, blocks that do not run, mixed classes.
    """
    groups = find_blocks(spec, model)
    modules = {name: get_block(model, name) for name in groups}
    _check_one_class(groups, modules)
    calls = _record_calls(spec, model, groups, modules, size or spec.input)
    problems: list[tuple[Sequence[str], Problem]] = []
    bound = {}
    for name in sorted(groups, key=lambda n: calls[n].order):
        try:
            bound[name] = _bind_block(spec, name, groups[name], modules[name], calls)
        except SpecError as error:
            problems += [([name], problem) for problem in error.problems]
    if problems:
        raise SpecError(say_once(problems))
    return bound


def _check_one_class(groups: Mapping[str, BlockGroup], modules: Mapping[str, nn.Module]) -> None:
    """A pattern that catches two classes of modules has caught more than a kind of block."""
    classes: dict[BlockGroup, dict[str, list[str]]] = {}
    for name, group in groups.items():
        classes.setdefault(group, {}).setdefault(type(modules[name]).__name__, []).append(name)
    for group, found in classes.items():
        if len(found) > 1:
            caught = "; ".join(f"{kind}: {', '.join(names[:4])}" for kind, names in found.items())
            raise SpecError([Problem(group.place, "blocks", f"one group matches blocks of several classes: {caught}")])


@dataclass
class _Called:
    order: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = ()
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def _record_calls(
    spec: ArchSpec,
    model: nn.Module,
    groups: Mapping[str, BlockGroup],
    modules: Mapping[str, nn.Module],
    size: tuple[int, int, int],
) -> dict[str, _Called]:
    """One forward pass: order, shapes and further arguments of every block and of every opaque step."""
    calls: dict[str, _Called] = {}

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = args[0] if args else None
        if isinstance(tensor, Tensor):
            calls.setdefault(name, _Called(len(calls), tuple(tensor.shape), (), tuple(args[1:]), dict(kwargs)))

    def after(name: str, output: object) -> None:
        if name in calls and isinstance(output, Tensor):
            calls[name].output_shape = tuple(output.shape)

    with Hooks() as hooks:
        for name, module in modules.items():
            first = module[0] if _SLICE.match(name) else module  # type: ignore[index]
            last = module[-1] if _SLICE.match(name) else module  # type: ignore[index]
            hooks.before(first, lambda args, kwargs, name=name: before(name, args, kwargs))
            hooks.after(last, lambda output, name=name: after(name, output))
            for opaque in _opaques(spec.structures[groups[name].structure]):
                key = f"{name}:{opaque.path}"
                hooks.step(module, opaque.path, lambda args, kwargs, key=key: before(key, args, kwargs))
        _run_once(spec, model, size)
    for name, group in groups.items():
        if name not in calls or not calls[name].output_shape:
            message = f"block {name} was not called with one tensor and one tensor out in the model's forward"
            raise SpecError([Problem(group.place, "blocks", message)])
    return calls


def _run_once(spec: ArchSpec, model: nn.Module, size: tuple[int, int, int]) -> None:
    parameter = next(model.parameters())
    x = torch.zeros(_BATCH, *size, dtype=parameter.dtype, device=parameter.device)
    with evaluating(model), torch.no_grad():
        try:
            model(x)
        except (RuntimeError, AssertionError, ValueError) as error:
            message = f"the model does not run on {list(size)}: {str(error).splitlines()[0]}"
            raise SpecError([Problem(Place(spec.file), "input", message)]) from error


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode afterwards."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    for root in modules:
        root.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _opaques(flow: language.Flow) -> Iterator[language.Opaque]:
    return (node for node in language.walk(flow) if isinstance(node, language.Opaque))


class _Binder:
    """Collects nodes, parts and every problem of one block."""

    def __init__(self, block: nn.Module, where: str, own_steps: set[str]) -> None:
        self.block, self.where, self.own_steps = block, where, own_steps
        self.parts: dict[str, nn.Module] = {}
        self.problems: list[Problem] = []

    def flow(self, flow: language.Flow) -> Nodes:
        return tuple(node for item in flow for node in self.node(item))

    def node(self, item: language.Node) -> tuple[Node, ...]:
        if isinstance(item, language.Sum):
            return (Parallel(tuple(self.flow(branch) for branch in item.branches), item.name),)
        if isinstance(item, language.Across):
            return (Across(self.flow(item.flow)),)
        if isinstance(item, language.Negate):
            name = f"negate.{sum(isinstance(m, Negate) for m in self.parts.values())}"
            self.parts[name] = Negate()
            return (Call(name),)
        return self.step(item)

    def step(self, item: language.Step | language.Opaque) -> tuple[Node, ...]:
        module = self.module(item.path, isinstance(item, language.Opaque))
        if module is None:
            if not getattr(item, "optional", False):
                message = f"no such step in {type(self.block).__name__}: {suggest(item.path, self.names())}"
                self.problems.append(Problem(item.place, self.where, message))
            return ()
        if other := next((n for n in self.parts if n != item.path and part_key(n) == part_key(item.path)), None):
            message = f"{item.path!r} and {other!r} cannot be told apart: dots count as underscores"
            self.problems.append(Problem(item.place, self.where, message))
            return ()
        self.parts[item.path] = module
        return (Call(item.path),)

    def module(self, path: str, opaque: bool) -> nn.Module | None:
        try:
            target = resolve(self.block, path)
        except AttributeError:
            return None
        if isinstance(target, nn.Parameter):
            return Scale(target)
        if isinstance(target, nn.Module):
            return target
        if opaque and is_own_method(self.block, path):
            return MethodStep(self.block, path, self.own_steps)
        return None

    def names(self) -> list[str]:
        modules = [name for name, _ in self.block.named_modules() if name]
        return modules + [name for name, _ in self.block.named_parameters(recurse=False)]


def _bind_block(
    spec: ArchSpec, name: str, group: BlockGroup, module: nn.Module, calls: Mapping[str, _Called]
) -> BoundBlock:
    where = f"structures.{group.structure}"
    flow = spec.structures[group.structure]
    steps = {path.split(".")[0] for path in language.names_in(flow)}
    binder = _Binder(module, where, steps)
    nodes = binder.flow(flow)
    if binder.problems:
        raise SpecError(binder.problems)
    called = calls[name]
    extras = {}
    opaques = {}
    for opaque in _opaques(flow):
        call = calls.get(f"{name}:{opaque.path}")
        _check_opaque(opaque, call, where)
        if call is not None:
            opaques[opaque.path] = (opaque, call.input_shape)
            if call.args or call.kwargs:
                extras[opaque.path] = (call.args, call.kwargs)
    entry = _entry_layout(nodes, binder.parts, called.input_shape)
    bound_flow = FlowModule(nodes, binder.parts, entry, extras)
    bound_flow.train(module.training)
    optional = frozenset(n.path for n in language.walk(flow) if isinstance(n, language.Step) and n.optional)
    return BoundBlock(
        name,
        group,
        module,
        bound_flow,
        called.input_shape,
        called.output_shape,
        called.args,
        called.kwargs,
        optional,
        opaques,
        {n.path: n.place for n in language.walk(flow) if isinstance(n, language.Step | language.Opaque) and n.place},
    )


def _check_opaque(opaque: language.Opaque, call: _Called | None, where: str) -> None:
    """What an opaque step says of itself must be testable, and what it was given must do for other batches.

    Raises:
        SpecError: it claims something and is never called; it is given a tensor with one entry per image.
    """
    if call is None:
        if opaque.enters or opaque.leaves:
            message = f"the claims of {opaque.path!r} cannot be tested: the block never calls it with a tensor first"
            raise SpecError([Problem(opaque.place, where, message)])
        return
    given: list[Tensor] = []
    map_tensors((call.args, call.kwargs), lambda tensor: given.append(tensor) or tensor)  # type: ignore[func-returns-value]
    for tensor in given:
        if tensor.dim() and tensor.shape[0] in (_BATCH, call.input_shape[0]):
            message = (
                f"{opaque.path!r} is given a tensor {list(tensor.shape)} besides its input, with one entry per image"
            )
            message += f" (the recorded batch has {_BATCH}): it cannot be recorded for other batches"
            raise SpecError([Problem(opaque.place, where, message)])


def channels_of(module: nn.Module) -> int | None:
    """Input channels of a module that has some."""
    kind = kind_of(module).name
    if kind == "scale":
        return scale_parameter(module).numel()
    for attribute in ("in_channels", "in_features", "num_features", "num_channels"):
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    shape = getattr(module, "normalized_shape", None)
    return int(shape[0]) if shape is not None and len(shape) == 1 else None


def _entry_layout(nodes: Nodes, parts: Mapping[str, nn.Module], shape: tuple[int, ...]) -> Layout:
    """Where the channels of a block's input are: told by its first layout-bound step and that step's channels."""
    if len(shape) != 4:
        return "last"
    for name in _leading(nodes):
        layout, channels = kind_of(parts[name]).layout, channels_of(parts[name])
        if layout is None:
            continue
        if channels == shape[1] and channels != shape[3]:
            return "first"
        if channels == shape[3] and channels != shape[1]:
            return "last"
        return layout
    return "first"


def _leading(nodes: Nodes) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, Call):
            yield node.name
        elif isinstance(node, Parallel):
            for flow in node.flows:
                yield from _leading(flow)
