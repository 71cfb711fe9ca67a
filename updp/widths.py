"""What a flow does with shapes, told by one run: the channels at every step, and the step at which it stops."""

from __future__ import annotations

from torch import Tensor, no_grad

from updp.flow import Call, FlowModule, Nodes, children
from updp.hooks import Hooks
from updp.kinds import kind_of
from updp.structure import evaluating

# What torch and timm raise where channels, sizes or arguments do not fit.
MISFITS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, AttributeError)


def widths_of(flow: FlowModule, x: Tensor) -> dict[str, tuple[int, int]]:
    """Input and output channels of every step, from one run in eval mode."""
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}

    def note(found: dict[str, int], name: str, layout: str, tensor: Tensor) -> None:
        found.setdefault(name, tensor.shape[1] if layout == "first" and tensor.dim() == 4 else tensor.shape[-1])

    with Hooks() as hooks, evaluating(flow), no_grad():
        for name, part in flow.named_parts.items():
            layout = kind_of(part).layout or getattr(part, "layout", None) or _nearest_layout(flow, name)
            hooks.before(part, lambda args, kwargs, n=name, at=layout: note(inputs, n, at, args[0]))
            hooks.after(part, lambda output, n=name, at=layout: note(outputs, n, at, output))
        flow(x)
    return {name: (width, outputs[name]) for name, width in inputs.items()}


def _nearest_layout(flow: FlowModule, name: str) -> str:
    """The layout around a step that works in either: what the program has reached there."""

    def search(program: Nodes, current: str) -> str | None:
        for node in program:
            if isinstance(node, Call):
                if node.name == name:
                    return current
            elif hasattr(node, "layout"):
                current = node.layout
            else:
                for inner in children(node):
                    if (found := search(inner, current)) is not None:
                        return found
        return None

    return search(flow.program, flow.entry) or flow.entry


def misfit(flow: FlowModule, x: Tensor, shape: tuple[int, ...] | None = None) -> str | None:
    """Where and why a flow does not run on ``x`` or gives another shape, as a predicate; None where all is well."""
    entered: list[str] = []
    left: list[str] = []
    with Hooks() as hooks, evaluating(flow), no_grad():
        for name, part in flow.named_parts.items():
            hooks.before(part, lambda args, kwargs, name=name: entered.append(name))
            hooks.after(part, lambda output, name=name: left.append(name))
        try:
            out = flow(x)
        except MISFITS as failure:
            inside = len(entered) > len(left)
            behind = f"in a sum, behind step {left[-1]!r}" if left else "at its start"
            place = f"at step {entered[-1]!r}" if inside else behind
            return f"does not run {place}: {(str(failure).splitlines() or ['?'])[0]}"
    if shape is not None and tuple(out.shape) != shape:
        return f"gives {list(out.shape)}, the block gives {list(shape)}"
    return None
