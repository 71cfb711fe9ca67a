"""A pruned flow becomes a merged block: every run one dense operator, every norm folded where that is exact.

`merge` returns a new model; the supernet is left as it was. What each merged operator was made from is kept as a list
of `Segment`s, so that `updp.certificate` can hold every one of them against its source.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp import affine
from updp import spec as language
from updp.affine import NO_PADS, Affine
from updp.composing import affine_of, module_of
from updp.errors import MergeError
from updp.flow import Across, Call, FlowModule, Node, Nodes, Parallel, Run, walk
from updp.kinds import kind_of, out_channels_of
from updp.recipe import PrunedFlow
from updp.structure import BoundBlock, MethodStep, channels_of
from updp.subnet import KEEP
from updp.supernet import Supernet


@dataclass(frozen=True)
class Segment:
    """A stretch of a flow and what it became.

    ``name`` is the merged operator's, or None where nothing was merged; ``branches`` are the segments of each branch
    of a sum that stays. ``reach`` is how far the operator looks beyond a pixel: the width of its border ring.
    """

    source: Nodes
    merged: Nodes
    name: str | None = None
    branches: tuple[tuple[Segment, ...], ...] = ()
    reach: int = 1


class MergedFlow(FlowModule):
    """The merged form of one pruned block. Plain modules in a fixed order; for inference."""


@dataclass
class _Piece:
    """A node of the flow being merged, with the diagonals that it absorbs."""

    nodes: list[Node]
    role: str  # "operator", "diagonal", "opaque", "other"
    core: int = 0  # index of the operator or opaque step among the nodes


def merge_flow(
    flow: PrunedFlow,
    channels: int,
    opaques: Mapping[str, language.Opaque] | None = None,
    *,
    values: bool = True,
) -> tuple[MergedFlow, tuple[Segment, ...]]:
    """Merge one pruned flow.

    Args:
        channels: of its input.
        opaques: opaque steps by name, with their claims.
        values: False builds the merged modules without computing their weights (they stay on the meta device):
            for counting, and for loading a saved network.

    Raises:
        MergeError: a run cannot be composed exactly, or kernel changes are still to come.
    """
    if flow.pending:
        raise MergeError(f"kernel changes of {', '.join(flow.pending)} are still to come; resize first")
    merger = _Merger(flow, opaques or {}, values)
    segments, _ = merger.flow(flow.nodes, channels)
    nodes = tuple(node for segment in segments for node in segment.merged)
    merged = MergedFlow(nodes, merger.parts, flow.entry, flow.extras)
    return merged.eval(), segments


class _Merger:
    def __init__(self, flow: PrunedFlow, opaques: Mapping[str, language.Opaque], values: bool) -> None:
        self.opaques = {name: opaque for name, opaque in opaques.items() if name not in flow.recipe.replace}
        self.sources = flow.named_parts if values else _without_values(flow.named_parts)
        memo: dict[int, object] = {}
        self.parts = {name: copy.deepcopy(part, memo) for name, part in self.sources.items()}
        self.merged_names = 0

    def flow(self, nodes: Nodes, channels: int) -> tuple[tuple[Segment, ...], int]:
        pieces = self.absorb(self.pieces(nodes))
        segments = []
        for piece in pieces:
            segment, channels = self.segment(piece, channels)
            segments.append(segment)
        return tuple(segments), channels

    def pieces(self, nodes: Nodes) -> list[_Piece]:
        return [_Piece([node], self.role(node)) for node in nodes if not self.vanishes(node)]

    def vanishes(self, node: Node) -> bool:
        return isinstance(node, Call) and kind_of(self.parts[node.name]).vanishes

    def role(self, node: Node) -> str:
        if isinstance(node, Run):
            return "operator"
        if isinstance(node, Call):
            kind = kind_of(self.parts[node.name])
            if kind.is_operator:
                return "operator"
            if kind.is_diagonal:
                return "diagonal"
            if node.name in self.opaques:
                return "opaque"
        return "other"

    def absorb(self, pieces: list[_Piece]) -> list[_Piece]:
        """Give every norm and scale to a neighbour where that is exact: the one before, else the one behind."""
        done: list[_Piece] = []
        for piece in pieces:
            before = done[-1] if done else None
            if piece.role == "diagonal" and before is not None and self.takes_behind(before):
                before.nodes += piece.nodes
                continue
            while done and done[-1].role == "diagonal" and self.takes_in_front(piece, done[-1]):
                diagonal = done.pop()
                piece.core += len(diagonal.nodes)
                piece.nodes = diagonal.nodes + piece.nodes
            done.append(piece)
        return done

    def takes_behind(self, piece: _Piece) -> bool:
        if piece.role == "opaque":
            return bool(self.opaques[self.name_of(piece)].leaves)
        return piece.role == "operator"

    def takes_in_front(self, piece: _Piece, diagonal: _Piece) -> bool:
        if piece.role == "opaque":
            return bool(self.opaques[self.name_of(piece)].enters)
        if piece.role != "operator":
            return False
        core = piece.nodes[piece.core]
        shifts = any(kind_of(self.parts[n.name]).name == "batchnorm" for n in diagonal.nodes if isinstance(n, Call))
        if isinstance(core, Run):  # its padding, if any, is its first node's
            first = core.flow[0]
            unpadded = not any(isinstance(n, Call) and _is_padded(self.parts[n.name]) for n in walk((first,)))
            return unpadded or not shifts
        assert isinstance(core, Call)
        return not shifts or not _is_padded(self.parts[core.name])

    def name_of(self, piece: _Piece) -> str:
        node = piece.nodes[piece.core]
        assert isinstance(node, Call)
        return node.name

    def segment(self, piece: _Piece, channels: int) -> tuple[Segment, int]:
        nodes = tuple(piece.nodes)
        if piece.role == "operator":
            return self.operator(nodes, channels)
        if piece.role == "opaque" and len(nodes) > 1:
            return self.fold_opaque(piece), channels
        node = nodes[0]
        if isinstance(node, Parallel):
            branches = [self.flow(flow, channels) for flow in node.flows]
            merged = Parallel(
                tuple(tuple(n for s in segments for n in s.merged) for segments, _ in branches), node.name
            )
            out = next((c for (_, c), flow in zip(branches, node.flows, strict=True) if flow), channels)
            return Segment(nodes, (merged,), branches=tuple(segments for segments, _ in branches)), out
        if isinstance(node, Across):
            return self.across(node), channels
        return Segment(nodes, nodes), channels

    def across(self, node: Across) -> Segment:
        """Operators inside act on tokens; the number of channels outside stays."""
        tokens = next((m.in_features for m in self.inner_linears(node)), 1)
        segments, _ = self.flow(node.flow, tokens)
        merged = Across(tuple(n for s in segments for n in s.merged))
        return Segment((node,), (merged,), branches=(segments,))

    def inner_linears(self, node: Across) -> list[nn.Linear]:
        parts = [self.parts[n.name] for n in walk(node.flow) if isinstance(n, Call)]
        return [part for part in parts if isinstance(part, nn.Linear)]

    def operator(self, nodes: Nodes, channels: int) -> tuple[Segment, int]:
        """Compose a chain into one operator; a lone convolution or linear without neighbours stays as it is."""
        node = nodes[0]
        if len(nodes) == 1 and isinstance(node, Call):
            return Segment(nodes, nodes), out_channels_of(self.parts[node.name]) or channels
        first = (channels_of(self.sources[n.name]) for n in walk(nodes) if isinstance(n, Call))
        composed = affine_of(nodes, self.sources, next(filter(None, first), channels))
        name = f"merged.{self.merged_names}"
        self.merged_names += 1
        self.parts[name] = module_of(composed, nodes, self.sources)
        return Segment(nodes, (Call(name),), name, reach=_reach(composed)), composed.out_channels

    def fold_opaque(self, piece: _Piece) -> Segment:
        """Fold the diagonals in front into the step's `enters`, those behind into its `leaves`."""
        name = self.name_of(piece)
        claim = self.opaques[name]
        module = self.parts[name]
        before = [n for n in piece.nodes[: piece.core] if isinstance(n, Call)]
        behind = [n for n in piece.nodes[piece.core + 1 :] if isinstance(n, Call)]
        for paths, nodes, inside in ((claim.enters, before, True), (claim.leaves, behind, False)):
            if nodes:
                diagonal = affine_of(tuple(nodes), self.sources, 0)
                for path in paths:
                    fold_into(module, name, path, diagonal, inside)
        op = f"fold.{name}"
        return Segment(tuple(piece.nodes), (piece.nodes[piece.core],), op)


def _without_values(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The affine parts on the meta device: shapes without values."""
    affine_parts = {name for name, part in parts.items() if kind_of(part).affine is not None}
    return {n: copy.deepcopy(part).to("meta") if n in affine_parts else part for n, part in parts.items()}


def fold_into(module: nn.Module, step: str, path: str, diagonal: Affine, inside: bool) -> None:
    """Fold a diagonal into a linear layer, convolution or batch norm of an opaque step, in place.

    Args:
        path: as the claim names it: relative to the block (``attn.qkv`` of step ``attn``).
        inside: the diagonal comes before the step; else behind it.
    """
    target = opaque_target(module, step, path)
    kind = kind_of(target)
    form = kind.affine
    if form is None or not (kind.is_operator or kind.name == "batchnorm"):
        raise MergeError(f"{path} can take no norm: it is {type(target).__name__}")
    own = form(target, diagonal.out_channels).to(diagonal.weight.device)
    if inside and own.padding != NO_PADS and diagonal.bias is not None:
        raise MergeError(f"{path} pads its input, so a norm in front cannot be folded into it")
    folded = affine.compose(own, diagonal) if inside else affine.compose(diagonal, own)
    _assign(target, folded)


def opaque_target(module: nn.Module, step: str, path: str) -> nn.Module:
    """The module that a claim names."""
    if isinstance(module, MethodStep):
        return module.block.get_submodule(path)
    return module.get_submodule(path.removeprefix(f"{step}."))


def _assign(target: nn.Module, folded: Affine) -> None:
    with torch.no_grad():
        if folded.bias is not None and getattr(target, "bias", None) is None:
            like = target.weight
            assert isinstance(like, nn.Parameter)
            target.bias = nn.Parameter(like.new_zeros(folded.out_channels))
        if folded.weight.is_meta:
            return
        if isinstance(target, _BatchNorm):
            assert folded.bias is not None and target.running_mean is not None and target.running_var is not None
            target.running_mean.zero_()
            target.running_var.fill_(1 - target.eps)
            target.weight.copy_(folded.weight.reshape(-1))
            target.bias.copy_(folded.bias)
            return
        weight = target.weight
        assert isinstance(weight, nn.Parameter)
        weight.copy_(folded.weight.reshape(weight.shape))
        if folded.bias is not None:
            assert isinstance(target.bias, nn.Parameter)
            target.bias.copy_(folded.bias)


def _is_padded(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind.name in ("conv", "pad") and kind.affine is not None and kind.affine(module, 1).padding != NO_PADS


def _reach(composed: Affine) -> int:
    span = max(composed.span)
    return max(1, span // (2 * min(composed.stride)))


@dataclass(frozen=True)
class MergedBlock:
    """A merged block beside what it was made from."""

    name: str
    source: PrunedFlow
    merged: MergedFlow
    segments: tuple[Segment, ...]


def claims_of(bound: BoundBlock) -> dict[str, language.Opaque]:
    """The opaque steps of a block, with what they claim."""
    return {name: opaque for name, (opaque, _) in bound.opaques.items()}


def merge_blocks(supernet: Supernet, *, values: bool = True) -> list[MergedBlock]:
    """Merge every pruned block of the current subnet; the supernet is not changed."""
    merged = []
    for name, block in supernet.blocks.items():
        if block.active == KEEP:
            continue
        flow = block.choices[block.active]
        assert isinstance(flow, PrunedFlow)
        claims = claims_of(supernet.bound[name])
        try:
            result, segments = merge_flow(flow, supernet.bound[name].channels[0], claims, values=values)
        except MergeError as error:
            raise MergeError(f"block {name}, recipe {block.active}: {error}") from None
        merged.append(MergedBlock(name, flow, result, segments))
    return merged


def assemble(supernet: Supernet, merged: Sequence[MergedBlock]) -> nn.Module:
    """A new model, in eval mode, with merged blocks in place and kept blocks as the baseline's own modules."""
    by_name = {block.name: block.merged for block in merged}
    memo: dict[int, object] = {}
    kept_slices = {}
    for name, block in supernet.blocks.items():
        if name in by_name:
            memo[id(block)] = by_name[name]
        else:
            assert block.keep is not None
            memo[id(block)] = copy.deepcopy(block.keep, memo)
            if "[" in name:
                kept_slices[name] = memo[id(block)]
    model: nn.Module = copy.deepcopy(supernet.model, memo)
    for name, module in kept_slices.items():
        assert isinstance(module, nn.Sequential)
        _restore_slice(model, name, module)
    return model.eval()


def _restore_slice(model: nn.Module, name: str, children: nn.Sequential) -> None:
    """Put the modules of a kept slice back in their own places."""
    parent = model.get_submodule(name.partition("[")[0])
    assert isinstance(parent, nn.Sequential)
    start = int(name.partition("[")[2].split(":")[0])
    for offset, child in enumerate(children):
        parent[start + offset] = child
