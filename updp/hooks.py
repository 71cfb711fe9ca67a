"""Watching a forward pass: hooks on modules and on methods, gone afterwards."""

from __future__ import annotations

from typing import Any

from torch import nn


def resolve(block: nn.Module, path: str) -> Any:
    """The submodule, parameter or method at a path."""
    target: Any = block
    for name in path.split("."):
        target = getattr(target, name)
    return target


def is_own_method(block: nn.Module, path: str) -> bool:
    """Whether a path names a method that the block's class adds to what every module has."""
    return path.isidentifier() and not hasattr(nn.Module, path) and callable(getattr(block, path, None))


class Hooks:
    """Forward hooks that are gone afterwards, methods of blocks included."""

    def __enter__(self) -> Hooks:
        self._undo: list[Any] = []
        return self

    def __exit__(self, *exc: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def before(self, module: nn.Module, call: Any) -> None:
        handle = module.register_forward_pre_hook(lambda m, args, kwargs: call(args, kwargs), with_kwargs=True)
        self._undo.append(handle.remove)

    def after(self, module: nn.Module, call: Any) -> None:
        handle = module.register_forward_hook(lambda m, args, output: call(output))
        self._undo.append(handle.remove)

    def step(self, block: nn.Module, path: str, call: Any) -> None:
        try:
            target = resolve(block, path)
        except AttributeError:
            return  # reported when the step is bound
        if isinstance(target, nn.Module):
            self.before(target, call)
        elif is_own_method(block, path):

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                call(args, kwargs)
                return target(*args, **kwargs)

            object.__setattr__(block, path, wrapped)
            self._undo.append(lambda: object.__delattr__(block, path))
