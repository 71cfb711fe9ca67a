"""What a network knows before it answers: the pooled features that its classifier is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from updp.errors import InputError
from updp.hooks import Hooks


class Features:
    """Catches the features of each forward pass while it is open.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> with Features(network) as features:
    ...     answers = network(torch.zeros(4, 3, 2, 2))
    ...     features.take().shape
    torch.Size([4, 5])
    """

    def __init__(self, network: nn.Module) -> None:
        """Prepare; the network's classifier is found as timm says, or as its last linear layer.

        Raises:
            InputError: it has none.
        """
        self.classifiers = _classifiers(network)
        self._caught: list[Tensor] = []
        self._hooks = Hooks()

    def __enter__(self) -> Features:
        self._hooks.__enter__()
        for classifier in self.classifiers:
            self._hooks.before(classifier, lambda args, kwargs: self._caught.append(args[0]))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)
        self._caught.clear()

    def take(self) -> Tensor:
        """The features ``(N, C)`` of the last forward pass, of all classifiers side by side; they are then let go."""
        found = torch.cat([value.flatten(1) for value in self._caught[-len(self.classifiers) :]], 1)
        self._caught.clear()
        return found


def _classifiers(network: nn.Module) -> list[nn.Module]:
    model: Any = getattr(network, "model", network)  # a supernet's own network
    named = model.get_classifier() if callable(getattr(model, "get_classifier", None)) else ()
    several = named if isinstance(named, tuple | list) else (named,)
    found: list[nn.Module] = [each for each in several if _answers(each)]
    linear: list[nn.Module] = [each for each in model.modules() if isinstance(each, nn.Linear)]
    if not (found := found or linear[-1:]):
        raise InputError(f"{type(model).__name__} has no classifier whose input could be compared: no distillation")
    return found


def _answers(module: object) -> bool:
    return isinstance(module, nn.Module) and not isinstance(module, nn.Identity)
