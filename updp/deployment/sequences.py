"""Runs of convolutions in a deployed network: each the next one's input, and large maps between.

A map that the second cache does not hold is written to memory and read again. Done strip by strip, a run writes but its
last map; whether that is faster is measured, as for any form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from updp import ops
from updp.deployment.capture import args_of, tensor_of
from updp.deployment.forms import NativeForm, Operands, Problem
from updp.deployment.programs import Lines
from updp.deployment.tune import Fused
from updp.ops import Line

APART, STRIPS = "apart", "strips"
_LARGE = 256 << 10  # bytes of an image's map: a quarter of a usual second cache
_SMALL = 64 << 10  # bytes of a weight: packed, it is up to four times as large, and every strip reads it


class Apart(nn.Module):
    """The convolutions one after the other, each in its own form."""

    def __init__(self, parts: Sequence[nn.Module], residuals: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        for place, residual in enumerate(residuals):
            self.register_buffer(f"residual_{place}", residual)

    def forward(self, x: Tensor, residual: None = None) -> Tensor:
        for place, part in enumerate(self.parts):
            x = part(x, getattr(self, f"residual_{place}"))
        return x


class Strips(Lines):
    """The convolutions as one line of a program."""

    def __init__(self, parts: Sequence[NativeForm], residuals: Sequence[Tensor | None]) -> None:
        super().__init__([Line(tuple(part.text for part in parts))], parts, residuals)


class Parts(nn.Module):
    """The convolutions of a run.

    Args:
        settled: each in its own form.
        natives: each in its fastest native form, which may be the same module.
        residuals: the constant that each adds, or None.
    """

    def __init__(
        self, settled: Sequence[nn.Module], natives: Sequence[NativeForm], residuals: Sequence[Tensor | None]
    ) -> None:
        super().__init__()
        self.settled, self.natives = nn.ModuleList(settled), nn.ModuleList(natives)
        self.given = settled, natives, residuals


@dataclass(frozen=True)
class RunProblem:
    """Convolutions that may run strip by strip: the native form and the problem of each."""

    steps: tuple[tuple[str, Problem], ...]
    plain: ClassVar[str] = APART
    since: ClassVar[None] = None

    def forms(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[str]:
        return [APART, STRIPS]

    def build(self, form: str, operands: Parts) -> nn.Module:
        settled, natives, residuals = operands.given
        return Apart(settled, residuals) if form == APART else Strips(natives, residuals)

    def __str__(self) -> str:
        return ", ".join(f"{_short(variant)} {problem}" for variant, problem in self.steps)


def _short(variant: str) -> str:
    """The algorithm of a kernel's name."""
    return variant.split("_")[1]


def put_runs(graph: fx.GraphModule, fused: Sequence[Fused], times: Mapping[str, Mapping[str, float]]) -> list[Fused]:
    """Replace the runs of a graph whose forms are settled by a module each.

    Args:
        fused: all that the graph has.
        times: what each one's forms were measured to take, by name; may be missing.
    """
    chains = {each.place: chain for each in fused if (chain := _Chain.of(each)) is not None}
    found = []
    for nodes in list(_runs(graph, chains)):
        own = [chains[str(node.target)] for node in nodes]
        variants = [chain.fastest(times.get(chain.fused.name, {})) for chain in own]
        settled = [graph.get_submodule(chain.fused.place) for chain in own]
        natives = [_Chain.native(*each) for each in zip(own, variants, settled, strict=True)]
        residuals = [tensor_of(graph, args_of(node)[1]) if len(node.args) > 1 else None for node in nodes]
        problem = RunProblem(tuple((variant, chain.problem) for variant, chain in zip(variants, own, strict=True)))
        first, last = own[0].fused, own[-1].fused
        run = Fused(f"{first.name} to {last.name}", problem, Parts(settled, natives, residuals))
        run.input = first.input
        _put(graph, nodes, run)
        found.append(run)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return found


@dataclass(frozen=True)
class _Chain:
    """A chain of a network, and the native forms that it can take."""

    fused: Fused
    problem: Problem
    variants: tuple[str, ...]

    @classmethod
    def of(cls, fused: Fused) -> _Chain | None:
        """None where there is no such form, or the weight is not small."""
        problem, operands = fused.problem, fused.operands
        if not isinstance(problem, Problem) or not isinstance(operands, Operands) or problem.is_linear:
            return None
        weight, rows = operands.weight, {row.name for row in ops.kernel_rows()}
        variants = tuple(form for form in problem.forms(fused.input, weight.dtype, weight.device) if form in rows)
        return cls(fused, problem, variants) if variants and weight.nbytes <= _SMALL else None

    def fastest(self, times: Mapping[str, float]) -> str:
        """The first guess where none was measured."""
        return min(self.variants, key=lambda form: times.get(form, float("inf")))

    def native(self, variant: str, settled: nn.Module) -> NativeForm:
        """The chain in a native form: the settled one, if that is it."""
        native = settled if isinstance(settled, NativeForm) and settled.name == variant else self.fused.build(variant)
        assert isinstance(native, NativeForm)
        return native


def _runs(graph: fx.GraphModule, chains: Mapping[str, _Chain]) -> Iterator[list[fx.Node]]:
    """The longest runs, of two or more; nothing is added in them but constants."""
    run: list[fx.Node] = []
    for node in graph.graph.nodes:
        chain = chains.get(str(node.target)) if node.op == "call_module" else None
        if chain is None or any(added.op != "get_attr" for added in args_of(node)[1:]):
            continue
        if run and node.args[0] is run[-1] and len(run[-1].users) == 1 and _is_large(chain.fused.input):
            run.append(node)
            continue
        if len(run) > 1:
            yield run
        run = [node]
    if len(run) > 1:
        yield run


def _is_large(shape: tuple[int, ...]) -> bool:
    return 4 * prod(shape[1:]) >= _LARGE


def _put(graph: fx.GraphModule, nodes: Sequence[fx.Node], run: Fused) -> None:
    graph.add_submodule(run.place, run)
    with graph.graph.inserting_before(nodes[-1]):
        node = graph.graph.call_module(run.place, (nodes[0].args[0],))
    node.meta["val"] = nodes[-1].meta.get("val")
    nodes[-1].replace_all_uses_with(node)
    for old in reversed(nodes):
        graph.graph.erase_node(old)
