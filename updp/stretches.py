"""Running a stretch of a model, from the output of one block to the output of another.

Nothing is known about the model but its modules. Its forward is run as it is, while the modules in front of the
stretch are replaced by placeholders of the recorded shapes, filled with NaN, so that anything that reaches the result
by another way than through the blocks (a skip connection over them, say) shows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_Handler = Callable[[nn.Module, Callable[..., Any], Any, Any], Any]


class UnresumableError(Exception):
    """The model cannot be entered between its blocks; the message says why."""


@dataclass(frozen=True)
class _Recording:
    """One forward pass at one input shape: the units called, what stands in for their outputs, where the blocks are."""

    units: tuple[nn.Module, ...]
    placeholders: tuple[Any, ...]
    at: tuple[int, ...]


class _Reached(Exception):
    """Ends a forward pass behind the last block that was asked for."""


class StretchRunner:
    """Runs stretches of a model between blocks that are called one after the other.

    Positions count blocks: position 0 is the model's input, position i the output of the i-th block. A unit is a block
    or a largest module that neither contains nor lies inside a block.

    Args:
        inputs: an input of every shape that will be run. The model is run on each once, now: later its norms may be
            estimating.

    Attributes:
        order: the blocks' names in that order.

    Raises:
        UnresumableError: a block is not called exactly once, or does not return one tensor.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], inputs: Iterable[Tensor]) -> None:
        self._model = model
        self._names = {id(block): name for name, block in blocks.items()}
        self._units = list(_units(model, list(blocks.values())))
        self._recordings: dict[Any, _Recording] = {}
        self.order: tuple[str, ...] = ()
        for images in inputs:
            self.learn(images)
        for name in blocks:
            if (times := self.order.count(name)) != 1:
                raise UnresumableError(f"block {name} is called {times} times in one forward pass")

    def learn(self, images: Tensor) -> None:
        """Run the model once on an input of a shape that was not seen before; others are known already.

        Raises:
            UnresumableError: its blocks are called in another order.
        """
        if _shape(images) in self._recordings:
            return
        recording = self._record(images)
        order = tuple(self._names[id(recording.units[i])] for i in recording.at)
        if self._recordings and order != self.order:
            raise UnresumableError("the order of the blocks depends on the shape of the input")
        self._recordings[_shape(images)], self.order = recording, order

    def run(self, images: Tensor, given: Tensor | None, start: int, stop: int | None = None) -> Tensor:
        """The stretch from position ``start`` to position ``stop``, or to the model's output.

        Args:
            images: the model's input; behind position 0 only its shape matters.
            given: the activation at ``start``, which may be changed in place. Not used at position 0.

        Raises:
            UnresumableError: the model did not call its modules in the recorded order.
        """
        recording = self._recordings[_shape(images)]
        entry = recording.at[start - 1] if start else -1
        leave = None if stop is None else recording.at[stop - 1]
        cursor = -1
        reached: list[Tensor] = []

        def called(unit: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            nonlocal cursor
            cursor += 1
            if cursor >= len(recording.units) or recording.units[cursor] is not unit:
                raise UnresumableError("the model did not call its modules in the recorded order")
            if cursor <= entry:
                return given if cursor == entry else recording.placeholders[cursor]
            out = forward(*args, **kwargs)
            if cursor == leave:
                reached.append(out)
                raise _Reached
            return out

        with self._calls_go_to(called), suppress(_Reached):
            reached.append(self._model(images))
        return reached[0]

    def _record(self, images: Tensor) -> _Recording:
        units: list[nn.Module] = []
        placeholders: list[Any] = []

        def called(unit: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            if id(unit) in self._names and not isinstance(out, Tensor):
                raise UnresumableError(f"block {self._names[id(unit)]} returns {type(out).__name__}, not one tensor")
            units.append(unit)
            placeholders.append(_placeholder(out))
            return out

        with self._calls_go_to(called):
            self._model(images)
        at = tuple(i for i, unit in enumerate(units) if id(unit) in self._names)
        return _Recording(tuple(units), tuple(placeholders), at)

    @contextmanager
    def _calls_go_to(self, handler: _Handler) -> Iterator[None]:
        """Inside, every call of a unit goes to ``handler(unit, the unit's forward, args, kwargs)``."""
        before = [unit.__dict__.get("forward") for unit in self._units]
        for unit in self._units:
            unit.__dict__["forward"] = _redirected(handler, unit, unit.forward)
        try:
            yield
        finally:
            for unit, forward in zip(self._units, before, strict=True):
                del unit.__dict__["forward"]
                if forward is not None:
                    unit.__dict__["forward"] = forward


class Walk:
    """The way of several batches through a model, from block to block, each stretch run once."""

    def __init__(self, runner: StretchRunner, images: Sequence[Tensor]) -> None:
        self._runner = runner
        self._images = list(images)
        self._held = list(images)
        self._at = [0] * len(self._images)

    @property
    def order(self) -> tuple[str, ...]:
        """The blocks' names, in the order of their calls."""
        return self._runner.order

    def to(self, number: int, block: str) -> None:
        """Go on with a batch up to a block, and call the block; what it gives is not kept, only what it is given."""
        stop = self._runner.order.index(block)
        if stop > self._at[number]:
            images, held = self._images[number], self._held[number]
            self._held[number] = self._runner.run(images, held, self._at[number], stop)
            self._at[number] = stop
        self._runner.run(self._images[number], alike(self._held[number]), stop, stop + 1)


def check_stretches(runner: StretchRunner, model: nn.Module, blocks: Mapping[str, nn.Module], images: Tensor) -> None:
    """Entering the model behind any block gives the bits of the plain forward pass.

    Each stretch from one block to the next is run alone, on what the plain pass gave there. Longer stretches make the
    same calls, with true values where these have placeholders.

    Raises:
        UnresumableError: it does not, and why.
    """
    seen: dict[str, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, alike(out)))
        for name, block in blocks.items()
    ]
    try:
        plain = model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not plain.isfinite().all():
        raise UnresumableError("the network's output is not finite, so that resuming it cannot be checked")
    given = images
    for position, (block, wanted) in enumerate([*((b, seen[b]) for b in runner.order), ("", plain)]):
        behind = runner.order[position - 1] if position else "the input"
        try:
            out = runner.run(images, alike(given), position, position + 1 if block else None)
        except Exception as error:  # whatever a forward says of placeholders
            raise UnresumableError(f"the model cannot be entered behind block {behind}: {error}") from error
        if not torch.equal(out, wanted):
            raise UnresumableError(f"more than the output of block {behind} reaches what follows it")
        given = wanted


def alike(x: Tensor) -> Tensor:
    """A copy with the same strides: another layout may mean another kernel, and other bits."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def _shape(images: Tensor) -> tuple[torch.Size, torch.dtype]:
    return images.shape, images.dtype


def _redirected(handler: _Handler, unit: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: handler(unit, forward, args, kwargs)


def _units(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The blocks, and the largest modules that are not in a block, hold none, and can be called."""
    inside = {id(module) for block in blocks for module in block.modules()}
    tops = {id(block) for block in blocks}
    seen: set[int] = set()

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in seen:
            return
        seen.add(id(module))
        divided = isinstance(module, nn.ModuleList | nn.ModuleDict) or any(id(m) in inside for m in module.modules())
        if id(module) in tops or not divided:
            yield module
        elif id(module) not in inside:
            for child in module.children():
                yield from visit(child)

    yield from visit(model)


def _placeholder(value: Any) -> Any:
    """Something of the same type and shape that takes no memory and shows wherever it is used: NaN, strides 0."""
    if isinstance(value, Tensor):
        fill = float("nan") if value.is_floating_point() or value.is_complex() else 0
        return torch.full((), fill, dtype=value.dtype, device=value.device).expand(value.shape)
    if type(value) in (tuple, list):
        return type(value)(_placeholder(item) for item in value)
    if type(value) is dict:
        return {key: _placeholder(item) for key, item in value.items()}
    return value
