"""What a network of a table has: counted on shapes alone, so that nothing is computed or downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import timm
import torch
from timm.models import reparameterize_model
from torch import Tensor, nn

from updp.errors import InputError, Problem, suggest
from updp.flow import FlowModule
from updp.kinds import kind_of
from updp.layers import PaddedConv2d
from updp.merging import assemble, merge_blocks
from updp.oracle import count
from updp.spec import load_spec
from updp.structure import create_model
from updp.subnet import SubnetConfig, load_subnet
from updp.supernet import Supernet, build_supernet
from updp.tables.read import Row


@dataclass(frozen=True)
class Measured:
    """A network at one size.

    Attributes:
        macs: of convolutions, linear layers and attention products. What repairs the border of a merged convolution
            is left out: papers that leave the padding where it was do without.
        elements: what puts elements out -> how many of them.
        params: parameters by name.
        appended: how many of them are of batch norms that a recipe appended.
    """

    macs: int
    elements: Mapping[str, int]
    params: Mapping[str, int]
    appended: int


def measure(row: Row) -> Measured:
    """Build the network of a row and count it.

    Raises:
        InputError: it cannot be built as the row says.
    """
    assert row.network is not None
    try:
        return measured(built(row.network, row.size), row.size)
    except InputError as error:
        raise InputError([Problem(row.place, row.name, str(problem)) for problem in error.problems]) from None
    except (RuntimeError, AssertionError, ValueError) as error:  # a size that the network does not take
        message = f"cannot be counted at {row.size}x{row.size}: {error}"
        raise InputError([Problem(row.place, row.name, message)]) from error


def measured(model: nn.Module, size: int) -> Measured:
    """Count a network at one size."""
    model.eval()
    with _elements(model) as elements:
        found = count(model, (3, size, size))
    elements["batchnorm"] = found.bn_elements
    repair = elements.pop("repair", 0)
    params = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Measured(found.macs - repair, elements, params, sum(_appended(model)))


def _appended(model: nn.Module) -> Iterator[int]:
    for flow in model.modules():
        if isinstance(flow, FlowModule):
            for name, part in flow.named_parts.items():
                if name.startswith("append."):
                    yield from (parameter.numel() for parameter in part.parameters())


# --- how a network is built ---


def built(network: Mapping[str, Any], size: int) -> nn.Module:
    """The network that a row describes, without values."""
    with torch.device("meta"):
        if "spec" in network:
            return _from_spec(network["spec"], network.get("subnet"), size)
        if "timm" in network:
            kwargs = {key: value for key, value in network.items() if key not in ("timm", "deployed")}
            return _from_timm(network["timm"], kwargs, bool(network.get("deployed")))
        return nn.Sequential(*_layers(network["chain"], 3)[0])


def _from_spec(name: str, subnet: str | None, size: int) -> nn.Module:
    """The merged network. A block that is only reparameterized is counted as it is trained: like one that is kept.

    So does the paper that has such blocks: their activation is gone, their convolutions and norms still count.
    """
    if subnet is None:
        return create_model(load_spec(name), input=(3, size, size))
    supernet = _supernet(name, size)
    config = load_subnet(subnet, name)
    config.check(name, supernet.recipes)
    pruned = {block: recipe for block, recipe in config.choices.items() if block in supernet.available}
    supernet.set_subnet(SubnetConfig(name, pruned))
    return assemble(supernet, merge_blocks(supernet, values=False))


@lru_cache(maxsize=1)  # rows of one network stand together
def _supernet(name: str, size: int) -> Supernet:
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


@contextmanager
def _elements(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count the elements of a forward pass that some papers charge for, and what repairs borders."""
    found: dict[str, int] = dict.fromkeys(("layernorm", "activation", "bias", "attention", "repair"), 0)

    def charge(what: str, of: Callable[[nn.Module, Tensor, Tensor], int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[what] += of(module, args[0], output)

        return hook

    handles = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_hook(charge("layernorm", lambda m, x, y: y.numel())))
        elif kind_of(module).name == "activation":
            handles.append(module.register_forward_hook(charge("activation", lambda m, x, y: y.numel())))
        elif isinstance(getattr(module, "qkv", None), nn.Linear):
            handles.append(module.register_forward_hook(charge("attention", _attention)))
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            handles.append(module.register_forward_hook(charge("bias", lambda m, x, y: y.numel())))
        if isinstance(module, PaddedConv2d) and module.taps is not None:
            handles.append(module.register_forward_hook(charge("repair", _repair)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _attention(module: nn.Module, x: Tensor, output: Tensor) -> int:
    """Queries scaled, biases of queries, keys, values and of the projection, softmax; over windows or all tokens."""
    batch, tokens, channels = x.shape
    heads = int(module.num_heads)  # type: ignore[arg-type]
    return batch * (5 * tokens * channels + heads * tokens * tokens)


def _repair(module: nn.Module, x: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of the map that the taps of a merged convolution add, one for all images."""
    assert isinstance(module, PaddedConv2d) and module.taps is not None
    return module.taps.numel() * prod(output.shape[2:])
