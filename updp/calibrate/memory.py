"""What solving takes in memory at most, whatever the number of images: told before it is begun, held by a test."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from updp.calibrate.alternating import pairs_of, shape_of_pair
from updp.calibrate.blocks import SolveSettings
from updp.calibrate.equations import Equations
from updp.calibrate.observe import record, reference_of
from updp.calibrate.rows import shape_of
from updp.calibrate.trail import HELD
from updp.hooks import Hooks
from updp.recipe import PrunedFlow
from updp.structure import evaluating
from updp.supernet import Supernet

SQUARES, PRODUCTS = 5, 8
"""While one operator is solved for: matrices of inputs x inputs and of inputs x outputs beside its equations."""
_ROWS = 3  # copies of a batch's rows: as they are gathered, and for each operator's groups
_MAPS = 4  # of the largest map of the network: what is alive at a time inside a forward pass


def equation_shapes(flow: PrunedFlow) -> list[tuple[int, int, int]]:
    """Groups, inputs and outputs of every problem that a flow poses; one of them is under way at a time."""
    shapes = [shape_of(flow.part(name)) for name in flow.composed]
    return shapes + [shape_of_pair(flow.named_parts, pair) for pair in pairs_of(flow)]


def equation_bytes(flow: PrunedFlow) -> int:
    """Of the largest problem that a flow poses: one set of equations to fit, and one held out."""
    sizes = (Equations(*shape, torch.device("meta")).bytes for shape in equation_shapes(flow))
    return 2 * max(sizes, default=0)


def solving_bytes(flow: PrunedFlow) -> int:
    """Beside the equations, while the largest problem of a flow is solved."""
    return max((8 * g * i * (SQUARES * i + PRODUCTS * o) for g, i, o in equation_shapes(flow)), default=0)


def peak_bytes(supernet: Supernet, choices: Mapping[str, str], batch: int, settings: SolveSettings) -> int:
    """What `solve_blocks` takes at most beside the network and the batch of images that it is given.

    The equations of all the blocks; what solving for one of them takes; of one batch, the maps of the network, of the
    blocks' inputs and of one block's steps, and the rows of sampled positions.

    Args:
        choices: block -> recipe: the blocks that are solved together.
        batch: images of a batch.
        settings: how many positions of a map are sampled.
    """
    flows: dict[str, PrunedFlow] = {}
    for name, recipe in choices.items():
        flow = supernet.blocks[name].choices[recipe]
        assert isinstance(flow, PrunedFlow)
        flows[name] = flow
    held = sum(equation_bytes(flow) for flow in flows.values())
    solving = max(solving_bytes(flow) + _new_bytes(flow) for flow in flows.values())
    largest, steps = _maps(supernet, list(flows))
    bound = supernet.bound
    inputs = sum(2 * _volume(bound[name].input_shape) for name in flows)
    ends = max(_volume(bound[name].input_shape) + _volume(bound[name].output_shape) for name in flows)
    rows = max(_rows(supernet, name, flow, settings) for name, flow in flows.items())
    width = next(supernet.parameters()).element_size()
    return held + solving + batch * (width * (inputs + steps + _MAPS * largest + 3 * ends) + rows)


def trail_bytes(supernet: Supernet, images: int) -> int:
    """What `solve_subnet` holds at most between two blocks: maps of the baseline and of the pruned network.

    Args:
        images: that are solved on; beyond what `HELD` allows, more take no more.
    """
    width = next(supernet.parameters()).element_size()
    largest = max(_volume(supernet.bound[name].input_shape) for name in supernet.blocks)
    return 2 * min(HELD, images * width * largest)


def _new_bytes(flow: PrunedFlow) -> int:
    """The pruned flow made anew: its operators are composed in float64."""
    return 4 * 8 * sum(tensor.numel() for tensor in flow.parameters())


def _volume(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape[1:]).numel())


def _maps(supernet: Supernet, names: list[str]) -> tuple[int, int]:
    """Entries for one image: of the network's largest map, and of all that one block's steps give."""
    example = next(supernet.parameters())
    x = torch.zeros(1, *supernet.spec.input, device=example.device, dtype=example.dtype)
    sizes = [x.numel()]

    def note(output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel())

    supernet.set_subnet(supernet.all_keep())
    with Hooks() as hooks, evaluating(supernet), torch.no_grad():
        for module in supernet.model.modules():
            hooks.after(module, note)
        supernet(x)
        steps = []
        for name in names:
            block = supernet.bound[name]
            given = x.new_zeros(1, *block.input_shape[1:])
            values = record(reference_of(block), given).values()
            steps.append(sum(value.tensor.numel() for value in values))
    return max(sizes), max(steps)


def _rows(supernet: Supernet, name: str, flow: PrunedFlow, settings: SolveSettings) -> int:
    """Bytes for one image of the rows of sampled positions, in the network's own precision and in float64."""
    shape = supernet.bound[name].input_shape
    places = _volume(shape) // max(supernet.bound[name].channels[0], 1)
    width = next(supernet.parameters()).element_size()
    entries = max(g * (i + o) for g, i, o in equation_shapes(flow))
    return min(settings.positions, places) * entries * (_ROWS * width + 8)
