"""Self-distillation: the baseline's answers as a second target in finetuning."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_train import plain_model
from torch import nn
from training import CLASSES, calibration, loader, same, settings, small_data, small_net, subnet, train

from updp.spec import BlendSettings, TeacherSettings, parse_spec
from updp.train import Progressive, Session, Teacher, create_accelerator

X, TARGETS = small_data(8)


def session(smoothing: float = 0.0) -> Session:
    how = settings(1, smoothing=smoothing)
    return Session(nn.Linear(1, 1), how, accelerator=create_accelerator(), seed=0, steps_per_epoch=1)


@pytest.mark.parametrize(("weight", "temperature"), [(0.7, 1.0), (0.3, 4.0), (1.0, 2.0)])
def test_the_loss_is_labels_and_softened_answers(weight: float, temperature: float) -> None:
    network = plain_model()
    teacher = Teacher(network, TeacherSettings(weight, temperature))
    answers = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))
    found = teacher.criterion(session(), X)(answers, TARGETS).item()
    with torch.no_grad():
        wanted = (network(X) / temperature).softmax(1).double()
    log = answers.double().log_softmax(1)
    soft = -(wanted * (answers.double() / temperature).log_softmax(1)).sum(1).mean() * temperature**2
    hard = -log[torch.arange(8), TARGETS].mean()
    assert found == pytest.approx(float((1 - weight) * hard + weight * soft), rel=1e-6)


def test_the_teacher_sees_the_mixed_batch_and_stays_as_it_was() -> None:
    seen: list[torch.Tensor] = []
    baseline = plain_model()
    before = copy.deepcopy(baseline)
    baseline.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    network = small_net()
    inputs: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()) if module.training else None)
    teacher = Teacher(baseline, TeacherSettings(0.5))
    policy = Progressive(subnet(network, 0), BlendSettings(K=2), calibration(), teacher)
    train(network, settings(2, mixup=0.8), policy)
    assert len(seen) == len(inputs) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen, inputs, strict=True))
    assert same(baseline, before)
    assert not baseline.training


def test_a_teacher_changes_what_is_learnt_and_draws_the_network_to_its_answers() -> None:
    torch.manual_seed(0)
    baseline = plain_model()
    nn.init.normal_(cast(Any, baseline).head.fc.bias, std=3.0)
    distances = []
    for weight in (0.0, 1.0):
        network = small_net()
        teacher = Teacher(baseline, TeacherSettings(weight)) if weight else None
        train(network, settings(8), Progressive(subnet(network, 0), BlendSettings(K=2), calibration(), teacher),
              loader=loader())  # fmt: skip
        with torch.no_grad():
            ours, theirs = network(X).log_softmax(1), baseline(X).softmax(1)
        distances.append(float(nn.functional.kl_div(ours, theirs, reduction="batchmean")))
    assert distances[1] < 0.75 * distances[0]


def test_another_teacher_is_another_training() -> None:
    network = small_net()
    policies = [
        Progressive(subnet(network, 0), BlendSettings(), [], teacher)
        for teacher in (None, *(Teacher(plain_model(), TeacherSettings(weight)) for weight in (0.5, 0.6)))
    ]
    assert len({policy.key() for policy in policies}) == 3


def test_the_spec_says_it() -> None:
    text = "version: 1\nmodel: {timm: resnet18}\ninput: [3, 32, 32]\nstructures: {b: [conv1]}\n"
    text += 'recipes: {r: {merge: all}}\nblocks: [{match: "layer1.0", structure: b, recipes: [r]}]\n'
    spec = parse_spec(text + "schedule: {teacher: {weight: 0.7, temperature: 2}}\n", file="a.yaml", name="a")
    assert spec.schedule.teacher == TeacherSettings(0.7, 2.0)
    assert parse_spec(text, file="a.yaml", name="a").schedule.teacher == TeacherSettings()


def test_a_pass_in_bfloat16_gives_a_float_loss() -> None:
    teacher = Teacher(plain_model(), TeacherSettings(0.5))
    fake = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", autocast=lambda: torch.autocast("cpu", torch.bfloat16)),
        criterion=nn.CrossEntropyLoss(),
    )
    loss = teacher.criterion(cast(Session, fake), X)(torch.randn(8, CLASSES).bfloat16(), TARGETS)
    assert loss.isfinite() and loss.dtype == torch.float32
