"""Runs of convolutions in a deployed network: each the next one's input, and large maps between.

A map that the second cache does not hold is written to memory and read again. Done strip by strip, a run writes but its
last map; whether that is faster is measured, as for any form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, fx, nn

from updp import ops
from updp.deployment.capture import args_of, tensor_of
from updp.deployment.forms import NativeForm
from updp.deployment.plan import Plan
from updp.deployment.programs import Lines
from updp.deployment.tune import Fused, Slot
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


class Run(Slot):
    """Convolutions that may run strip by strip.

    Args:
        chains: what they are.
        variants: the fastest native form of each.
        residuals: the constant that each adds, or None.
        settled: the form that each one has.
    """

    def __init__(
        self, chains: Sequence[Fused], variants: Sequence[str], residuals: Sequence[Tensor | None],
        settled: Sequence[nn.Module],
    ) -> None:  # fmt: skip
        problem = ", ".join(
            f"{_short(variant)} {chain.problem}" for chain, variant in zip(chains, variants, strict=True)
        )
        super().__init__(f"{chains[0].name} to {chains[-1].name}", problem)
        self.input = chains[0].input
        # Not submodules: what is not chosen goes.
        self._given = chains, variants, residuals, settled
        self.run = self.build(APART)

    @property
    def place(self) -> str:
        return re.sub(r"\W+", "_", super().place).replace("fused_", "fused.", 1)

    @property
    def nbytes(self) -> int:
        return sum(chain.nbytes for chain in self._given[0])

    def forms(self, dtype: torch.dtype, device: torch.device) -> list[str]:
        return [APART, STRIPS]

    def planned(self, plan: Plan) -> str | None:
        """None where the plan was made on a machine that has no kernels for this run, or prefers others."""
        return next(
            (each.form for each in plan.choices if (each.name, each.problem) == (self.name, self.problem)), None
        )

    def build(self, form: str) -> nn.Module:
        chains, variants, residuals, settled = self._given
        if form == APART:
            return Apart(settled, residuals)
        natives = [
            own if isinstance(own, NativeForm) and own.name == variant else chain.build(variant)
            for chain, variant, own in zip(chains, variants, settled, strict=True)
        ]
        return Strips([native for native in natives if isinstance(native, NativeForm)], residuals)


def _short(variant: str) -> str:
    """The algorithm of a kernel's name."""
    return variant.split("_")[1]


def put_runs(graph: fx.GraphModule, chains: Sequence[Fused], times: Mapping[str, Mapping[str, float]]) -> list[Run]:
    """Replace the runs of a graph whose chains are settled by a module each.

    Args:
        chains: all that the graph has.
        times: what each one's forms were measured to take, by name; may be missing.
    """
    by_place = {chain.place: chain for chain in chains}
    found = []
    for nodes in _runs(graph, by_place):
        own = [by_place[str(node.target)] for node in nodes]
        variants = [_native(chain, times.get(chain.name, {})) for chain in own]
        residuals = [tensor_of(graph, args_of(node)[1]) if len(node.args) > 1 else None for node in nodes]
        run = Run(own, variants, residuals, [graph.get_submodule(str(node.target)) for node in nodes])
        _put(graph, nodes, run)
        found.append(run)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return found


def _runs(graph: fx.GraphModule, chains: Mapping[str, Fused]) -> Iterator[list[fx.Node]]:
    """The longest runs, of two or more."""
    run: list[fx.Node] = []
    for node in graph.graph.nodes:
        chain = chains.get(str(node.target)) if node.op == "call_module" else None
        if chain is None or not _is_possible(node, chain):
            continue
        if run and node.args[0] is run[-1] and len(run[-1].users) == 1 and _is_large(chain):
            run.append(node)
            continue
        if len(run) > 1:
            yield run
        run = [node]
    if len(run) > 1:
        yield run


def _is_possible(node: fx.Node, chain: Fused) -> bool:
    """A convolution of a map with a kernel of ours and a small weight, to which nothing is added but a constant."""
    added = args_of(node)[1:]
    if chain.problem.is_linear or chain.operands.weight.nbytes > _SMALL or not _natives(chain):
        return False
    return all(isinstance(each, fx.Node) and each.op == "get_attr" for each in added)


def _is_large(chain: Fused) -> bool:
    """The map that is read."""
    return 4 * prod(chain.input[1:]) >= _LARGE


def _natives(chain: Fused) -> list[str]:
    dtype, device = chain.operands.weight.dtype, chain.operands.weight.device
    return [form for form in chain.forms(dtype, device) if form in {row.name for row in ops.kernel_rows()}]


def _native(chain: Fused, times: Mapping[str, float]) -> str:
    """The fastest; the first guess where none was measured."""
    return min(_natives(chain), key=lambda form: times.get(form, float("inf")))


def _put(graph: fx.GraphModule, nodes: Sequence[fx.Node], run: Run) -> None:
    graph.add_submodule(run.place, run)
    with graph.graph.inserting_before(nodes[-1]):
        node = graph.graph.call_module(run.place, (nodes[0].args[0],))
    node.meta["val"] = nodes[-1].meta.get("val")
    nodes[-1].replace_all_uses_with(node)
    for old in reversed(nodes):
        graph.graph.erase_node(old)
