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


class Entrance:
    """The way into a supernet between its blocks, looked for once, whatever subnets go through it then."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet
        self._runner: StretchRunner | None = None
        self._none = False

    def runner(self, batch: Tensor) -> StretchRunner | None:
        """Runs stretches on inputs of this shape; None where the network cannot be entered."""
        try:
            if self._runner is None and not self._none:
                self._runner = self.supernet.runner([batch])
                self._none = self._runner is None
            if self._runner is not None:
                self._runner.learn(batch)
        except UnresumableError:
            self._runner, self._none = None, True
        return self._runner


class Trail:
    """Goes through one network from block to block, so that a block costs the stretch from the one before.

    Of each batch, the map that it goes on from is held, as long as all that is held fits into `HELD` bytes. Other
    batches begin at the input again, as all do where the network cannot be entered between its blocks.

    Blocks are asked for in the order of execution. The supernet's subnet may change in between, but in front of a
    block that was asked for it stays as it was.

    Args:
        again: the same blocks will be asked for again, in the same network: maps that were gone on from are held too,
            as long as there is room.
    """

    def __init__(self, entrance: Entrance, *, again: bool = False) -> None:
        self._entrance = entrance
        self._again = again
        self._held: dict[int, dict[int, Tensor]] = {}  # batch -> position -> map

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(x.nbytes for held in self._held.values() for x in held.values())

    def input_of(self, block: str, number: int, batch: Tensor) -> Tensor:
        """What the network, as it is now, gives a block of one batch; inside `evaluating` and without gradients."""
        supernet, runner = self._entrance.supernet, self._entrance.runner(batch)
        if runner is None:
            self._held.clear()
            return inputs_of(supernet, [block], batch)[block]
        stop = runner.order.index(block)
        x = self._at(runner, stop, number, batch)
        return caught(supernet, [block], lambda: runner.run(batch, x, stop, stop + 1))[block]

    def _at(self, runner: StretchRunner, stop: int, number: int, batch: Tensor) -> Tensor:
        """A batch's map at a position, which may be changed."""
        held = self._held.setdefault(number, {})
        start = max((position for position in held if position <= stop), default=0)
        given = held.get(start, batch)
        if start == stop:
            return alike(given) if start else given
        if self._again:
            given = alike(given) if start else given
        else:
            held.clear()
        x = runner.run(batch, given, start, stop)
        if self.bytes + x.nbytes <= HELD:
            held[stop] = x
            return alike(x)
        return x


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
