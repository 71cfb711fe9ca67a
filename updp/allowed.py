"""Modules of the user's own that may be imported: none, unless the user names them.

A spec may say that a function of some Python module builds its network. A file must never cause an import: neither a
spec, nor the spec in a run's directory, nor the one that a saved network carries. So a module is imported only after
the user has named it, on the command line (``--allow-module NAME``) or in Python (`allow_modules`).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from updp.errors import InputError, Place, Problem, SpecError, suggest
from updp.spec import ModelSource

OPTION = "--allow-module"

_allowed: frozenset[str] = frozenset()


class allow_modules:
    """Allow specs to have their networks built by functions of these modules.

    For the rest of the program, or within a block::

        updp.allow_modules("my_networks")
        with updp.allow_modules("my_networks"):
            network = updp.load("net.safetensors")

    Args:
        names: each as in an import statement. A package does not stand for the modules in it.

    Raises:
        InputError: a name that no module can have.
    """

    def __init__(self, *names: str) -> None:
        global _allowed
        for name in names:
            if not all(part.isidentifier() for part in name.split(".")):
                allowed = "the name of a Python module, as in an import statement"
                raise InputError(f"{OPTION}: got {name!r}, allowed: {allowed}")
        self._before = _allowed
        _allowed |= set(names)

    def __enter__(self) -> allow_modules:
        return self

    def __exit__(self, *exc: object) -> None:
        global _allowed
        _allowed = self._before


def find_function(source: ModelSource, file: str) -> Callable[..., Any]:
    """The function that a spec names, once its module is allowed.

    Args:
        file: of the spec, for messages.

    Raises:
        SpecError: the module is not allowed, not found or cannot be imported; it has no such function of its own.
    """
    place = source.place or Place(file)
    assert source.module is not None
    if source.module not in _allowed:
        message = f"the network is made by the Python module {source.module!r}, and no file makes updp import one"
        how = f"if you trust it, add {OPTION} {source.module} (in Python: updp.allow_modules({source.module!r}))"
        raise _refusal(place, f"{message}: {how}")
    with current_directory_last():
        module = _imported(source.module, place)
    found: Any = getattr(module, source.name, None)
    if not _is_own(found, source.module):
        own = [name for name, value in vars(module).items() if name[0] != "_" and _is_own(value, source.module)]
        where = f"no function or class {source.name!r} is defined in {source.module!r} ({module.__file__})"
        raise _refusal(place, f"{where}: {suggest(source.name, own)}")
    made: Callable[..., Any] = found
    return made


@contextmanager
def current_directory_last() -> Iterator[None]:
    """Inside, modules are also found in the current directory, after everywhere else."""
    here = os.getcwd()
    if added := here not in sys.path:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _imported(name: str, place: Place) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a module does when it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            message = f"no module {error.name!r} on sys.path or in the current directory ({os.getcwd()})"
            raise _refusal(place, message) from None
        raise _refusal(place, f"module {name!r} cannot be imported: {describe(error)}") from error


def _is_own(value: object, module: str) -> bool:
    """Whether a value is a function or class of this module or its package: what it imported, a file may not call."""
    home = getattr(value, "__module__", None)
    package = module.partition(".")[0]
    return callable(value) and isinstance(home, str) and home.partition(".")[0] == package


def describe(error: Exception) -> str:
    """An error that is not updp's, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _refusal(place: Place, message: str) -> SpecError:
    return SpecError([Problem(place, "model.python", message)])
