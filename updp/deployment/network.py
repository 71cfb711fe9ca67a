"""`deploy`: a network in the form in which it is fastest on this machine, and computes the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from updp.certificate import relative
from updp.deployment.affines import fold_forward, name_affines, operators_of, settle_affines
from updp.deployment.attention import find_attentions
from updp.deployment.capture import args_of, capture, join_permutations, own_tensors, put_module
from updp.deployment.chains import Chain, find_chains, put
from updp.deployment.forms import Operands, Problem
from updp.deployment.norms import find_norms
from updp.deployment.plan import Cache, Choice, Plan, here, planned
from updp.deployment.programs import join_calls
from updp.deployment.sequences import put_runs
from updp.deployment.tune import Fused, tune
from updp.errors import CertificateError, InputError
from updp.exporting import TOLERANCE


class Deployed(nn.Module):
    """A network for inference, and the plan by which it runs; what it is given and gives is the original's.

    Attributes:
        plan: the form of every chain, attention and layer norm.
    """

    def __init__(self, graph: fx.GraphModule, plan: Plan) -> None:
        super().__init__()
        self.graph_module, self.plan = graph, plan
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        out: Tensor = self.graph_module(x)
        return out

    def train(self, mode: bool = True) -> Deployed:
        """Deployed networks cannot be trained.

        Raises:
            RuntimeError: they are asked to.
        """
        if mode:
            raise RuntimeError("a deployed network is for inference: its norms are folded; train the original")
        for module in self.modules():  # an exported graph refuses to be asked
            module.training = False
        return self


def deploy(
    model: nn.Module,
    example: Tensor,
    *,
    plan: Plan | str | Path | None = None,
    cache: bool = True,
    forms: Callable[[str], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Deployed:
    """Fold every norm, fuse every operator with what follows it, and run each chain in its fastest form.

    The forms are the kernels of ``csrc/``, oneDNN with packed weights, and plain torch; what is faster is measured,
    with torch's present number of threads and on the shapes of the example, and kept in a cache for this machine.
    Other batch sizes run too, in the same forms. Works in eager, under `torch.compile` and `torch.export`.

    Args:
        model: a merged network, or any other; it is left as it is, shares its tensors, and is taken in eval mode.
        example: images ``(N, C, H, W)`` on the network's device, of the batch size that it should be fast at.
        plan: choose as a saved plan says; what cannot run here is measured.
        cache: take up what was measured before on this machine, and add to it.
        forms: which forms to consider, by name; plain torch is always one.
        progress: called with how many chains were measured.

    Raises:
        InputError: the network cannot be captured, or the plan is of another.
        CertificateError: the deployed network computes something else.
    """
    if example.dim() < 2 or len(example) < 1 or not example.is_floating_point():
        raise InputError(f"example: got {example.dtype} of shape {tuple(example.shape)}, need images (N, C, H, W)")
    options = _Options(
        Plan.load(plan) if isinstance(plan, str | Path) else plan, forms or (lambda form: True), progress
    )
    graph = capture(model, example)
    fused = _fuse(graph, example.dtype)
    found = here(example.dtype, example.device)
    kept = Cache(found) if cache else None
    network = Deployed(graph, Plan(found, ()))
    with torch.inference_mode():
        _observe(network, fused, example)
    with torch.no_grad():  # what is packed now must not belong to inference mode alone
        network.plan = Plan(found, _choose(network, fused, example, options, kept))
        _check(model, network, example)
    if kept is not None:
        kept.save()
    return network


def fused_chains(model: nn.Module, example: Tensor) -> list[Fused]:
    """The chains that `deploy` would find in a network, with the shape of each one's input; for looking at them.

    Raises:
        InputError: the network cannot be captured.
    """
    graph = capture(model, example)
    fused = _fuse(graph, example.dtype)
    with torch.inference_mode():
        _observe(Deployed(graph, Plan({}, ())), fused, example)
    return [each for each in fused if isinstance(each.problem, Problem)]


def _fuse(graph: fx.GraphModule, dtype: torch.dtype) -> list[Fused]:
    """Rewrite a captured graph: a module for each chain, each attention and each layer norm."""
    name_affines(graph)
    operators = operators_of(graph)
    fold_forward(graph, operators)
    chains = list(find_chains(graph, operators))
    moved: dict[fx.Node, fx.Node] = {}
    fused: list[Fused] = []
    for chain in chains:
        module = Fused(_name(_layer_of(chain), fused), Problem.of(chain), Operands.of(chain, dtype))
        graph.add_submodule(module.place, module)
        put(graph, chain, module.place, moved)
        fused.append(module)
    for found in list(find_attentions(graph)):
        module = Fused(_name(found.module, fused), found.problem, nn.Module())
        graph.add_submodule(module.place, module)
        put_module(graph, found.nodes, module.place, *found.inputs)
        fused.append(module)
    for norm in list(find_norms(graph)):
        module = Fused(_name(norm.module, fused), norm.problem, norm.operands)
        graph.add_submodule(module.place, module)
        put_module(graph, [norm.node], module.place, norm.x)
        fused.append(module)
    settle_affines(graph, dtype)
    join_permutations(graph)
    _settle_tensors(graph)
    graph.graph.lint()
    graph.recompile()
    return fused


def _settle_tensors(graph: fx.GraphModule) -> None:
    """Drop what no node reads any more; what is left has no gradients, and maps have their channels last."""
    for left in list(own_tensors(graph)):
        owner, own = _owner(graph, left)
        delattr(owner, own)
    for name, parameter in list(graph.named_parameters()):  # the same memory
        owner, own = _owner(graph, name)
        delattr(owner, own)
        owner.register_buffer(own, parameter.detach())
    for name, map_ in list(graph.named_buffers(recurse=False)):
        if map_.dim() == 4:  # a constant that is added to a map
            graph.register_buffer(name, map_.contiguous(memory_format=torch.channels_last))


def _layer_of(chain: Chain) -> str:
    """The name of the module that has the weight."""
    return re.sub(r"[._]weight$", "", str(args_of(chain.operator.node)[1].target))


def _name(plain: str, fused: Collection[Fused]) -> str:
    """Numbered where several have the same."""
    taken = [module.name for module in fused]
    return next(name for i in count(1) if (name := plain if i == 1 else f"{plain}.{i}") not in taken)


def _owner(graph: fx.GraphModule, name: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and its name there."""
    owner, _, own = name.rpartition(".")
    return graph.get_submodule(owner), own


def _observe(network: Deployed, fused: list[Fused], example: Tensor) -> None:
    """Note the shape of the first input of each."""
    handles = [
        module.register_forward_pre_hook(lambda module, args: setattr(module, "input", tuple(args[0].shape)))
        for module in fused
    ]
    try:
        network(example)
    finally:
        for handle in handles:
            handle.remove()


def _choose(
    network: Deployed, fused: list[Fused], example: Tensor, options: _Options, cache: Cache | None
) -> tuple[Choice, ...]:
    """The form of each part, then whether runs go strip by strip; then as few calls as can be."""
    choices = _settle(network, fused, example, options, cache)
    known = (*(options.plan.choices if options.plan else ()), *(each for each in choices if each.times))
    runs = put_runs(network.graph_module, fused, {each.name: each.times for each in known})
    choices += _settle(network, runs, example, options, cache)
    join_calls(network.graph_module)
    return choices


def _settle(
    network: Deployed, fused: list[Fused], example: Tensor, options: _Options, cache: Cache | None
) -> tuple[Choice, ...]:
    """Take the plan's form, or the fastest, for each."""
    times: dict[str, dict[str, float]] = {}
    forms = {each.name: options.forms_of(each, example) for each in fused}
    for each in fused:
        if cache is not None and len(forms[each.name]) > 1:
            times[each.name] = cache.get(each.problem, each.input, forms[each.name]) or {}
    on_trial = [(each, forms[each.name]) for each in fused if len(forms[each.name]) > 1 and not times.get(each.name)]
    for (each, _), found in zip(on_trial, tune(on_trial, lambda: network(example), options.progress), strict=True):
        times[each.name] = found
        if cache is not None:
            cache.put(each.problem, each.input, found)
    choices = []
    for each in fused:
        own = times.get(each.name, {})
        form = min(forms[each.name], key=lambda form, own=own: own.get(form, 0.0))  # type: ignore[misc]
        choices.append(Choice(each.name, str(each.problem), each.input, form, own))
        network.graph_module.set_submodule(each.place, each.build(form))
    return tuple(choices)


@dataclass(frozen=True)
class _Options:
    """What the caller asked for."""

    plan: Plan | None
    wanted: Callable[[str], bool]
    progress: Callable[[int], None] | None

    def forms_of(self, fused: Fused, example: Tensor) -> list[str]:
        """The forms to choose from; the plan's alone, where it can run here."""
        possible = fused.problem.forms(fused.input, example.dtype, example.device)
        said = None if self.plan is None else planned(self.plan, fused.name, fused.problem)
        if said is not None and said.form in possible:
            return [said.form]
        return [form for form in possible if form == fused.problem.plain or self.wanted(form)]


def _check(model: nn.Module, network: Deployed, example: Tensor) -> None:
    """Both on the example; a network whose output is not finite cannot be compared."""
    was_training = model.training
    try:
        expected = model.eval()(example)
    finally:
        model.train(was_training)
    error = relative(network(example), expected)
    if not error <= _tolerance(example.dtype):
        raise CertificateError(f"the deployed network differs from the original by {error:.1e} of its largest output")


def _tolerance(dtype: torch.dtype) -> float:
    return max(TOLERANCE, 100 * torch.finfo(dtype).eps)
