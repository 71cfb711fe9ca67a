"""Self-distillation: the baseline's answers as a second target for the network that is pruned from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from updp.spec import TeacherSettings
from updp.train.session import Criterion, Session


class Teacher:
    """The frozen original network, with all of its activations (DepthShrinker, section 4.3).

    The loss becomes ``(1 - weight) * loss(labels) + weight * T^2 * crossentropy(softmax(teacher / T), answers / T)``
    with the temperature T, as Hinton et al. (2015) have it. The teacher sees each batch as the student does, mixed and
    augmented alike.
    """

    def __init__(self, network: nn.Module, settings: TeacherSettings) -> None:
        """Prepare; the network is put into eval mode and is not changed otherwise."""
        self.network = network.eval().requires_grad_(False)
        self.settings = settings

    def criterion(self, session: Session, images: Tensor) -> Criterion:
        """The loss for one batch."""
        network = self.network.to(session.accelerator.device)
        weight, temperature = self.settings.weight, self.settings.temperature
        with torch.no_grad(), session.accelerator.autocast():
            wanted = (network(images).float() / temperature).softmax(1)

        def loss(answers: Tensor, targets: Tensor) -> Tensor:
            hard: Tensor = session.criterion(answers, targets)
            soft = functional.cross_entropy(answers.float() / temperature, wanted) * temperature**2
            return (1 - weight) * hard + weight * soft

        return loss
