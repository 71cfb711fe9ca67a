"""Mistakes that many blocks share are said once, and what is missing is named by what the author left out."""

import pytest
from networks import parse

from updp.conformance import check_spec
from updp.errors import Place, Problem, SpecError
from updp.problems import say_once

HERE = Place("s.yaml", 3, 5)


def problem(message, place=HERE):
    return Problem(place, "structures.block", message)


def test_measured_figures_and_shapes_do_not_tell_mistakes_apart():
    found = [
        (["a.0", "a.1"], problem("a.0 differs (relative difference 1.3e+00) at input [2, 10, 24]")),
        (["b.0"], problem("b.0 differs (relative difference 7.1e-02) at input [2, 5, 48]")),
    ]
    (said,) = say_once(found)
    assert said == problem("a.0, a.1, b.0 differs (relative difference 1.3e+00) at input [2, 10, 24]")


@pytest.mark.parametrize(
    "other", [problem("b.0 lacks 'act2'"), problem("b.0 lacks 'act1'", Place("s.yaml", 4, 5)), problem("b.0: [0]")]
)
def test_other_mistakes_stay_apart(other):
    found = [(["a.0"], problem("a.0 lacks 'act1'")), (["a.1"], problem("a.1: [1]")), (["b.0"], other)]
    assert len(say_once(found)) == 3


POOLS = """
version: 1
model: {timm: poolformer_s12}
input: [3, 64, 64]
structures:
  block:
    - sum: [[norm1, token_mixer, drop_path1, layer_scale1], []]
    - sum: [[norm2, mlp.fc1, mlp.act, mlp.drop1, mlp.fc2, mlp.drop2, drop_path2], []]
recipes:
  asis: {kind: reparam, merge: []}
blocks:
  - {match: "stages.*.blocks.*", structure: block, recipes: [asis]}
"""


def test_what_lies_inside_a_declared_step_is_not_missing():
    """`token_mixer` is declared, its pooling with it; four kinds of blocks differ by four figures."""
    with pytest.raises(SpecError) as caught:
        check_spec(parse(POOLS))
    (said,) = caught.value.problems
    assert "(12 blocks)" in said.message
    assert "missing: not declared: layer_scale2" in said.message


def test_what_timm_refuses_has_a_line():
    with pytest.raises(SpecError, match=r"^toy.yaml:3:8: model: timm refuses poolformer_s12 with {'depht': 3}"):
        check_spec(parse(POOLS.replace("poolformer_s12", "poolformer_s12, depht: 3")))
    with pytest.raises(SpecError, match=r"^toy.yaml:3:8: model.timm: got 'poolformer_s13'"):
        check_spec(parse(POOLS.replace("poolformer_s12", "poolformer_s13")))
