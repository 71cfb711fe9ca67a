"""What a network costs and scores: operations, parameters, depth, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from updp.errors import InputError
from updp.flow import Call, FlowModule, Nodes, children
from updp.kinds import kind_of
from updp.layers import PaddedConv2d
from updp.merging import assemble, merge_blocks
from updp.spec import ArchSpec
from updp.structure import BoundBlock, evaluating, get_block
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, build_supernet


@dataclass(frozen=True)
class BlockCount:
    """One block: multiply-accumulates, parameters, convolutions and linears in a row, and what was chosen."""

    name: str
    choice: str
    macs: int
    params: int
    depth: int


@dataclass(frozen=True)
class Count:
    """Cost of a network at one input, batch 1.

    ``macs`` are multiply-accumulates of convolutions, linears and attention products, plus ``bn_weight`` per output
    element of every batch norm that is left (the papers' dialects: 0, 1, 2 or 5); the affine of an appended norm is
    not counted. ``depth`` is the longest row of convolutions and linears. ``repair_macs`` of the ``macs`` compute what
    repairs the border of convolutions that were merged with the padding where it was.
    """

    macs: int
    params: int
    bn_elements: int
    depth: int
    blocks: tuple[BlockCount, ...]
    bn_weight: int = 0
    repair_macs: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "blocks": [asdict(block) for block in self.blocks]}


@dataclass(frozen=True)
class Score:
    """Accuracies in percent, cross entropy, and how many images they are over."""

    top1: float
    top5: float
    loss: float
    images: int


def count(
    model: nn.Module,
    input: Sequence[int],
    blocks: Mapping[str, BoundBlock] | None = None,
    *,
    choices: Mapping[str, str] | None = None,
    bn_weight: int = 0,
) -> Count:
    """Count a network, merged or not, without changing it.

    Args:
        input: (channels, height, width).
        blocks: the spec's blocks as bound to the baseline: they tell the depth of blocks that are kept.
        choices: block -> choice, for the record.
    """
    elements: list[int] = []
    repair: list[int] = []
    handles = [m.register_forward_hook(_count_elements(elements)) for m in _counted_norms(model)]
    handles += [m.register_forward_hook(_count_repair(repair)) for m in model.modules() if isinstance(m, PaddedConv2d)]
    like = next(model.parameters())
    x = torch.zeros(1, *input, dtype=like.dtype, device=like.device)
    counter = _count_flops(model, x)
    for handle in handles:
        handle.remove()
    by_module = {str(k): sum(v.values()) // 2 for k, v in counter.get_flop_counts().items()}
    macs = counter.get_total_flops() // 2 + bn_weight * sum(elements)
    rows = [_count_block(model, n, b, by_module, (choices or {}).get(n, "keep")) for n, b in (blocks or {}).items()]
    inside = {id(m) for n in blocks or {} for m in _places(model, n) for m in m.modules()}
    outside = sum(kind_of(m).is_operator for m in model.modules() if id(m) not in inside)
    depth = outside + sum(row.depth for row in rows)
    params = sum(p.numel() for p in model.parameters())
    return Count(macs, params, sum(elements), depth, tuple(rows), bn_weight, sum(repair))


def count_macs(module: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one call: convolutions, linears and attention products."""
    return int(_count_flops(module, x).get_total_flops() // 2)


def _count_flops(module: nn.Module, x: Tensor) -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    with evaluating(module), torch.no_grad(), _unfused_attention(module), counter:
        module(x)
    return counter


def appended_parts(model: nn.Module) -> list[nn.Module]:
    """What recipes put behind their blocks."""
    flows = [module for module in model.modules() if isinstance(module, FlowModule)]
    return [part for flow in flows for name, part in flow.named_parts.items() if name.startswith("append.")]


def _counted_norms(model: nn.Module) -> list[nn.Module]:
    appended = {id(part) for part in appended_parts(model)}
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m) not in appended]


def _count_elements(elements: list[int]) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda module, args, output: elements.append(output.numel())


def _count_repair(macs: list[int]) -> Callable[[PaddedConv2d, Any, Tensor], None]:
    """Multiply-accumulates of the map that the taps of a merged convolution add, one for all images."""
    return lambda module, args, output: (
        None if module.taps is None else macs.append(module.taps.numel() * prod(output.shape[2:]))
    )


class _unfused_attention:
    """Attention as two matrix products, so that they are counted on every device."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [m for m in model.modules() if getattr(m, "fused_attn", False)]

    def __enter__(self) -> None:
        for module in self.modules:
            setattr(module, "fused_attn", False)  # noqa: B010

    def __exit__(self, *exc: object) -> None:
        for module in self.modules:
            setattr(module, "fused_attn", True)  # noqa: B010


def _places(model: nn.Module, name: str) -> list[nn.Module]:
    block = get_block(model, name)
    return list(block) if "[" in name and isinstance(block, nn.Sequential) else [block]


def _count_block(model: nn.Module, name: str, bound: BoundBlock, macs: Mapping[str, int], choice: str) -> BlockCount:
    places = _places(model, name)
    flow = places[0] if isinstance(places[0], FlowModule) else bound.flow
    params = sum(p.numel() for p in {id(p): p for m in places for p in m.parameters()}.values())
    base = name.partition("[")[0]
    start = int(name.partition("[")[2].partition(":")[0]) if "[" in name else 0
    paths = [f"{base}.{start + i}" for i in range(len(places))] if "[" in name else [base]
    root = type(model).__name__
    total = sum(macs.get(f"{root}.{path}", 0) for path in paths)
    return BlockCount(name, choice, total, params, flow_depth(flow.nodes, flow.named_parts))


def flow_depth(nodes: Nodes, parts: Mapping[str, nn.Module]) -> int:
    """Convolutions and linears in the longest row through a flow."""
    depth = 0
    for node in nodes:
        if isinstance(node, Call):
            part = parts[node.name]
            kind = kind_of(part)
            depth += sum(kind_of(m).is_operator for m in part.modules()) if kind.name == "opaque" else kind.is_operator
        else:
            depth += max((flow_depth(flow, parts) for flow in children(node)), default=0)
    return depth


def count_subnet(
    spec: ArchSpec,
    subnet: SubnetConfig | None = None,
    *,
    size: Sequence[int] | None = None,
    bn_weight: int = 0,
    num_classes: int | None = None,
) -> Count:
    """Count the merged network of a subnet (all kept when left out); no weights are computed.

    Args:
        size: (channels, height, width); the spec's input when left out.
        bn_weight: operations per output element of each batch norm that is left.
    """
    size = tuple(size or spec.input)
    supernet = build_supernet(spec, num_classes=num_classes, resized=True, size=(size[0], size[1], size[2]))
    supernet.set_subnet(subnet or supernet.all_keep())
    return count_supernet(supernet, size, bn_weight=bn_weight)


def count_supernet(supernet: Supernet, size: Sequence[int] | None = None, *, bn_weight: int = 0) -> Count:
    """Count what the current subnet merges to."""
    network = assemble(supernet, merge_blocks(supernet, values=False)).to("meta")
    choices = {name: supernet.subnet.choice(name) for name in supernet.bound}
    return count(network, size or supernet.spec.input, supernet.bound, choices=choices, bn_weight=bn_weight)


class Tally:
    """Adds up batches of logits and labels to a `Score`."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, float]] = []  # images, top-1, top-5 and the sum of losses of each batch

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count ``logits (N, classes)`` against ``labels (N,)``.

        Raises:
            InputError: a label that the network has no output for.
        """
        if int(labels.max()) >= logits.shape[1]:
            raise InputError(f"label {int(labels.max())} for a network of {logits.shape[1]} classes")
        logits = logits.float()
        loss = float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self.rows.append((len(labels), int(best[:, 0].sum()), int(best.any(dim=1).sum()), loss))

    @property
    def images(self) -> int:
        """How many were counted."""
        return sum(row[0] for row in self.rows)

    def score(self) -> Score:
        """The score so far.

        Raises:
            InputError: nothing was added.
        """
        images, top1, top5, loss = 0, 0, 0, 0.0
        for row in self.rows:  # one by one: `sum` adds floats in other ways in other versions of Python
            images, top1, top5, loss = images + row[0], top1 + row[1], top5 + row[2], loss + row[3]
        if not images:
            raise InputError("no images to score")
        return Score(100 * top1 / images, 100 * top5 / images, loss / images, images)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
    gather: Callable[[Any], list[Any]] | None = None,
) -> Score:
    """Accuracy and cross entropy over ``(images, labels)`` batches, in eval mode.

    Args:
        progress: called with the number of images done so far.
        gather: if the batches are one process's part, what gives every process those of all, in the batches' order.

    Raises:
        InputError: a label that the network has no output for, or no images at all.
    """
    device = device or next(model.parameters()).device
    tally = Tally()
    with evaluating(model), torch.inference_mode():
        for x, labels in batches:
            tally.add(model(x.to(device)), labels.to(device))
            if progress is not None:
                progress(tally.images)
    if gather is not None:
        tally.rows = [row for part in gather(tally.rows) for row in part]
    return tally.score()
