"""Choosing blocks by the true network: the best sets by the table in order, and what solving them shows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import random_model, spec_of
from torch import Tensor

from updp.calibrate import Damage, DamageTable, network_damage, rank, solve_subnet, verify
from updp.calibrate import blocks as solving
from updp.errors import InputError
from updp.frozen import FrozenMap
from updp.supernet import Supernet, build_supernet

Row: TypeAlias = tuple[str, str, float]


def table(*damages: Row) -> DamageTable:
    rows = tuple(Damage(block, recipe, damage, 0.1, 50, 100) for block, recipe, damage in damages)
    return DamageTable("some_spec", 1000, 10, rows, 20.0)


ROWS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["one", "two"]), st.floats(0, 5)),
    min_size=2, max_size=7, unique_by=lambda row: row[:2],
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(1, 3), st.integers(1, 9))
def test_sets_come_in_the_order_of_their_damage_each_once(
    rows: list[tuple[str, str, float]], k: int, count: int
) -> None:
    names = sorted({row[0] for row in rows})
    if k > len(names):
        with pytest.raises(InputError, match="allowed: 1 to"):
            rank(table(*rows), count, prune=k)
        return
    options = [[row for row in rows if row[0] == name] for name in names]
    totals = sorted(
        sum(row[2] for row in pick)
        for chosen in itertools.combinations(options, k)
        for pick in itertools.product(*chosen)
    )
    damage = {row[:2]: row[2] for row in rows}
    found = rank(table(*rows), count, prune=k)
    assert len(found) == min(count, len(totals))
    assert len({tuple(sorted(subnet.choices.items())) for subnet in found}) == len(found)
    sums = [sum(damage[pair] for pair in subnet.choices.items()) for subnet in found]
    assert sums == pytest.approx(totals[: len(found)], abs=1e-6)


def network() -> Supernet:
    spec = spec_of("convnext_digits")
    recipes = {name: dataclasses.replace(recipe, compose="start") for name, recipe in spec.recipes.items()}
    spec = dataclasses.replace(spec, recipes=FrozenMap(recipes))
    return build_supernet(spec, random_model(spec)).double().eval()


def batches(*shape: int, seed: int = 0) -> Callable[[], Iterable[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return lambda: iter(kept)


def test_candidates_are_judged_as_if_each_were_solved_alone_and_shared_beginnings_are_solved_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, images, judge = network(), batches(16, 3, 32, 32), batches(8, 3, 32, 32, seed=5)
    names = list(net.available)
    sets = [net.configure([names[i] for i in chosen]) for chosen in ((1, 4), (1, 5), (2, 4), (1, 4, 5))]
    alone = {}
    for subnet in sets:
        solve_subnet(net, subnet, images)
        alone[tuple(subnet.pruned)] = network_damage(net, subnet, judge)
    calls = []
    solve = solving._solve
    monkeypatch.setattr(solving, "_solve", lambda stream, *rest: calls.append(stream.flows) or solve(stream, *rest))
    found = verify(net, sets, images, judge)
    assert {tuple(each.subnet.pruned): each.damage for each in found} == alone
    assert [each.damage for each in found] == sorted(alone.values())
    # (1), (1, 4), (1, 5), (2), (2, 4), (1, 4, 5): the first of (1, 5) and the first two of (1, 4, 5) are known
    assert len(calls) == 6
