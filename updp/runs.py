"""Which steps of a flow merge into one operator: every such chain becomes a `Run`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import nn

from updp.errors import Place, SpecError, suggest
from updp.flow import Call, Node, Nodes, Parallel, Run, rebuild, walk
from updp.kinds import kind_of
from updp.spec import Recipe


def chain(
    nodes: Nodes,
    parts: Mapping[str, nn.Module],
    recipe: Recipe,
    touched: Collection[str],
    problem: Callable[[Place | None, str], SpecError],
) -> Nodes:
    """Wrap every chain that a recipe merges in a `Run`.

    Args:
        touched: steps that the recipe replaces or resizes; ``merge: all`` means the runs that have one.
        problem: makes the error of a place and a message.

    Raises:
        SpecError: ``merge`` names steps that are not there, not of one flow, or have something between them that is
            not affine.
    """
    return _Chainer(parts, recipe, touched, problem).chain(nodes)


class _Chainer:
    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        recipe: Recipe,
        touched: Collection[str],
        problem: Callable[[Place | None, str], SpecError],
    ) -> None:
        self.parts, self.recipe, self.problem = parts, recipe, problem
        self.touched = set(touched)

    def chain(self, nodes: Nodes) -> Nodes:
        if self.recipe.merge == "all":
            nodes = self._wrap_maximal(nodes)
        else:
            for index, names in enumerate(self.recipe.merge):
                nodes = _unnested(self._wrap_named(nodes, names, index))
        return self._with_scales(nodes) if self.recipe.compose == "start" else nodes

    def _with_scales(self, nodes: Nodes) -> Nodes:
        """Runs that take the norms and scales behind them: as a merge at the end would fold them in."""
        out: list[Node] = []
        for node in nodes:
            before = out[-1] if out else None
            kind = kind_of(self.parts[node.name]) if isinstance(node, Call) else None
            if isinstance(before, Run) and kind is not None and kind.affine and (kind.is_diagonal or kind.vanishes):
                out[-1] = Run((*before.flow, node))
            else:
                out.append(node if isinstance(node, Run) else rebuild(node, self._with_scales))
        return tuple(out)

    def _wrap_maximal(self, nodes: Nodes) -> Nodes:
        """Every maximal affine run that the recipe touched."""
        out: list[Node] = []
        chain: list[Node] = []
        for node in (*nodes, None):
            if node is not None and self.is_affine(node):
                chain.append(node)
                continue
            out += self._close(chain)
            chain = []
            if node is not None:
                out.append(rebuild(node, self._wrap_maximal))
        return tuple(out)

    def _close(self, chain: list[Node]) -> list[Node]:
        calls = [node.name for node in walk(tuple(chain)) if isinstance(node, Call)]
        operators = sum(kind_of(self.parts[name]).is_operator for name in calls)
        sums = any(isinstance(node, Parallel) for node in walk(tuple(chain)))
        touched = self.recipe.kind == "reparam" or not self.touched.isdisjoint(calls)
        if not touched or operators == 0 or operators + sums < 2:
            return chain
        return [Run(tuple(chain))]

    def _wrap_named(self, nodes: Nodes, names: tuple[str, ...], index: int) -> Nodes:
        place = (self.recipe.merge_places[index] or (self.recipe.place,))[0] if self.recipe.merge_places else None
        known = [n.name for n in walk(nodes) if isinstance(n, Call | Parallel) and n.name]
        for name in names:
            if name not in known:
                raise self.problem(place, f"merge: {suggest(name, known)}")

        def wrap(flow: Nodes) -> Nodes:
            steps = [node.flow if isinstance(node, Run) else (node,) for node in flow]
            held = [{getattr(step, "name", None) for step in inner} for inner in steps]
            here = [i for i, found in enumerate(held) if not found.isdisjoint(names)]
            if not set(names) <= {name for found in held for name in found}:
                return tuple(rebuild(node, wrap) for node in flow)
            chain = flow[min(here) : max(here) + 1]
            for node in chain:
                if not self.is_affine(node):
                    what = getattr(node, "name", None) or type(node).__name__
                    raise self.problem(place, f"merge: {what!r} between {names[0]!r} and {names[-1]!r} is not affine")
            if not any(isinstance(n, Call) and kind_of(self.parts[n.name]).is_operator for n in walk(chain)):
                raise self.problem(place, f"merge: no convolution or linear layer in {', '.join(names)}")
            return (*flow[: min(here)], Run(chain), *flow[max(here) + 1 :])

        wrapped = wrap(nodes)
        if wrapped == nodes:
            raise self.problem(place, f"merge: {', '.join(names)} are not steps of one flow")
        return wrapped

    def is_affine(self, node: Node) -> bool:
        if isinstance(node, Call):
            return kind_of(self.parts[node.name]).affine is not None
        if isinstance(node, Parallel):
            return all(self.is_affine(inner) for flow in node.flows for inner in flow)
        return isinstance(node, Run)


def _unnested(nodes: Nodes, inside: bool = False) -> Nodes:
    """Merges that overlap are one: a run inside a run is part of it, and its padding moves with the others."""
    out: list[Node] = []
    for node in nodes:
        if isinstance(node, Run):
            flow = _unnested(node.flow, True)
            out += flow if inside else [Run(flow)]
        else:
            out.append(rebuild(node, lambda flow: _unnested(flow, inside)))
    return tuple(out)
