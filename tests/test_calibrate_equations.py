"""The streamed solver against a dense one, and rows against the operators that they are rows of."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from updp.affine import Same
from updp.calibrate.equations import Equations, least
from updp.calibrate.rows import as_solution, assign, sample, shape_of
from updp.layers import PaddedConv2d

F64 = {"dtype": torch.float64}


def dense(x, y, ridge=0.0, prior=None):
    """The same problem, solved from the whole of ``x (n, k)`` at once."""
    a, b = x - x.mean(0), y - y.mean(0)
    if prior is not None:
        b = b - a @ prior
    level = ridge * a.square().mean(0).mean() * len(a)
    wide = torch.cat([a, level.sqrt() * torch.eye(a.shape[1], **F64)])
    target = torch.cat([b, torch.zeros(a.shape[1], b.shape[1], **F64)])
    weight = torch.linalg.lstsq(wide, target, driver="gelsd").solution
    weight = weight if prior is None else weight + prior
    return weight, y.mean(0) - x.mean(0) @ weight


def streamed(x, y, chunks=7):
    equations = Equations(1, x.shape[1], y.shape[1])
    for a, b in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        equations.add(a[None], b[None])
    return equations


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("with_prior", [False, True])
def test_streamed_equals_dense(ridge, with_prior):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 12, generator=generator, **F64) * torch.logspace(-2, 1, 12, **F64) + 3
    y = x @ torch.randn(12, 5, generator=generator, **F64) + torch.randn(300, 5, generator=generator, **F64)
    prior = torch.randn(12, 5, generator=generator, **F64) if with_prior else None
    equations = streamed(x, y)
    weight, bias = equations.solve(ridge, None if prior is None else prior[None])
    expected, shift = dense(x, y, ridge, prior)
    assert torch.allclose(weight[0], expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert torch.allclose(bias[0], shift, rtol=0, atol=1e-6 * shift.abs().max().item())
    error = (x @ weight[0] + bias[0] - y).square().sum() / (y - y.mean(0)).square().sum()
    assert equations.error(weight, bias) == pytest.approx(error.item(), rel=1e-9)


def test_fewer_samples_than_unknowns_stay_at_the_prior():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 20, generator=generator, **F64)
    prior = torch.randn(20, 3, generator=generator, **F64)
    exact = streamed(x, x @ prior + 1, chunks=2).solve(1e-3, prior[None])
    assert torch.allclose(exact[0][0], prior, atol=1e-12), "nothing asks for a change"
    assert torch.allclose(exact[1][0], torch.ones(3, **F64), atol=1e-12)
    equations = streamed(x, x @ prior + torch.randn(6, 3, generator=generator, **F64), chunks=2)
    found = equations.solve(1e-9, prior[None])
    assert equations.unknowns == 21
    assert equations.error(*found) < 1e-6, "what they do determine is met"


def test_constant_inputs_and_outputs_are_no_trouble():
    x, y = torch.ones(50, 4, **F64), torch.full((50, 2), 3.0, **F64)
    weight, bias = streamed(x, y).solve(1e-4)
    assert torch.isfinite(weight).all()
    assert torch.allclose(x @ weight[0] + bias[0], y)


def test_equations_that_are_not_finite_are_refused():
    x = torch.full((50, 4), torch.nan, **F64)
    with pytest.raises(ValueError, match="not finite"):
        streamed(x, torch.ones(50, 2, **F64)).solve(1e-4)


def test_memory_does_not_grow_with_samples():
    equations = Equations(1, 30, 10)
    before = equations.bytes
    for _ in range(20):
        equations.add(torch.randn(1, 100, 30), torch.randn(1, 100, 10))
    assert equations.bytes == before == 8 * (30 * 30 + 30 * 10 + 10 + 30 + 10)
    assert equations.count == 2000


def test_the_ridge_is_chosen_on_what_was_held_out():
    generator = torch.Generator().manual_seed(3)
    truth = torch.zeros(40, 2, **F64)
    truth[:3] = 1
    parts = []
    for count in (45, 2000, 2000):
        x = torch.randn(count, 40, generator=generator, **F64)
        parts.append(streamed(x, x @ truth + 3 * torch.randn(count, 2, generator=generator, **F64)))
    few, many, held_out = parts
    ridges = (1e-8, 1.0)
    for fit, best in ((few, 1.0), (many, 1e-8)):
        assert least(lambda ridge, fit=fit: (held_out.error(*fit.solve(ridge)), ridge), ridges)[1] == best


OPERATORS = {
    "dense": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 7)),
    "strided": (nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 0)), (2, 4, 11, 13)),
    "grouped": (nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2), (2, 4, 9, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 6, 6)),
    "same": (
        PaddedConv2d(4, 6, 3, stride=2, pads=Same((3, 3), (2, 2)), tap_bias=False),
        (2, 4, 9, 8),
    ),
    "one-sided": (PaddedConv2d(4, 6, 2, pads=(1, 0, 0, 1), tap_bias=False), (2, 4, 5, 6)),
    "tokens": (nn.Linear(4, 6), (2, 17, 4)),
    "channels last": (nn.Linear(4, 6), (2, 5, 7, 4)),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_an_operator_is_found_again_from_its_rows(kind):
    """Every position, random inputs: the solution is the operator itself."""
    operator, shape = OPERATORS[kind]
    operator = operator.double()
    generator = torch.Generator().manual_seed(4)
    equations = Equations(*shape_of(operator))
    for _ in range(12):
        x = torch.randn(shape, generator=generator, **F64)
        with torch.no_grad():
            equations.add(*sample(operator, x, operator(x), 10_000, generator))
    weight, bias = equations.solve(0.0)
    assert torch.allclose(weight, as_solution(operator), atol=1e-9)
    assert torch.allclose(bias.reshape(-1), operator.bias, atol=1e-9)
    fresh = type(operator)(*_arguments(operator)) if kind in ("dense", "tokens") else operator
    assign(fresh.double(), weight, bias)
    with torch.no_grad():
        assert torch.allclose(fresh(x), OPERATORS[kind][0](x), atol=1e-9)


def _arguments(operator):
    if isinstance(operator, nn.Linear):
        return operator.in_features, operator.out_features
    return operator.in_channels, operator.out_channels, operator.kernel_size, operator.stride, operator.padding


def rows_by_hand(operator, x):
    """What every group of an operator sees at every position of every image: torch's own unfolding, pads by hand."""
    if isinstance(operator, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    pads = operator.pads if isinstance(operator, PaddedConv2d) else None
    if isinstance(pads, Same):
        total = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:]]  # a 3x3 of stride 2
        pads = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    height, width = operator.padding
    top, bottom, left, right = pads or (height, height, width, width)
    x = F.pad(x, (left, right, top, bottom))
    seen = F.unfold(x, operator.kernel_size, operator.dilation, 0, operator.stride)  # (N, C * taps, places)
    return seen.reshape(len(x), operator.groups, -1, seen.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)


def outputs_by_hand(operator, y):
    if isinstance(operator, nn.Linear):
        return y.reshape(1, -1, y.shape[-1])
    return y.reshape(len(y), operator.groups, -1, y[0, 0].numel()).permute(1, 0, 3, 2).flatten(1, 2)


@pytest.mark.parametrize("deficient", [False, True], ids=["", "rank-deficient"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_the_streamed_solution_is_the_dense_one(kind, deficient):
    """Outputs that no operator gives; `lstsq` on all rows at once; of many solutions the smallest."""
    operator, shape = OPERATORS[kind]
    operator = copy.deepcopy(operator).double()
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(24, *shape[1:], generator=generator, **F64)
    if deficient:  # two channels alike; of a depthwise convolution, one channel that is always the same
        channels = x.transpose(1, -1) if isinstance(operator, nn.Linear) else x
        channels[:, 1] = 2.0 if kind == "depthwise" else channels[:, 0]
    with torch.no_grad():
        y = operator(x)
        y = y + torch.randn(y.shape, generator=generator, **F64) + y.square()
    equations = Equations(*shape_of(operator))
    for some, wanted in zip(x.split(5), y.split(5), strict=True):
        equations.add(*sample(operator, some, wanted, 10_000, generator))
    weight, bias = equations.solve(0.0)
    rows, outputs = rows_by_hand(operator, x), outputs_by_hand(operator, y)
    assert equations.count == rows.shape[1] > rows.shape[2] + 1
    for group in range(len(rows)):
        expected, shift = dense(rows[group], outputs[group])
        assert (weight[group] - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert (bias[group] - shift).abs().max() <= 1e-6 * max(1.0, shift.abs().max())


@pytest.mark.parametrize("groups", [1, 2])
def test_a_bias_per_tap_is_solved_for_too(groups):
    """Inside the map the taps only add up; which of them is on it tells them apart at the border."""
    pads = (0, 1, 2, 1)
    truth, operator = (PaddedConv2d(4, 6, 3, pads=pads, tap_bias=True, groups=groups).double() for _ in range(2))
    generator = torch.Generator().manual_seed(5)
    for conv in (truth, operator):
        conv.taps.data = torch.randn(conv.taps.shape, generator=generator, **F64)
    assert shape_of(operator) == (groups, 36 // groups + 9, 6 // groups)
    equations = Equations(*shape_of(operator))
    with torch.no_grad():
        for _ in range(12):
            x = torch.randn(2, 4, 6, 7, generator=generator, **F64)
            equations.add(*sample(operator, x, truth(x), 10_000, generator))
        bias = truth.bias.reshape(groups, -1)
        assert equations.error(as_solution(truth), bias) < 1e-12
        assert equations.error(as_solution(operator), bias) > 0.01
        assign(operator, *equations.solve(0.0))
        assert torch.allclose(operator(x), truth(x), atol=1e-9)
    assert not torch.allclose(operator.taps, truth.taps), "of the ways to say it, the smallest"


def test_positions_are_sampled_without_repetition_and_differ_by_image():
    conv = nn.Conv2d(1, 1, 1).double()
    x = torch.arange(2 * 30, **F64).reshape(2, 1, 5, 6)
    seen, wanted = sample(conv, x, x, 8, torch.Generator().manual_seed(0))
    assert seen.shape == wanted.shape == (1, 16, 1)
    assert len(seen.unique()) == 16
    first, second = seen[0, :8, 0], seen[0, 8:, 0] - 30
    assert sorted(first.tolist()) != sorted(second.tolist())


def test_an_operator_without_bias_is_refused():
    with pytest.raises(ValueError, match="no bias"):
        assign(nn.Linear(2, 2, bias=False), torch.zeros(1, 2, 2), torch.zeros(1, 2))


def test_solutions_with_and_without_a_prior_are_those_found_one_by_one() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 12, generator=generator, **F64)
    prior = torch.randn(12, 5, generator=generator, **F64)[None]
    equations = streamed(x, torch.randn(40, 5, generator=generator, **F64))
    solved, error = equations.solver(prior), equations.judge()
    for ridge in (1e-4, 1e-2, 1.0):
        for (weight, bias), before in zip(solved(ridge), (None, prior), strict=True):
            alone = equations.solve(ridge, before)
            assert torch.allclose(weight, alone[0], rtol=0, atol=1e-12)
            assert torch.allclose(bias, alone[1], rtol=0, atol=1e-12)
            assert error(weight, bias) == pytest.approx(equations.error(*alone), rel=1e-9)


@pytest.mark.parametrize("lowest", range(7))
def test_the_least_is_found_downhill_wherever_it_is(lowest):
    tried = []

    def value(ridge):
        tried.append(ridge)
        return (abs(ridge - lowest), ridge)

    assert least(value, range(7)) == (0, lowest)
    assert len(tried) == len(set(tried)) <= 3 + abs(lowest - 3), "no ridge twice, and only those on the way"
