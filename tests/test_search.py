"""Search: the genetic algorithm against exhaustive search, the score cache, and shared prefixes bit for bit."""

import itertools
import json
import math
import random
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from updp.errors import InputError
from updp.oracle import Score
from updp.search import (
    CachedOracle,
    PrefixEvaluator,
    count_block_evaluations,
    operators,
    planned_evaluations,
    prefix,
    search,
)
from updp.spec import SearchSettings, load_spec
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, build_supernet, estimating

SMALL = SearchSettings(population=16, generations=6)


def names(n: int) -> dict[str, str]:
    return {f"b{i}": "full" for i in range(n)}


class TableOracle:
    """Scores from a formula of the pruned vector: (top1, loss)."""

    def __init__(self, n: int, formula: Callable[[np.ndarray], tuple[float, float]]) -> None:
        self.blocks = list(names(n))
        self.formula = formula
        self.asked: list[SubnetConfig] = []

    def one(self, config: SubnetConfig) -> Score:
        top1, loss = self.formula(np.array([config.choice(b) != "keep" for b in self.blocks], dtype=float))
        return Score(float(top1), 0.0, float(loss), 100)

    def score(self, configs: Sequence[SubnetConfig]) -> list[Score]:
        self.asked += configs
        return [self.one(config) for config in configs]

    def optimum(self, k: int) -> tuple[float, float]:
        every = (SubnetConfig("toy", dict.fromkeys(c, "full")) for c in itertools.combinations(self.blocks, k))
        return max((score.top1, -score.loss) for score in map(self.one, every))


def oracle(kind: str, n: int, seed: int) -> TableOracle:
    rng = np.random.default_rng(seed)
    a, pairs, triples = rng.normal(size=n), rng.normal(size=(n, n)), rng.normal(size=(n, n, n))

    def interacting(v: np.ndarray) -> float:
        return float(a @ v + v @ pairs @ v + 0.2 * np.einsum("i,j,k,ijk", v, v, v, triples))

    formulas: dict[str, Callable[[np.ndarray], tuple[float, float]]] = {
        "additive": lambda v: (a @ v, 0.0),
        "interacting": lambda v: (interacting(v), 0.0),
        "ties": lambda v: (round(float(a @ v) / 2), -interacting(v)),
    }
    return TableOracle(n, formulas[kind])


# --- the genetic search ---


@pytest.mark.parametrize("n", range(1, 13))
@pytest.mark.parametrize("kind", ["additive", "interacting", "ties"])
def test_genetic_search_finds_the_optimum_of_exhaustive_search(n: int, kind: str) -> None:
    """Enumeration off, on a budget of 96 where there are up to 924 subnets."""
    for k in range(n + 1):
        table = oracle(kind, n, seed=100 * n + k)
        result = search(table, names(n), k, SMALL, seed=k, spec="toy", exhaustive=False)
        assert (result.score.top1, -result.score.loss) == table.optimum(k), (n, k, kind)
        assert len(result.best.pruned) == k
        assert result.evaluations == len(table.asked) == len(set(table.asked)) <= 96


def test_default_settings_find_the_optimum_of_any_oracle_up_to_12_blocks() -> None:
    """Scores without any structure, where only looking at every subnet helps."""
    cases = 0
    for n in range(1, 13):
        for k in range(n + 1):
            table = TableOracle(n, lambda v, n=n: (random.Random(f"{n}{v}").random(), 0.0))
            result = search(table, names(n), k, SearchSettings(), seed=0, spec="toy")
            assert result.exhaustive
            assert (result.score.top1, -result.score.loss) == table.optimum(k), (n, k)
            assert result.block_evaluations["shared"] <= 32 * 10 * n
            assert result.evaluations == planned_evaluations(n, k, SearchSettings()) == math.comb(n, k)
            cases += 1
    assert cases == 90


def test_a_large_space_is_searched_within_the_budget() -> None:
    table = oracle("interacting", 18, seed=3)
    result = search(table, names(18), 9, SMALL, seed=0, spec="toy")
    assert not result.exhaustive
    assert result.evaluations == len(set(table.asked)) == planned_evaluations(18, 9, SMALL) == 96
    assert [g.evaluations for g in result.history] == [16, 32, 48, 64, 80, 96]
    best = [(g.best, -g.loss) for g in result.history]
    assert best == sorted(best)
    assert best[-1] == (result.score.top1, -result.score.loss) > best[0]
    shared, unshared = result.block_evaluations["shared"], result.block_evaluations["unshared"]
    assert unshared == 96 * 18
    assert 18 + 96 < shared < unshared


def test_search_is_a_function_of_seed_and_scores() -> None:
    def run(seed: int) -> tuple[object, list[SubnetConfig]]:
        table = oracle("ties", 14, seed=1)
        return search(table, names(14), 7, SMALL, seed, spec="toy"), table.asked

    np.random.seed(1)  # noqa: NPY002  # global random state must not matter
    first = run(5)
    np.random.seed(2)  # noqa: NPY002
    assert run(5) == first
    assert run(6)[1] != first[1]


def test_ties_are_broken_by_loss_and_a_loss_that_is_no_number_is_worst() -> None:
    losses = {0: math.nan, 1: 0.5, 2: 0.25, 3: math.inf}
    table = TableOracle(4, lambda v: (50.0, losses[int(v.argmax())]))
    for exhaustive in (True, False):
        assert search(table, names(4), 1, SMALL, 0, spec="toy", exhaustive=exhaustive).best.pruned == ("b2",)


@pytest.mark.parametrize("k", [0, 5])
def test_nothing_to_choose(k: int) -> None:
    table = oracle("additive", 5, seed=0)
    result = search(table, names(5), k, SMALL, seed=0, spec="toy", exhaustive=False)
    assert result.best == SubnetConfig("toy", dict(list(names(5).items())[:k]))
    assert result.evaluations == len(result.history) == 1


@pytest.mark.parametrize("k", [-1, 6])
def test_impossible_k_is_refused(k: int) -> None:
    table = oracle("additive", 5, seed=0)
    with pytest.raises(InputError, match=f"cannot prune {k} blocks: toy has 5 prunable blocks"):
        search(table, names(5), k, SMALL, seed=0, spec="toy")
    assert not table.asked


def test_recipes_are_those_of_the_blocks_and_progress_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    blocks = {"a": "full", "b": "pointwise", "c": "full"}
    told = []
    table = TableOracle(3, lambda v: (0.0, 0.0))
    result = search(table, blocks, 2, SMALL, 0, spec="toy", on_generation=told.append, exhaustive=False)
    assert tuple(told) == result.history
    assert {c for config in table.asked for c in config.choices.items()} == set(blocks.items())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("population", [1, 2, 3])
def test_tiny_populations_keep_to_the_budget(population: int) -> None:
    settings = SearchSettings(population=population, generations=4)
    result = search(oracle("additive", 9, 0), names(9), 4, settings, 0, spec="toy", exhaustive=False)
    assert result.evaluations == 4 * population


def test_operators_keep_the_count() -> None:
    rng = np.random.default_rng(0)
    for n, k in ((2, 1), (7, 3), (12, 11), (18, 9)):
        problem = type("P", (), {"n_var": n})
        vectors = operators.RandomVectors(k)._do(problem, 200, random_state=rng)
        pairs = vectors.reshape(2, 100, n)
        children = operators.Union()._do(problem, pairs, random_state=rng)[0]
        swapped = operators.Swap()._do(problem, vectors, random_state=rng)
        for some in (vectors, children, swapped):
            assert (some.sum(axis=1) == k).all()
        shared, either = pairs.all(axis=0), pairs.any(axis=0)
        assert (children >= shared).all()
        assert (children <= either).all()
        distances = (swapped != vectors).sum(axis=1)
        assert set(distances.tolist()) <= {0, 2, 4}
        assert (distances > 0).any()
        near = list(operators.neighbours(vectors[0]))
        assert len({operators.pack(v) for v in near}) == k * (n - k)
        assert all((v != vectors[0]).sum() == 2 for v in near)


# --- the score cache ---


class Stops(TableOracle):
    """Is interrupted after so many calls."""

    def __init__(self, table: TableOracle, calls: int) -> None:
        super().__init__(len(table.blocks), table.formula)
        self.calls = calls

    def score(self, configs: Sequence[SubnetConfig]) -> list[Score]:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().score(configs)


@pytest.mark.parametrize("cut", [0, 7])
def test_a_stopped_search_goes_on_where_it_was(tmp_path: Path, cut: int) -> None:
    def run(asked: TableOracle, path: Path | None) -> tuple[object, int]:
        cached = CachedOracle(asked, path, "data")
        return search(cached, names(14), 7, SMALL, 3, spec="toy"), cached.scored

    whole, _ = run(oracle("ties", 14, 2), None)
    path = tmp_path / "scores.jsonl"
    stopped = Stops(oracle("ties", 14, 2), 3)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, path)
    lines = path.read_bytes()
    path.write_bytes(lines[: len(lines) - cut])  # the last line cut short
    resumed = oracle("ties", 14, 2)
    assert run(resumed, path) == (whole, 96 - 48 + bool(cut))
    assert len(set(resumed.asked) & set(stopped.asked)) == bool(cut)
    again = oracle("ties", 14, 2)
    assert run(again, path) == (whole, 0)
    assert not again.asked


def test_cache_keeps_every_bit_and_knows_its_data(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    values = iter([0.1 + 0.2, math.inf, math.nan])
    table = TableOracle(3, lambda v: (100 / 3, next(values)))
    configs = [SubnetConfig("toy", {b: "full"}) for b in names(3)]
    first = CachedOracle(table, path, "a").score([*configs, configs[0]])
    assert len(table.asked) == 3
    assert first[3] == first[0]
    again = CachedOracle(table, path, "a").score(configs)
    assert [repr(score) for score in again] == [repr(score) for score in first[:3]]
    assert all(json.loads(line)["choices"] for line in path.read_text().splitlines())
    with pytest.raises(StopIteration):  # other data: nothing is known
        CachedOracle(table, path, "b").score(configs)


def test_cache_errors_are_messages(tmp_path: Path) -> None:
    table = oracle("additive", 3, 0)
    with pytest.raises(InputError, match="cannot read the scores"):
        CachedOracle(table, tmp_path, "a")
    with pytest.raises(InputError, match="cannot write the scores"):
        CachedOracle(table, tmp_path / "missing" / "scores.jsonl", "a").score([SubnetConfig("toy", {"b0": "full"})])


# --- shared prefixes ---


def random_population(blocks: Sequence[str], k: int, size: int, seed: int) -> list[SubnetConfig]:
    rng = random.Random(seed)
    return [SubnetConfig("toy", dict.fromkeys(rng.sample(list(blocks), k), "full")) for _ in range(size)]


def test_count_of_block_evaluations() -> None:
    def config(*pruned: str) -> SubnetConfig:
        return SubnetConfig("toy", dict.fromkeys(pruned, "full"))

    assert count_block_evaluations([config()], "abc") == (3, 3)
    assert count_block_evaluations([config("c"), config()], "abc") == (4, 6)
    assert count_block_evaluations([config("a"), config()], "abc") == (6, 6)
    assert count_block_evaluations([config("a"), config("a")], "abc") == (3, 3)
    assert count_block_evaluations([], "abc") == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_random_populations_share_a_fifth(seed: int) -> None:
    """64 subnets, 9 of 18 blocks pruned."""
    blocks = list(names(18))
    shared, unshared = count_block_evaluations(random_population(blocks, 9, 64, seed), blocks)
    assert unshared == 64 * 18
    assert 0.65 < shared / unshared <= 0.80


def batches(size: tuple[int, int, int], sizes: Sequence[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, *size, generator=generator), torch.randint(0, 10, (n,), generator=generator)) for n in sizes
    ]


def evaluator(supernet: "Supernet | Fake", size: tuple[int, int, int] = (3, 32, 32)) -> PrefixEvaluator:
    calibration = [images for images, _ in batches(size, (8, 8, 4), seed=1)]
    return PrefixEvaluator(supernet, batches(size, (6, 6, 3), seed=0), calibration, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["convnext_digits", "deit_digits"])
def test_shared_scores_equal_unshared_scores_bit_for_bit(name: str) -> None:
    supernet = build_supernet(load_spec(name), num_classes=10, seed=0)
    recipes = {recipe for some in supernet.available.values() for recipe in some}
    generator = torch.Generator().manual_seed(0)
    configs = [supernet.sample(generator, recipe=recipe) for recipe in sorted(recipes) for _ in range(6)]
    configs += [supernet.all_keep(), supernet.all_pruned(), configs[0]]
    supernet.set_subnet(configs[1])
    supernet.set_blend(0.25)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    asking = evaluator(supernet)
    assert asking.reason is None
    scores = asking.score(configs)
    assert scores == asking.score_unshared(configs)
    assert len({score.loss for score in scores}) == len(set(configs)) >= 6
    assert asking.score(configs[::-1]) == scores[::-1]
    assert supernet.training
    assert supernet.subnet == configs[1]
    assert {block.blend for block in supernet.blocks.values()} == {0.25}
    assert all(torch.equal(value, before[key]) for key, value in supernet.state_dict().items())
    shared, unshared = count_block_evaluations(configs, list(supernet.blocks))
    assert asking.block_evaluations == {"shared": 2 * shared, "unshared": 2 * unshared}


def test_a_config_that_does_not_fit_is_refused() -> None:
    supernet = build_supernet(load_spec("convnext_digits"), num_classes=10, seed=0)
    with pytest.raises(InputError, match="no such prunable block"):
        evaluator(supernet).score([SubnetConfig("convnext_digits", {"stages.9": "full"})])
    assert supernet.subnet == supernet.all_keep()


class FakeBlock(nn.Module):
    """A choice block whose first operation changes its input in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.keep = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh())
        pruned = nn.Sequential(nn.Hardtanh(-1, 1, inplace=True), nn.Conv2d(channels, channels, 1))
        pruned.extend([nn.BatchNorm2d(channels), nn.GELU(), nn.BatchNorm2d(channels)])
        self.choices = nn.ModuleDict({"full": pruned})
        self.active = "keep"
        self.blend = 1.0
        self.runs = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.runs += 1
        out: Tensor = self.keep(x) if self.active == "keep" else self.choices[self.active](x)
        return out * scale

    def norms(self) -> Iterator[nn.BatchNorm2d]:
        if self.active != "keep":
            yield from (m for m in self.choices[self.active] if isinstance(m, nn.BatchNorm2d))


class FakeModel(nn.Module):
    """Stem, blocks with plain operations and a repeatedly called layer between them, head in a list."""

    def __init__(self, blocks: int, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3)
        self.position = nn.Parameter(torch.randn(channels, 1, 1))
        self.between = nn.LeakyReLU(inplace=True)
        self.body = nn.ModuleList(FakeBlock(channels) for _ in range(blocks))
        self.head = nn.ModuleList([nn.Flatten(), nn.Linear(channels * 36, 10)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position
        for i, block in enumerate(self.body):
            x = self.call(block, i, x)
            x = self.between(x).transpose(2, 3)
        for layer in self.head:
            x = layer(x)
        return x

    def call(self, block: nn.Module, i: int, x: Tensor) -> Tensor:
        out: Tensor = block(x, scale=1.0 + i)
        return out


class Residual(FakeModel):
    def call(self, block: nn.Module, i: int, x: Tensor) -> Tensor:
        return x + super().call(block, i, x.clone())


class Twice(FakeModel):
    def call(self, block: nn.Module, i: int, x: Tensor) -> Tensor:
        return super().call(block, i, super().call(block, i, x))


class Depends(FakeModel):
    """Which modules run depends on values."""

    def call(self, block: nn.Module, i: int, x: Tensor) -> Tensor:
        if i == 3 and x.isnan().any():
            x = self.between(x)
        return super().call(block, i, x) * (1 + 0 * x.mean())


class Fake(nn.Module):
    """What of a supernet the evaluator uses."""

    def __init__(self, model: FakeModel) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = model
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.blocks = {f"b{i}": block for i, block in enumerate(model.body)}
        self.subnet = self.all_keep()

    def all_keep(self) -> SubnetConfig:
        return SubnetConfig("toy", {})

    def all_pruned(self) -> SubnetConfig:
        return SubnetConfig("toy", dict.fromkeys(self.blocks, "full"))

    def set_subnet(self, config: SubnetConfig) -> None:
        self.subnet = config
        for name, block in self.blocks.items():
            block.active = config.choice(name)

    def set_blend(self, value: float) -> None:
        for block in self.blocks.values():
            block.blend = value

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        images = list(batches)
        for block in self.blocks.values():
            with estimating(list(block.norms())):
                for x in images:
                    self.model(x)


def test_blocks_run_as_often_as_is_counted_and_cannot_spoil_what_is_held() -> None:
    supernet = Fake(FakeModel(8))
    asking = evaluator(supernet, (3, 8, 8))
    configs = random_population(list(supernet.blocks), 4, 24, seed=0)
    for block in supernet.blocks.values():
        block.runs = 0
    calibrations = 0
    original = asking._calibrate

    def calibrate(*args: object) -> object:
        nonlocal calibrations
        out = original(*args)  # type: ignore[arg-type]
        calibrations = sum(block.runs for block in supernet.blocks.values())
        return out

    asking._calibrate = calibrate  # type: ignore[method-assign, assignment]
    scores = asking.score(configs)
    assert asking.reason is None
    runs = sum(block.runs for block in supernet.blocks.values()) - calibrations
    shared, unshared = count_block_evaluations(configs, list(supernet.blocks))
    assert runs == 3 * shared  # three chunks
    assert asking.block_evaluations == {"shared": shared, "unshared": unshared}
    assert shared < 0.8 * unshared
    assert calibrations <= 3 * 2 * shared  # at most one run to estimate and one to go on
    assert scores == asking.score_unshared(configs)
    assert len({score.loss for score in scores}) == len(set(configs))


def test_memory_is_bounded_by_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = Fake(FakeModel(10))
    asking = evaluator(supernet, (3, 8, 8))
    alive: set[int] = set()
    most = 0

    def tracked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            nonlocal most
            out = function(*args)
            alive.add(id(out))
            weakref.finalize(out, alive.discard, id(out))
            most = max(most, len(alive))
            return out

        return call

    monkeypatch.setattr(prefix, "alike", tracked(prefix.alike))
    assert asking._runner is not None
    monkeypatch.setattr(asking._runner, "run", tracked(asking._runner.run))
    monkeypatch.setattr(asking, "_calibrate", lambda *_: {})
    monkeypatch.setattr(asking, "_enter", lambda path, start, stop, _: supernet.blocks)
    asking.score(random_population(list(supernet.blocks), 5, 64, seed=0))
    assert 4 < most <= len(supernet.blocks) + 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Residual, "reaches what follows"),
        (Twice, "b0 is called 2 times"),
        (Depends, "recorded order|reaches what follows|cannot be entered"),
    ],
)
def test_models_that_cannot_be_entered_are_scored_without_sharing(model: type[FakeModel], reason: str) -> None:
    supernet = Fake(model(4))
    asking = evaluator(supernet, (3, 8, 8))
    assert asking.reason is not None
    assert re.search(reason, asking.reason), asking.reason
    configs = random_population(list(supernet.blocks), 2, 4, seed=0)
    assert asking.score(configs) == asking.score_unshared(configs)
    assert asking.block_evaluations["shared"] == asking.block_evaluations["unshared"] > 0


def test_no_images_and_foreign_labels_are_refused() -> None:
    supernet = Fake(FakeModel(2))
    images, labels = batches((3, 8, 8), (4,), seed=0)[0]
    with pytest.raises(InputError, match="no images"):
        PrefixEvaluator(supernet, [], [images])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="label 10 for a network of 10 classes"):
        PrefixEvaluator(supernet, [(images, labels + 10 - labels.max())], [images])  # type: ignore[arg-type]


def test_a_search_over_a_supernet_ends_with_its_best_subnet(tmp_path: Path) -> None:
    supernet = build_supernet(load_spec("convnext_digits"), num_classes=10, seed=0)
    asking = evaluator(supernet)
    cached = CachedOracle(asking, tmp_path / "scores.jsonl", "digits")
    blocks = {block: supernet.default_choice(block) for block in supernet.available}
    result = search(cached, blocks, 5, SearchSettings(population=8, generations=3), 0, spec="convnext_digits")
    assert result.evaluations == cached.scored == 24
    assert asking.score_unshared([result.best]) == [result.score]
    assert result.block_evaluations == asking.block_evaluations
    assert result.block_evaluations["shared"] < 0.9 * result.block_evaluations["unshared"]
