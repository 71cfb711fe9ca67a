"""The network that a spec names: one of timm's, or what a function of the user's own module makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import nn

from updp.allowed import current_directory_last, describe, find_function
from updp.errors import Place, Problem, SpecError, suggest
from updp.spec import ArchSpec


def create_model(
    spec: ArchSpec,
    *,
    num_classes: int | None = None,
    seed: int | None = None,
    drop_path: float | None = None,
    input: tuple[int, int, int] | None = None,
) -> nn.Module:
    """The spec's network, randomly initialised (nothing is downloaded).

    Args:
        num_classes: of its head; its own number if left out.
        drop_path: build with this rate, where the model takes one.
        input: (channels, height, width) when it is not the spec's own.

    Raises:
        SpecError: timm does not know the model or refuses the arguments; the spec names a function of a Python module
            that the user did not allow, or which gives no such network.
    """
    kwargs: dict[str, Any] = dict(spec.model.kwargs)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if spec.input[0] != 3:
        kwargs["in_chans"] = spec.input[0]
    if input is not None and "img_size" in kwargs:
        kwargs["img_size"] = input[1:]
    if drop_path is not None:
        kwargs["drop_path_rate"] = drop_path
    if spec.model.module is not None:
        return _from_python(spec, kwargs, seed)
    if seed is not None:
        torch.manual_seed(seed)
    return _from_timm(spec, kwargs)


# --- timm ---


def _from_timm(spec: ArchSpec, kwargs: Mapping[str, Any]) -> nn.Module:
    name, place = spec.model.name, spec.model.place or Place(spec.file)
    if not timm.is_model(name):
        similar = timm.list_models(f"{name[:4]}*")
        raise SpecError([Problem(place, "model.timm", suggest(name, similar or timm.list_models()[:5]))])
    without_drop = {key: value for key, value in kwargs.items() if key != "drop_path_rate" or key in spec.model.kwargs}
    try:
        try:
            return timm.create_model(name, pretrained=False, **kwargs)
        except TypeError:
            if without_drop == kwargs:
                raise
            return timm.create_model(name, pretrained=False, **without_drop)  # this family takes no drop path
    except Exception as error:  # whatever a constructor says of arguments it cannot take
        shown = f"timm refuses {name} with {without_drop}: {error}"
        raise SpecError([Problem(place, "model", shown)]) from error


# --- a function of the user's own ---


def _from_python(spec: ArchSpec, kwargs: dict[str, Any], seed: int | None) -> nn.Module:
    """Call the function with what the spec says and, of what updp sets, with what it takes."""
    function = find_function(spec.model, spec.file)
    takes = _parameters(function)
    asked = kwargs.get("num_classes")
    refused = {"num_classes", "in_chans", "drop_path_rate"} - set(takes) - set(spec.model.kwargs)
    if "**" in takes:  # which goes on to who knows what, but to none without a number of classes
        refused &= {"drop_path_rate"}
    kwargs = {key: value for key, value in kwargs.items() if key not in refused}
    if seed is not None:
        torch.manual_seed(seed)
    try:
        with current_directory_last():  # it may import when it is called
            model = function(**kwargs)
    except Exception as error:
        raise _refusal(spec, f"{spec.model} fails with {kwargs}: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise _refusal(spec, f"{spec.model} gives a {type(model).__name__}, allowed: a torch.nn.Module")
    if not isinstance(getattr(model, "num_classes", None), int):
        classes = kwargs.get("num_classes", takes.get("num_classes"))
        if not isinstance(classes, int):
            how = "give the network an attribute num_classes, or the function an argument of that name"
            raise _refusal(spec, f"{spec.model} does not say how many classes it has: {how}")
        model.num_classes = classes  # type: ignore[assignment]  # a plain attribute
    if asked not in (None, model.num_classes):
        wrong = f"asked for {asked} classes, {spec.model} gives {model.num_classes}"
        why = "" if "num_classes" in kwargs else ": it takes no argument num_classes"
        raise _refusal(spec, wrong + why)
    return model


def _parameters(function: Callable[..., object]) -> dict[str, Any]:
    """The arguments that a function takes, with their defaults; ``**`` if it takes any."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not every callable tells
        return {"**": None}
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    names = {parameter: "**" if parameter.kind is parameter.VAR_KEYWORD else parameter.name for parameter in found}
    return {name: parameter.default for parameter, name in names.items() if parameter.kind in kinds}


def _refusal(spec: ArchSpec, message: str) -> SpecError:
    return SpecError([Problem(spec.model.place or Place(spec.file), "model.python", message)])
