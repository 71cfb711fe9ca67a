"""Networks from given weights: what a file must be, to be a spec's network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from updp.artefact import load_state, read_weights
from updp.data import Data
from updp.errors import InputError
from updp.packaged import find_weights, known_names
from updp.spec import ArchSpec
from updp.structure import create_model


def model_with_weights(spec: ArchSpec, weights: str | Path, data: Data | None) -> nn.Module:
    """The spec's network with weights from a file, of as many classes as the file has.

    Args:
        weights: as `find_weights` takes them: a file, or the word ``package``.

    Raises:
        InputError: the weights are not there or another network's, or their classes are not the data's.
    """
    file = find_weights(weights, spec.model.name)
    model, tensors = create_model(spec), read_weights(file)
    if (names := known_names(file, spec.model.name)) is not None:
        new = names(tensors, model.state_dict())
        tensors = {new[name]: tensor for name, tensor in tensors.items()}
    classes = _classes_in(tensors, model) or (None if data is None else data.num_classes or None)
    if classes not in (None, num_classes_of(model)):
        model = create_model(spec, num_classes=classes)
    load_state(model, tensors, file)
    _check_finite(tensors, file)
    if data is not None:
        data.check_classes(num_classes_of(model))
    return model


def _check_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise InputError(f"{file}: {wrong[0]}{more}: has values that are not finite (NaN or infinity)")


def _classes_in(tensors: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """How many classes the head in a file has; None where the file has no such head."""
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    sizes = [tensors.get(f"{head}.weight") for head in ([heads] if isinstance(heads, str) else heads)]
    return int(sizes[0].shape[0]) if sizes and sizes[0] is not None and sizes[0].ndim else None


def num_classes_of(model: nn.Module) -> int:
    """How many classes a model tells apart."""
    return int(model.num_classes)  # type: ignore[arg-type]
