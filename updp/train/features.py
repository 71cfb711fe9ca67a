"""What a network knows before it answers: the pooled features that its classifier is given, and its blocks' maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from updp.errors import InputError
from updp.hooks import Hooks


class Features:
    """Catches features and what blocks give, in each forward pass while it is open.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> with Features(network, ["0"]) as features:
    ...     answers = network(torch.zeros(4, 3, 2, 2))
    ...     [seen.shape for seen in features.take()]
    [torch.Size([4, 5]), torch.Size([4, 12])]
    """

    def __init__(self, network: nn.Module, blocks: Sequence[str] = ()) -> None:
        """Prepare; the network's classifier is found as timm says, or as its last linear layer.

        Args:
            network: a model or a supernet.
            blocks: names of modules of the model whose outputs are wanted, too; those of a slice as specs have them.

        Raises:
            InputError: it has no classifier.
        """
        self._hooks = Hooks()
        self._inputs: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}
        model: nn.Module = getattr(network, "model", network)  # a supernet's own network
        self._classifiers = _classifiers(model)
        self._blocks = {name: model.get_submodule(_last_place(name)) for name in blocks}

    def __enter__(self) -> Features:
        self._hooks.__enter__()
        for classifier in self._classifiers:
            self._hooks.before(classifier, lambda args, kwargs: self._inputs.append(args[0]))
        for name, block in self._blocks.items():
            self._hooks.after(block, lambda output, name=name: self._outputs.update({name: output}))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)
        self._forget()

    def take(self) -> list[Tensor]:
        """What the last forward pass showed, which is then let go.

        Returns:
            The features ``(N, C)``, of all classifiers side by side; then what each block gave.
        """
        features = torch.cat([value.flatten(1) for value in self._inputs[-len(self._classifiers) :]], 1)
        found = [features, *(self._outputs[name] for name in self._blocks)]
        self._forget()
        return found

    def _forget(self) -> None:
        self._inputs.clear()
        self._outputs.clear()


def _last_place(name: str) -> str:
    """Where what a block gives comes out: of a slice ``features[8:14]``, its last module."""
    head, bracket, rest = name.partition("[")
    return f"{head}.{int(rest.rstrip(']').split(':')[1]) - 1}" if bracket else name


def _classifiers(model: Any) -> list[nn.Module]:
    named = model.get_classifier() if callable(getattr(model, "get_classifier", None)) else ()
    several = named if isinstance(named, tuple | list) else (named,)
    found: list[nn.Module] = [each for each in several if _answers(each)]
    linear: list[nn.Module] = [each for each in model.modules() if isinstance(each, nn.Linear)]
    if not (found := found or linear[-1:]):
        raise InputError(f"{type(model).__name__} has no classifier whose input could be compared: no distillation")
    return found


def _answers(module: object) -> bool:
    return isinstance(module, nn.Module) and not isinstance(module, nn.Identity)
