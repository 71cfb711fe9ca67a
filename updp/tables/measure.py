"""What a network of a table has: counted on shapes alone, so that nothing is computed or downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import timm
import torch
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp.errors import InputError, Problem, suggest
from updp.kinds import kind_of
from updp.merging import assemble, merge_blocks
from updp.oracle import appended_parts, count
from updp.spec import load_spec
from updp.structure import create_model
from updp.subnet import SubnetConfig, load_subnet
from updp.supernet import Supernet, build_supernet
from updp.tables.read import Row
from updp.tables.space import channels, genes


@dataclass(frozen=True)
class Measured:
    """A network at one size.

    Attributes:
        macs: of convolutions, linear layers and attention products.
        repair_macs: how many of them compute what repairs the border of merged convolutions.
        elements: what is charged besides -> how many elements; batch norms without those that recipes append.
        appended_elements: of the batch norms that recipes append.
        trained: blocks that a recipe only reparameterizes and that are counted as in training.
        params: parameters by name.
        appended: how many of them are of what recipes append.
        genes: widths that can be chosen, where a figure of the search space asks for them.
        channels: that come into layers, without the first.
    """

    macs: int
    repair_macs: int
    elements: Mapping[str, int]
    appended_elements: int
    trained: tuple[str, ...]
    params: Mapping[str, int]
    appended: int
    genes: tuple[int, ...] = ()
    channels: int = 0


def measure(row: Row) -> Measured:
    """Build the network of a row and count it.

    Raises:
        InputError: it cannot be built, or counted, as the row says.
    """
    assert row.network is not None
    try:
        model, trained = built(row.network, row.size, trained=row.trained)
        found = measured(model, row.size, row.charged, trained)
        return replace(found, genes=genes(model), channels=channels(model)) if row.searched else found
    except InputError as error:
        raise InputError([Problem(row.place, row.name, str(problem)) for problem in error.problems]) from None
    except (RuntimeError, AssertionError, ValueError) as error:  # a size that the network does not take
        message = f"cannot be counted at {row.size}x{row.size}: {error}"
        raise InputError([Problem(row.place, row.name, message)]) from error


def measured(model: nn.Module, size: int, charged: Iterable[str] = (), trained: Sequence[str] = ()) -> Measured:
    """Count a network at one size, and the elements of what is charged: hooks go nowhere else.

    Raises:
        InputError: attention is charged, and a module does it in a way that nothing here knows.
    """
    model.eval()
    appended = appended_parts(model)
    with _elements(model, charged, appended) as elements:
        found = count(model, (3, size, size))
    behind = elements.pop("appended")
    if "batchnorm" in elements:
        elements["batchnorm"] = found.bn_elements
    params = {name: parameter.numel() for name, parameter in model.named_parameters()}
    extra = sum(parameter.numel() for part in appended for parameter in part.parameters())
    return Measured(found.macs, found.repair_macs, elements, behind, tuple(trained), params, extra)


# --- how a network is built ---


def built(network: Mapping[str, Any], size: int, *, trained: bool = False) -> tuple[nn.Module, tuple[str, ...]]:
    """The network that a row describes, without values, and which of its blocks are as in training.

    Args:
        trained: leave blocks that a recipe only reparameterizes as they are in training, norms and all.
    """
    with torch.device("meta"):
        if "spec" in network:
            return _from_spec(network["spec"], network.get("subnet"), size, trained)
        if "timm" in network:
            kwargs = {key: value for key, value in network.items() if key not in ("timm", "deployed")}
            return _from_timm(network["timm"], kwargs, bool(network.get("deployed"))), ()
        return nn.Sequential(*_layers(network["chain"], 3)[0]), ()


def _from_spec(name: str, subnet: str | None, size: int, trained: bool) -> tuple[nn.Module, tuple[str, ...]]:
    if subnet is None:
        return create_model(load_spec(name), input=(3, size, size)), ()
    supernet = _supernet(name, size)
    config = load_subnet(subnet, name)
    config.check(name, supernet.recipes)
    left = tuple(sorted(block for block in config.choices if trained and block not in supernet.available))
    supernet.set_subnet(SubnetConfig(name, {block: config.choices[block] for block in config.choices.keys() - left}))
    return assemble(supernet, merge_blocks(supernet, values=False)), left


@lru_cache(maxsize=1)  # rows of one network stand together
def _supernet(name: str, size: int) -> Supernet:
    with torch.device("meta"):
        return build_supernet(load_spec(name), resized=True, size=(3, size, size))


def _from_timm(name: str, kwargs: Mapping[str, Any], deployed: bool) -> nn.Module:
    if not timm.is_model(name):
        similar = timm.list_models(f"{name[:4]}*") or timm.list_models()[:5]
        raise InputError(f"no such model of timm: {suggest(name, similar)}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
    except Exception as error:  # whatever a constructor says of arguments it cannot take
        raise InputError(f"timm refuses {name} with {dict(kwargs)}: {error}") from error
    return reparameterize_model(model) if deployed else model


def _layers(chain: Sequence[Any], channels: int) -> tuple[list[nn.Module], int]:
    """The layers of a chain, and how many channels come out of it."""
    layers: list[nn.Module] = []
    for item in chain:
        if item == "pool":
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        elif "linear" in item:
            layers.append(nn.Linear(channels, item["linear"]))
            channels = item["linear"]
        elif "repeat" in item:
            for _ in range(item["repeat"]):
                inner, channels = _layers(item["chain"], channels)
                layers += inner
        else:
            groups = channels if "depthwise" in item else 1
            kernel = item.get("depthwise") or item.get("kernel", 1)
            out = item.get("conv", channels)
            stride = item.get("stride", 1)
            layers.append(nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False))
            layers.append(nn.BatchNorm2d(out))
            channels = out
    return layers, channels


# --- what puts elements out ---


_Counted: TypeAlias = Callable[[nn.Module, Tensor, Tensor], int]


@contextmanager
def _elements(model: nn.Module, charged: Iterable[str], appended: Iterable[nn.Module]) -> Iterator[dict[str, int]]:
    """Count the elements of a forward pass that a paper charges for, and those of appended batch norms."""
    found = {**dict.fromkeys(charged, 0), "appended": 0}

    def charge(what: str, of: _Counted) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[what] += of(module, args[0], output)

        return hook

    pairs = [(module, what) for module in model.modules() for what, belongs in _BELONGS.items() if belongs(module)]
    handles = [
        module.register_forward_hook(charge(what, _COUNTED.get(what, _put_out)))
        for module, what in pairs
        if what in found
    ]
    handles += [
        part.register_forward_hook(charge("appended", _put_out)) for part in appended if isinstance(part, _BatchNorm)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _put_out(module: nn.Module, x: Tensor, output: Tensor) -> int:
    return output.numel()


def _taken_in(module: nn.Module, x: Tensor, output: Tensor) -> int:
    return x.numel()


def _attention(module: nn.Module, x: Tensor, output: Tensor) -> int:
    """Queries scaled, biases of queries, keys, values and of the projection, softmax; over windows or all tokens."""
    heads = getattr(module, "num_heads", None)
    if x.ndim != 3 or not isinstance(heads, int) or getattr(module.qkv, "out_features", None) != 3 * x.shape[-1]:
        raise InputError(f"attention is charged, and how {type(module).__name__} does it is not known here")
    batch, tokens, channels = x.shape
    return batch * (5 * tokens * channels + heads * tokens * tokens)


# Modules that something charged belongs to; and its elements, where they are not those that the module puts out.
_BELONGS: Mapping[str, Callable[[nn.Module], bool]] = {
    "layernorm": lambda module: isinstance(module, nn.LayerNorm),
    "activation": lambda module: kind_of(module).name == "activation",
    "bias": lambda module: isinstance(module, nn.Conv2d) and module.bias is not None,
    "attention": lambda module: isinstance(getattr(module, "qkv", None), nn.Linear),
    "pool": lambda module: isinstance(module, (nn.AdaptiveAvgPool2d, FastAdaptiveAvgPool)),
}
_COUNTED: Mapping[str, _Counted] = {"attention": _attention, "pool": _taken_in}
