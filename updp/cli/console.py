"""How commands speak: results on stdout, errors on stderr in one message, and the exit status."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TextIO

import typer
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from updp.errors import InputError, ProcessError, UpdpError
from updp.files import json_text
from updp.pipeline.program import command_line, is_first

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C
TERMINATED = 128 + signal.SIGTERM

FIRST = is_first()
SEVERAL = int(os.environ.get("WORLD_SIZE", "1")) > 1
if SEVERAL:  # before torch is there: it would warn of what every training does
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
_TERMINATED = "Terminated (SIGTERM)" + (", perhaps since another process of the run ended. " if SEVERAL else ". ")
_PIPED = 160  # columns of output that no terminal limits


def _console(stream: TextIO, *, stderr: bool) -> Console:
    width = None if stream.isatty() else _PIPED
    return Console(stderr=stderr, highlight=False, width=width, quiet=not FIRST and not stderr)


out = _console(sys.stdout, stderr=False)
err = _console(sys.stderr, stderr=True)

P = ParamSpec("P")


def guarded(
    again: str = "Nothing was left half-written.",
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a command end as commands do: an error is one message and its exit status, Ctrl-C is 130, SIGTERM 143.

    Args:
        again: what to say after Ctrl-C and SIGTERM.
    """

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            with _terminable():
                try:
                    command(*args, **kwargs)
                except (Exception, KeyboardInterrupt) as error:
                    if isinstance(error, typer.Exit):
                        raise
                    if _received:  # whatever else went wrong: its workers and libraries got the signal, too
                        _stopped(_TERMINATED, again, TERMINATED)
                    if isinstance(error, KeyboardInterrupt):
                        _stopped("Interrupted. ", again, INTERRUPTED)
                    if not isinstance(error, UpdpError):
                        raise
                    _failed(error, again)

        return run

    return decorate


def _verdict(status: int) -> tuple[bool, int]:
    """Whether this process tells why the command ends, and the exit status: one of several tells, and all agree."""
    if not SEVERAL:
        return True, status
    from updp.processes import verdict

    return verdict(status)


def _failed(error: UpdpError, again: str) -> NoReturn:
    """Say what went wrong; how to go on, where that is no fault of the command's."""
    tells, status = _verdict(error.exit_status)
    if tells:
        show_error(error)
        if isinstance(error, ProcessError):
            _show_how_to_go_on("", again)
    _leave(status)


def _stopped(how: str, again: str, status: int) -> NoReturn:
    """Say that the command was stopped, and how to go on; of several processes one says it for all."""
    tells, status = _verdict(status)
    if tells:
        _show_how_to_go_on(how, again)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End with a status; one of several processes at once: at its end a library may wait for one that is gone."""
    if not SEVERAL:
        raise typer.Exit(status) from None
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _show_how_to_go_on(why: str, again: str) -> None:
    line(err, why, again, style="bold yellow")
    line(err, "  ", command_line(), rest="bold")


class Terminated(KeyboardInterrupt):
    """The process was asked to end, as Slurm and torchrun do: work ends as with Ctrl-C."""


_received: list[int] = []


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: ending is under way
    _received.append(number)
    raise Terminated("SIGTERM")


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`; not where a program has its own handler."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    _received.clear()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def show_error(error: UpdpError) -> None:
    """The error as one message; several problems one a line."""
    problems = error.problems if isinstance(error, InputError) else ()
    if len(problems) < 2:
        line(err, "error: ", str(error) or type(error).__name__, style="bold red")
        return
    line(err, f"error: {len(problems)} problems", style="bold red")
    for problem in problems:
        line(err, "  ", str(problem))


def line(console: Console, first: str, rest_text: str = "", *, style: str = "", rest: str = "") -> None:
    """One line that is never wrapped or parsed as markup, so that paths and YAML come out as they are."""
    console.print(Text.assemble((first, style), (rest_text, rest)), soft_wrap=True)


def print_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """JSON for programs, on stdout and uncoloured."""
    sys.stdout.write(json_text(data))


def table(*columns: str) -> Table:
    """A table in the house style: names that start with ``>`` are right-aligned, those with ``~`` may be wrapped."""
    result = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        justify: JustifyMethod = "right" if name.startswith(">") else "left"
        result.add_column(name.lstrip(">~"), justify=justify, no_wrap=not name.startswith("~"))
    return result


def quantity(value: float, digits: int = 3) -> str:
    """A count for people: 519.4 M, 2.57 G. From 100 up there are four digits at least."""
    size, unit = 1.0, ""
    for larger, its in ((1e3, " k"), (1e6, " M"), (1e9, " G")):
        if abs(_rounded(value / size, digits)) >= 1000:  # rounded first: 999.96 M are 1 G
            size, unit = larger, its
    return f"{_rounded(value / size, digits):g}{unit}"


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits if abs(value) < 100 else max(digits, 4)}g}")


def error_size(value: float | None) -> str:
    """How large an error is; JSON has no number for one that is not finite."""
    return "–" if value is None else f"{value:.0e}"


def percent(value: float | None) -> str:
    """An accuracy, which is in percent already."""
    return "–" if value is None else f"{value:.2f} %"


def duration(seconds: float | None) -> str:
    """4.2 s, 3:07 or 1:02:03."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
