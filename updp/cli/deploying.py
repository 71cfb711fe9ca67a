"""The command ``deploy``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from updp.cli.console import err, error_size, guarded, line, out, print_json, table
from updp.cli.networks import Json, Network
from updp.cli.progress import ConsoleWatch

if TYPE_CHECKING:
    from updp.deployment import Choice
    from updp.deployment.trial import Memory, Trial


RUN = ("apart", "strips")
"""The forms of runs of convolutions."""


@guarded()
def deploy(
    path: Network,
    batch: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="Images at a time that it shall be fast \
at.")] = 1,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Follow this plan instead of measuring.")] = None,
    save: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the plan goes; beside the network \
if left out.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew what was measured on this machine.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Find the fastest form of every layer of a saved network on this CPU, and save the plan.

    Norms are folded, and every convolution and linear layer runs with what follows it in one call: of a kernel of
    updp's, of oneDNN or of torch, whichever is fastest inside the network, on these threads and this batch size.
    In Python: updp.deploy(updp.load(PATH), images, plan=FILE).
    """
    from updp.deployment.trial import try_saved
    from updp.pipeline.prepare import choose_device

    choose_device("cpu", threads)
    with ConsoleWatch(err).task("deploy", None) as advance:
        found = try_saved(path, batch=batch, plan=plan, out=save, cache=not fresh, progress=advance)
    if json:
        print_json(found.to_json())
        return
    _show_choices(found.plan.choices)
    _show_network(found, batch)
    out.print()
    where = f"plan: {found.path}"
    line(
        out, where, f"  In Python: updp.deploy(updp.load({str(path)!r}), images, plan={str(found.path)!r})", rest="dim"
    )


def _show_choices(choices: tuple[Choice, ...]) -> None:
    shown = table("layer", "what it computes", ">input", "form", ">ms", ">torch's best")
    for each in choices:
        own, gain = each.times.get(each.form), each.gain
        against = "" if gain is None or each.form in ("torch", "onednn") else f"{gain:.2f}x"
        shown.add_row(
            each.name, _problem(each), "x".join(map(str, each.input)), _form(each.form),
            "" if own is None else f"{own:.3f}", Text(against, "green"),
        )  # fmt: skip
    out.print(shown)


def _problem(choice: Choice) -> str:
    """What is computed; of runs, how many convolutions they have: each has its own line."""
    return choice.problem if choice.form not in RUN else f"{choice.problem.count(', ') + 1} convolutions"


def _form(name: str) -> str:
    """The algorithm and the instruction set of a kernel; other names as they are."""
    parts = name.split("_")
    return f"{parts[1]} {parts[-1]}" if len(parts) == 4 else name


def _show_network(found: Trial, batch: int) -> None:
    environment = found.plan.environment
    shown = table("", f">batch {batch}", ">quartiles", ">weights", ">maps")
    for name, timing, memory in (
        ("torch, channels last", found.before, found.memory_before),
        ("deployed", found.after, found.memory_after),
    ):
        spread = f"{timing.low_ms:.2f} to {timing.high_ms:.2f}"
        shown.add_row(name, f"{timing.median_ms:.2f} ms", spread, *_megabytes(memory))
    out.print()
    out.print(shown)
    style = "green" if found.faster.ratio > 1 else "yellow"
    out.print(Text(f"{found.faster.ratio:.2f}x as fast", style), f"({found.faster.low:.2f} to {found.faster.high:.2f})")
    told = f"outputs differ by {error_size(found.error)} of the largest; measured in turns: {environment.get('cpu')}, "
    line(out, f"{told}{environment.get('threads')} threads, torch {environment.get('torch')}", style="dim")


def _megabytes(memory: Memory) -> tuple[str, str]:
    return f"{memory.weights / 1e6:.1f} MB", f"{memory.maps / 1e6:.1f} MB"
