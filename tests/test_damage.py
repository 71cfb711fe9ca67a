"""The table of damages: blocks are chosen from it exactly, and what is kept of it is taken up again."""

import itertools
import random

import pytest
from networks import spec_of

from updp.calibrate import Damage, DamageTable, SolveSettings, choose
from updp.calibrate.damage import MEMORY, groups, most_unknowns, pairs_in, peak_memory, work
from updp.calibrate.kept import flow_of
from updp.calibrate.memory import equation_bytes
from updp.errors import InputError
from updp.pipeline.settings import composed_at_start
from updp.structure import create_model
from updp.supernet import build_supernet


def table_of(seed: int, blocks: int = 6) -> DamageTable:
    """A table of random figures: two recipes a block; not everything saves."""
    draw = random.Random(seed).random
    rows = []
    for block in range(blocks):
        macs, latency = round(1e6 * (1 + draw())), 1e-3 * (1 + draw())
        for recipe in ("full", "other"):
            cost = (round(macs * (0.3 + draw())), macs, latency * (0.3 + draw()), latency)
            rows.append(Damage(f"b{block}", recipe, 0.01 + draw() ** 3, 0.1, *cost, 100, 10))
    macs = sum(row.macs_before for row in rows[::2]) + 500_000
    latency = sum(row.latency_before for row in rows[::2]) + 1e-3
    return DamageTable("net", macs, 20, tuple(rows), latency, {"threads": 1})


def all_choices(table: DamageTable):
    """Every choice of rows, at most one of each block."""
    blocks = sorted({row.block for row in table.rows})
    options = [[None, *(row for row in table.rows if row.block == block)] for block in blocks]
    for chosen in itertools.product(*options):
        yield [row for row in chosen if row is not None]


def part_left(table: DamageTable, chosen: list[Damage], what: str) -> float:
    saved = sum(getattr(row, f"{what}_before") - getattr(row, what) for row in chosen)
    return 1 - saved / getattr(table, what)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "asked",
    [{"prune": 3}, {"macs": 0.8}, {"latency": 0.8}, {"latency": 0.85, "macs": 0.85}, {"prune": 4, "latency": 0.85}],
    ids=lambda asked: "-".join(asked),
)
def test_the_choice_is_the_best_there_is(seed, asked):
    table = table_of(seed)
    allowed = [
        chosen
        for chosen in all_choices(table)
        if len(chosen) == asked.get("prune", len(chosen))
        and all(part_left(table, chosen, what) <= part for what, part in asked.items() if what != "prune")
    ]
    if not allowed:
        with pytest.raises(InputError, match="--budget"):
            choose(table, **asked)
        return
    best = min(sum(row.damage for row in chosen) for chosen in allowed)
    choices = choose(table, **asked).choices
    chosen = [row for row in table.rows if choices.get(row.block) == row.recipe]
    assert len(chosen) == len(choices)
    assert sum(row.damage for row in chosen) == pytest.approx(best, abs=1e-9)
    for what in ("macs", "latency"):
        assert part_left(table, chosen, what) <= asked.get(what, 2.0) + 1e-12


def test_what_cannot_be_reached_is_told_with_what_can():
    table = table_of(0)
    for what in ("macs", "latency"):
        with pytest.raises(InputError, match=f"{what}: got 0.01x") as told:
            choose(table, **{what: 0.01})
        least = min(part_left(table, chosen, what) for chosen in all_choices(table))
        assert f"leaves {least:.3f}x of the baseline's" in str(told.value)
        with pytest.raises(InputError, match="the 2 blocks that save the most") as told:
            choose(table, prune=2, **{what: 0.3})
        least = min(part_left(table, chosen, what) for chosen in all_choices(table) if len(chosen) == 2)
        assert f"leaves {least:.3f}x" in str(told.value)


def test_a_saved_table_is_the_same(tmp_path):
    table = table_of(1)
    table.save(tmp_path / "table.json")
    assert DamageTable.load(tmp_path / "table.json") == table
    for text, told in (
        ('{"version": 1}', "allowed: 2"),
        ('{"version": 2, "rows": [{"block": "b"}]}', "not a table of damages"),
        ('{"version": 2, "rows": []}', "not a table of damages: 'spec'"),
    ):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(InputError, match=told):
            DamageTable.load(tmp_path / "table.json")


@pytest.fixture(scope="module")
def supernet():
    spec = composed_at_start(spec_of("convnext_digits"))
    return build_supernet(spec, create_model(spec, num_classes=10, seed=0), resized=True)


def test_pairs_that_are_solved_together(supernet, monkeypatch):
    pairs = pairs_in(supernet)
    assert len(pairs) == 20
    assert work(supernet, "full") * 2 == work(supernet)
    found = groups(supernet, pairs)
    assert sorted(pair for group in found for pair in group) == sorted(pairs)
    assert all(len(dict(group)) == len(group) for group in found), "each block once"
    together = [sum(equation_bytes(flow_of(supernet, pair)) for pair in group) for group in found]
    assert max(together) < MEMORY
    peak = peak_memory(supernet, 16, SolveSettings())
    assert peak > max(together)
    monkeypatch.setattr("updp.calibrate.damage.MEMORY", max(together) // 4)
    assert len(groups(supernet, pairs)) > len(found)
    assert peak_memory(supernet, 16, SolveSettings()) < peak
    assert most_unknowns(supernet) > 128


def test_a_recipe_that_no_block_has(supernet):
    with pytest.raises(InputError, match="got 'fulll', allowed: full, pointwise"):
        pairs_in(supernet, "fulll")
