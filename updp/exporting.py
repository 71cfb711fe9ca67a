"""A merged network for other runtimes: ONNX or `torch.export`, without custom operators, batch size free."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from updp.artefact import inspect, load
from updp.certificate import relative
from updp.errors import CertificateError, InputError, suggest
from updp.files import replacing

Format: TypeAlias = Literal["onnx", "torch-export"]
SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCE = 1e-4  # of max|logits|: another runtime's float32


@dataclass(frozen=True)
class Exported:
    """Where the export is, and how far its logits are from the network's (``max|a-b| / max|b|``), or None unchecked."""

    path: Path
    format: Format
    error: float | None
    note: str = ""


def export(path: str | Path, format: Format = "onnx", out: str | Path | None = None) -> Exported:
    """Export a saved merged network and check the export at two batch sizes.

    Args:
        path: a network saved by updp.
        out: where to write; beside the network when left out.

    Raises:
        InputError: unknown format, a missing package, or a network of updp that is not there.
        CertificateError: the exported network computes something else.
    """
    if format not in SUFFIX:
        raise InputError(f"export format: {suggest(format, SUFFIX)}")
    header = inspect(path)
    target = Path(out) if out is not None else Path(path).with_suffix(SUFFIX[format])
    return export_network(load(path), header.spec.input, target, format)


def export_network(network: nn.Module, input: tuple[int, int, int], out: Path, format: Format) -> Exported:
    """Export a network in eval mode; ``input`` is (channels, height, width)."""
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
        if missing:
            raise InputError(f"exporting ONNX needs {' and '.join(missing)}: pip install 'updp[export]'")
    network = network.eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *input, generator=generator)
    with quiet(), torch.no_grad():
        program = torch.export.export(network, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        with replacing(out) as temporary:
            if format == "onnx":
                _write_onnx(program, x, temporary)
            else:
                torch.export.save(program, temporary)
            error = _check(network, x, temporary, format)
            if error is not None and not error <= TOLERANCE:
                raise CertificateError(f"{out}: the exported network differs by {error:.1e} from the merged one")
    note = "" if error is not None else "not checked: onnxruntime is not installed"
    return Exported(out, format, error, note)


def _write_onnx(program: Any, x: Tensor, path: Path) -> None:
    exported = torch.onnx.export(
        program,
        (x[:2],),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    exported.save(str(path))


def _check(network: nn.Module, x: Tensor, path: Path, format: Format) -> float | None:
    """The worst error over batches of 1 and 3."""
    if format == "onnx":
        if find_spec("onnxruntime") is None:
            return None
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(batch: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
    else:
        reloaded = torch.export.load(path).module()

        def run(batch: Tensor) -> Tensor:
            out: Tensor = reloaded(batch)
            return out

    return max(relative(run(batch), network(batch)) for batch in (x[:1], x))


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters report their own deprecations and progress; none of it concerns the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
