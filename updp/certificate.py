"""The measured proof that a merged network equals the unmerged one.

Every merged operator is held against its source on its own input, in float64: over the whole map, in the border ring
and in the interior, each by its own scale and relative to the branch without its shortcut; then every block, then the
logits. Random networks' logits hardly vary, so logits alone would hide errors; an interior alone would hide padding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from updp.flow import Across, Call, FlowModule, Nodes, Parallel, Run, rebuild, walk
from updp.layers import Layout
from updp.merging import MergedBlock, Segment, assemble, merge_blocks
from updp.randomize import randomize, settle
from updp.structure import evaluating
from updp.supernet import Supernet

BOUND = 1e-9
ROUNDING = 1e-13  # of the output's scale: what float64 leaves when the shortcut is far larger than the branch
_MARGIN = 100  # of what rounding of the blocks' outputs does to the logits, once: a merge rounds elsewhere, and oftener


@dataclass(frozen=True)
class OpRecord:
    """One merged operator: relative errors ``max|a-b| / max|b|``; ring and interior are None where there is no map."""

    block: str
    op: str
    steps: tuple[str, ...]
    error: float
    ring: float | None
    interior: float | None
    bound: float

    @property
    def worst(self) -> float:
        values = [value for value in (self.error, self.ring, self.interior) if value is not None]
        return math.inf if any(map(math.isnan, values)) else max(values)

    @property
    def ok(self) -> bool:
        return self.worst <= self.bound


@dataclass(frozen=True)
class Certificate:
    """What was proved, on which weights and at which input size.

    ``weights``: "random" (every parameter and statistic random) or "given" (the run's own).
    ``float32`` is the error of the logits in float32: recorded, not bounded.
    ``rounding`` is how much the unmerged network's logits change when each block's output changes in its last bits.
    Over hundreds of blocks random weights may amplify that beyond any bound; logits cannot agree better. Operators and
    blocks, each on its own input, are held to the same bounds at any depth.
    """

    weights: Literal["random", "given"]
    input: tuple[int, ...]
    ops: tuple[OpRecord, ...]
    blocks: Mapping[str, float]
    logits: float
    float32: float
    versions: Mapping[str, str] = field(default_factory=dict)
    rounding: float = 0.0

    @property
    def worst(self) -> float:
        return max((record.worst for record in self.ops), default=0.0)

    @property
    def ok(self) -> bool:
        blocks = all(error <= BOUND for error in self.blocks.values())
        return all(record.ok for record in self.ops) and blocks and self.logits <= self.logits_bound

    @property
    def logits_bound(self) -> float:
        """What the logits may differ by: 1e-9, or what rounding alone does if that is more."""
        return max(BOUND, _MARGIN * self.rounding)

    def failures(self) -> list[str]:
        """One line per operator, block or output that does not hold."""
        lines = [f"{r.block} {r.op}: {r.worst:.2e} > {r.bound:.1e}" for r in self.ops if not r.ok]
        lines += [f"{name}: {error:.2e} > {BOUND:.0e}" for name, error in self.blocks.items() if not error <= BOUND]
        if not self.logits <= self.logits_bound:
            lines.append(f"logits: {self.logits:.2e} > {self.logits_bound:.0e}")
        return lines

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["ops"] = [{**asdict(record), "ok": record.ok} for record in self.ops]
        return {**data, "ok": self.ok, "worst": self.worst}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Certificate:
        names = ("block", "op", "error", "ring", "interior", "bound")
        ops = tuple(OpRecord(steps=tuple(o["steps"]), **{name: o[name] for name in names}) for o in data["ops"])
        return cls(
            data["weights"],
            tuple(data["input"]),
            ops,
            dict(data["blocks"]),
            float(data["logits"]),
            float(data["float32"]),
            dict(data.get("versions", {})),
            float(data.get("rounding") or 0.0),
        )


def certify(
    supernet: Supernet,
    *,
    weights: Literal["random", "given"] = "given",
    size: Sequence[int] | None = None,
    batch: int = 2,
    seed: int = 0,
) -> Certificate:
    """Merge a float64 copy of the current subnet and measure every operator, block and the logits.

    Args:
        weights: "given": the supernet's own; "random": fill every parameter and statistic at random first.
        size: (channels, height, width); the spec's input when left out.

    Raises:
        MergeError: the subnet cannot be merged exactly.
    """
    size = tuple(size or supernet.spec.input)
    exact = copy.deepcopy(supernet).double().eval()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *size, generator=generator, dtype=torch.float64)
    x = x.to(next(exact.parameters()).device)
    if weights == "random":
        settle(randomize(exact, seed), lambda: exact(x))
    merged = merge_blocks(exact)
    network = assemble(exact, merged)
    ops: list[OpRecord] = []
    blocks: dict[str, float] = {}
    handles = [_certify_when_called(exact, block, weights, ops, blocks) for block in merged]
    with torch.no_grad():
        unmerged = exact(x)
        for handle in handles:
            handle.remove()
        logits = relative(network(x), unmerged)
        rounding = relative(_rounded_elsewhere(exact, x, seed), unmerged)
        single = relative(network.float()(x.float()).double(), exact.float()(x.float()).double())
    return Certificate(weights, (batch, *size), tuple(ops), blocks, logits, single, versions(), rounding)


def _rounded_elsewhere(network: Supernet, x: Tensor, seed: int) -> Tensor:
    """The network's logits with the output of every block changed at random by half a unit in the last place."""
    generator = torch.Generator(x.device).manual_seed(seed)

    def disturb(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=generator, dtype=output.dtype, device=output.device)
        return output * (1 + torch.finfo(output.dtype).eps * (noise - 0.5).sign())

    handles = [block.register_forward_hook(disturb) for block in network.blocks.values()]
    try:
        logits: Tensor = network(x)
    finally:
        for handle in handles:
            handle.remove()
    return logits


def _certify_when_called(
    supernet: Supernet, block: MergedBlock, weights: str, ops: list[OpRecord], blocks: dict[str, float]
) -> Any:
    def measure(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.no_grad():
            ops.extend(certify_block(block, args[0], given=weights == "given"))
            blocks[block.name] = relative(block.merged(args[0]), output)

    return supernet.blocks[block.name].register_forward_hook(measure)


def certify_block(block: MergedBlock, x: Tensor, *, given: bool = False) -> list[OpRecord]:
    """Hold every merged operator of a block against its source, each on its own input.

    Args:
        block: source and merged flow, both float64 and in eval mode.
        x: the block's input.
        given: real weights: allow float64's rounding of a shortcut far larger than the branch.
    """
    return list(_Measurement(block, given).records(block.segments, x, block.source.entry))


class _Measurement:
    """Runs segments on private copies of the parts: wiring a flow sets their layouts."""

    def __init__(self, block: MergedBlock, given: bool) -> None:
        self.name = block.name
        self.given = given
        self.extras = block.source.extras
        self.source = copy.deepcopy(block.source).eval().named_parts
        self.merged = copy.deepcopy(block.merged).eval().named_parts

    def records(self, segments: Sequence[Segment], x: Tensor, entry: Layout) -> Iterator[OpRecord]:
        for segment in segments:
            output = self.run(segment.source, self.source, x, entry)
            if segment.name is not None:
                yield self.record(segment, x, output, entry)
            node = segment.source[0]
            for branch in segment.branches:
                across = isinstance(node, Across)
                yield from self.records(branch, x.transpose(1, 2) if across else x, "last" if across else entry)
            x = output

    def run(self, nodes: Nodes, parts: Mapping[str, nn.Module], x: Tensor, entry: Layout) -> Tensor:
        out: Tensor = FlowModule(nodes, parts, entry, self.extras).eval()(x.clone())
        return out

    def record(self, segment: Segment, x: Tensor, output: Tensor, entry: Layout) -> OpRecord:
        merged = self.run(segment.merged, self.merged, x, entry)
        bare = _without_shortcut(segment.source)
        branch = output if bare == segment.source else self.run(bare, self.source, x, entry)
        steps = tuple(node.name for node in walk(segment.source) if isinstance(node, Call))
        scale = _largest(branch)
        bound = BOUND + (ROUNDING * _largest(output) / scale if self.given and scale > 0 else 0.0)
        ring, interior = _regions(merged, output, branch, entry, segment.reach)
        assert segment.name is not None
        error = relative(merged, output, branch)
        return OpRecord(self.name, segment.name, steps, error, ring, interior, bound)


def _without_shortcut(nodes: Nodes) -> Nodes:
    """The same chain with the identity branches of its sums left out."""
    out = []
    for node in nodes:
        if isinstance(node, Parallel) and any(node.flows) and not all(node.flows):
            node = Parallel(tuple(flow for flow in node.flows if flow), node.name)
        out.append(rebuild(node, _without_shortcut) if isinstance(node, Run | Parallel) else node)
    return tuple(out)


def _regions(
    merged: Tensor, output: Tensor, branch: Tensor, entry: Layout, reach: int
) -> tuple[float | None, float | None]:
    """Errors of the border ring and of the interior, each by its own scale."""
    if output.dim() != 4:
        return None, None
    rows, columns = output.shape[2:] if entry == "first" else output.shape[1:3]
    inner = torch.zeros(rows, columns, dtype=torch.bool, device=output.device)
    inner[reach : rows - reach, reach : columns - reach] = True
    masks = [~inner, inner]
    errors: list[float | None] = []
    for mask in masks:
        if not mask.any():
            errors.append(None)
            continue
        select = (lambda t, m=mask: t[:, :, m]) if entry == "first" else (lambda t, m=mask: t[:, m])
        errors.append(relative(select(merged), select(output), select(branch)))
    return errors[0], errors[1]


def relative(value: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """``max|value - reference| / max|scale|``; NaN and shapes that differ are infinitely wrong."""
    if value.shape != reference.shape:
        return math.inf
    difference, size = _largest(value - reference), _largest(reference if scale is None else scale)
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size > 0 else (0.0 if difference == 0 else math.inf)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import timm

    from updp import __version__

    return {"updp": __version__, "torch": torch.__version__, "timm": timm.__version__}


def merge(supernet: Supernet, *, certificate_size: Sequence[int] | None = None) -> tuple[nn.Module, Certificate]:
    """Merge the current subnet into a new plain network, in eval mode, with its certificate.

    Kept blocks are the baseline's own modules; every pruned block is merged. The supernet is not changed.

    Raises:
        MergeError: a block cannot be merged exactly; nothing is approximated.
    """
    with evaluating(supernet):
        merged = merge_blocks(supernet)
        network = assemble(supernet, merged)
        certificate = certify(supernet, weights="given", size=certificate_size)
    return network, certificate
