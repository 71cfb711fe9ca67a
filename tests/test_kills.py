"""Killed in every stage, and between writing a file and naming it, a run ends with the bits of one never killed."""

from pathlib import Path
from typing import Any

import pytest
from commands import TINY
from kills import Moment, leftovers, outcome, run_in_process

MOMENTS = (
    Moment("baseline", "step", 5),
    Moment("baseline", "rename", 2),  # of a training's state
    Moment("supernet", "step", 2),  # before any state of this stage was kept
    Moment("supernet", "step", 4),
    Moment("supernet", "rename", 1),
    Moment("search", "advance", 1),
    Moment("search", "rename", 1),  # of the subnet
    Moment("finetune", "step", 7),
    Moment("finetune", "rename", 2),
    Moment("merge", "rename", 1),
    Moment("merge", "rename", 3),
)
SPECS = {"convnext_digits": 4, "deit_digits": 2}


def request(spec: str, out: Path) -> dict[str, Any]:
    prune, settings = SPECS[spec], (*TINY, "finetune.ema=0.9")
    return {"spec": spec, "data": "digits", "out": out, "prune": prune, "settings": settings, "threads": 1}


@pytest.mark.parametrize("spec", SPECS)
def test_killed_in_every_stage_a_run_ends_with_the_same_bits(spec: str, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert run_in_process(request(spec, undisturbed), None) == 0
    for moment in MOMENTS:
        assert run_in_process(request(spec, killed), moment) == -9, moment
        assert not (killed / moment.stage / "result.json").exists()
    assert leftovers(killed) != []
    assert run_in_process(request(spec, killed), None) == 0
    expected, found = outcome(undisturbed), outcome(killed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert leftovers(killed) == []
