"""``--allow-module``: the option of every command that may build a network."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from updp.allowed import OPTION, allow_modules
from updp.cli.console import guarded

_NAME = "allow_module"
_Modules = Annotated[
    list[str] | None,
    typer.Option(
        OPTION,
        metavar="MODULE",
        help="Import this Python module where a spec has its network made by it (`model: {python: …}`). Repeatable.",
    ),
]


def with_modules(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the option; the modules are allowed while it runs."""

    @guarded()
    def run(*args: object, **options: Any) -> None:
        with allow_modules(*(options.pop(_NAME) or ())):
            command(*args, **options)

    functools.update_wrapper(run, command)
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter(_NAME, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_Modules)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    run.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()} | {_NAME: _Modules}
    return run
