"""What a network gives its blocks: of all images, batch by batch, as block after block is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from torch import Tensor

from updp.stretches import StretchRunner, UnresumableError, alike
from updp.supernet import Supernet

Images: TypeAlias = Callable[[], Iterable[Tensor]]
"""Gives the same batches ``(N, C, H, W)`` each time it is called."""

HELD = 1 << 29
"""Bytes of maps that one trail holds at most."""


class Trail:
    """Goes through one network from block to block, so that a block costs the stretch from the one before.

    Between two blocks, the map that the first goes on from is held: of as many batches as fit into `HELD` bytes. The
    others begin at the input again, as all do where the network cannot be entered between its blocks.

    Blocks are asked for in the order of execution. The supernet's subnet may change in between, but in front of a
    block that was asked for it stays as it was.
    """

    def __init__(self, supernet: Supernet) -> None:
        self._supernet = supernet
        self._runner: StretchRunner | None = None
        self._held: dict[int, tuple[int, Tensor]] = {}  # batch -> position and map
        self._enters = True

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(x.nbytes for _, x in self._held.values())

    def input_of(self, block: str, number: int, batch: Tensor) -> Tensor:
        """What the network, as it is now, gives a block of one batch; inside `evaluating` and without gradients."""
        runner = self._runner_for(batch)
        if runner is None:
            return inputs_of(self._supernet, [block], batch)[block]
        stop, x = self._go(runner, block, number, batch)
        return caught(self._supernet, [block], lambda: runner.run(batch, x, stop, stop + 1))[block]

    def _go(self, runner: StretchRunner, block: str, number: int, batch: Tensor) -> tuple[int, Tensor]:
        """The position in front of a block, and a batch's map there, which may be changed."""
        start, given = self._held.pop(number, (0, batch))
        stop = runner.order.index(block)
        if start > stop:  # the model has its blocks in another order than that of their execution
            start, given = 0, batch
        x = given if start == stop else runner.run(batch, given, start, stop)
        if stop and self.bytes + x.nbytes <= HELD:
            self._held[number] = stop, x
            return stop, alike(x)
        return stop, x

    def _runner_for(self, batch: Tensor) -> StretchRunner | None:
        try:
            if self._runner is None and self._enters:
                self._runner = self._supernet.runner([batch])
                self._enters = self._runner is not None
            if self._runner is not None:
                self._runner.learn(batch)
        except UnresumableError:
            self._runner, self._enters = None, False
            self._held.clear()
        return self._runner


class _Caught(Exception):
    """Stops a forward pass behind what was asked for."""


def inputs_of(supernet: Supernet, names: Iterable[str], x: Tensor) -> dict[str, Tensor]:
    """What a network gives some of its blocks; the blocks behind the last of them do not run."""
    return caught(supernet, names, lambda: supernet(x))


def caught(supernet: Supernet, names: Iterable[str], forward: Callable[[], object]) -> dict[str, Tensor]:
    """What blocks are given while the network runs, which ends at the last of them."""
    found: dict[str, Tensor] = {}
    wanted = set(names)

    def catch(name: str, value: Tensor) -> None:
        found[name] = value
        if found.keys() == wanted:
            raise _Caught

    blocks = supernet.blocks
    handles = [
        blocks[name].register_forward_pre_hook(lambda module, args, name=name: catch(name, args[0])) for name in wanted
    ]
    try:
        forward()
    except _Caught:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found
