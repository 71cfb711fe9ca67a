"""The papers' tables: every figure that can be computed is the published one, to the digit."""

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
import torch
import yaml
from commands import Caller
from torch import nn

from updp.cli import console
from updp.errors import InputError
from updp.tables import Dialect, compare, list_tables, load_tables, measure

PAPERS = {"depthshrinker": 30, "eapruning": 28, "isomorphic": 10, "updp": 47}  # rows

# (paper, table, row) -> millions or thousands of millions of operations, in the paper's own way of counting.
OPERATIONS = {
    ("depthshrinker", "1", "MobileNetV2"): "0.3342",
    ("depthshrinker", "1", "MobileNetV2-1.4"): "0.6301",
    ("depthshrinker", "1", "EfficientNet-Lite0"): "0.4189",
    ("depthshrinker", "1", "ResNet-50"): "4.1448",
    ("depthshrinker", "1", "ResNet-101"): "7.8826",
    ("depthshrinker", "1", "ResNet-152"): "11.6264",
    ("depthshrinker", "2", "MBV2-1.4"): "630.06",
    ("depthshrinker", "2", "MBV2-1.4-DS-A"): "519.35",
    ("depthshrinker", "2", "MBV2-1.4-DS-B"): "502.38",
    ("depthshrinker", "2", "MBV2-1.4-DS-C"): "492.49",
    ("depthshrinker", "2", "MBV2-1.4-DS-D"): "484.17",
    ("depthshrinker", "2", "MBV2-1.4-DS-E"): "474.27",
    ("depthshrinker", "2", "MBV2-1.4-DS-F"): "415.89",
    ("depthshrinker", "2", "Uniform-0.65x"): "182.52",
    ("depthshrinker", "2", "Uniform-0.35x"): "68.00",
    ("depthshrinker", "3", "MBV2-DS-A"): "287.10",
    ("depthshrinker", "3", "MBV2-DS-B"): "272.72",
    ("depthshrinker", "3", "MBV2-DS-C"): "261.11",
    ("depthshrinker", "3", "MBV2-DS-D"): "253.72",
    ("depthshrinker", "7", "EffLite1"): "650.90",
    ("depthshrinker", "7", "EffLite2"): "924.21",
    ("depthshrinker", "7", "EffLite3-DS-A"): "991.64",
    ("depthshrinker", "7", "EffLite3-DS-B"): "952.37",
    ("depthshrinker", "7", "EffLite3-DS-C"): "918.63",
    ("depthshrinker", "7", "EffLite3-DS-D"): "905.68",
    ("eapruning", "3", "ResNet50"): "4111.41",
    ("eapruning", "4", "MobileNetV1"): "568.74",
    ("eapruning", "4", "MobileNetV1-0.75"): "325.40",
    ("updp", "2", "Ours-P6"): "519.35",
    ("updp", "2", "Ours-P9"): "492.49",
    ("updp", "2", "Ours-P11"): "474.27",
    ("updp", "3", "ConvNeXtV1-T-UPDP-P3"): "3.8125",
    ("updp", "3", "ConvNeXtV1-T-UPDP-P6"): "3.1875",
    ("updp", "3", "ConvNeXtV1-T-UPDP-P9"): "2.5745",
    ("updp", "4", "Ours-P6"): "0.9487",
}
# Millions of parameters as counted, and the norms that recipes append, which are in or out as the file says.
PARAMETERS = {
    "ConvNeXtV1-T-UPDP-P3": ("28.382", 576),
    "ConvNeXtV1-T-UPDP-P6": ("27.581", 1728),
    "ConvNeXtV1-T-UPDP-P9": ("23.647", 4416),
    "Ours-P6": ("3.822", 2304),
    "DeiT-Tiny": ("5.377", 0),
}
EXPLAINED = {("updp", "ConvNeXtV2-P"), ("eapruning", "DeiT-Base")}


@pytest.fixture(scope="module")
def found():
    return compare([load_tables(name) for name in list_tables()])


@pytest.fixture
def call(capsys):
    return Caller(capsys)


def short(value: Decimal, digits: str) -> str:
    return str(value.quantize(Decimal(digits)))


# --- figures ---


def test_every_row_of_every_paper_is_there(found):
    assert list_tables() == list(PAPERS)
    rows = Counter(name for name in PAPERS for table in load_tables(name).tables for _ in table.rows)
    assert rows == PAPERS
    assert found.counts == {"equal": 76, "differs": 2, "unexplained": 0, "not determinable": 70}
    assert found.ok


def test_operations_to_the_digit(found):
    computed = {(f.paper.name, f.table.name, f.row.name): f.computed for f in found.figures if f.figure.what == "macs"}
    assert {key: short(computed[key], digits) for key, digits in OPERATIONS.items()} == OPERATIONS


def test_products_alone_of_the_basic_blocks(found):
    products = {f.row.name: f.measured.macs for f in found.figures if (f.paper.name, f.table.name) == ("updp", "1")
                if f.measured}  # fmt: skip
    assert [round(products[row] / 1e9, 4) for row in ("Ours-P6", "Ours-P10")] == [2.9701, 2.5077]


def test_parameters_to_the_digit(found):
    params = {f.row.name: f for f in found.figures if f.figure.what == "params" and f.count is not None}
    computed = {row: (short(params[row].computed, "0.001"), params[row].measured.appended) for row in PARAMETERS}
    assert computed == PARAMETERS
    assert [params[row].figure.dialect.appended for row in PARAMETERS] == [False, False, False, True, True]


def test_only_known_differences(found):
    assert {(f.paper.name, f.row.name) for f in found.figures if f.verdict == "differs"} == EXPLAINED
    assert all(f.reason for f in found.figures if f.verdict in ("differs", "not determinable"))


@pytest.mark.parametrize("paper", PAPERS)
def test_figures_are_those_of_the_paper(paper):
    """Against the figures that were read from the paper itself, where they are at hand."""
    source = Path(__file__).parents[2] / "shared" / "papers" / "paper_tables.yaml"
    if not source.is_file():
        pytest.skip("the papers' figures are not here")
    read = yaml.safe_load(source.read_text(encoding="utf-8"))
    tables = (read.get(paper) or read[f"{paper}_supplement"])["tables"]
    checked = 0
    for table in load_tables(paper).tables:
        given = tables.get(f"table{table.name.rpartition(' ')[2]}")
        for row in table.rows if given else ():
            printed = [values for values in given["rows"] if values[0] == row.name]
            numbers = {str(value).strip("~G").removesuffix(".0") for values in printed for value in values[1:]}
            for figure in row.figures if numbers else ():
                assert str(figure.published).removesuffix(".0") in numbers, row.name
                checked += 1
    assert checked >= {"depthshrinker": 30, "eapruning": 20, "isomorphic": 7, "updp": 60}[paper]


# --- how figures are compared ---


@pytest.mark.parametrize(
    ("digits", "rounding", "count", "expected"),
    [
        ((0,), "truncate", 519_999_999, "519"),
        ((0,), "round", 650_500_000, "651"),
        ((2, 1), "round", 2_445_500_000, "2445.5"),
        ((-1,), "truncate", 339_900_000, "330"),
    ],
)
def test_printed_as_a_paper_prints(digits, rounding, count, expected):
    assert Dialect("M", digits, rounding).printed(count) == Decimal(expected)


def test_rounding_twice():
    assert Dialect("G", (2, 1)).printed(2_445_500_000) == Decimal("2.5")
    assert Dialect("G", (1,)).printed(2_445_500_000) == Decimal("2.4")


GOOD = """
version: 1
title: A paper
arxiv: "2401.00001"
venue: NOWHERE 2024
figures:
  macs: {unit: M, digits: 2, rounding: truncate}
  params: {unit: M, digits: 3}
tables:
  - table: "1"
    title: small networks
    rows:
      - row: a
        macs: 1.64
        params: 0.001
        input: 32
        network: {chain: [
          {conv: 8, kernel: 3, stride: 2}, {depthwise: 3}, {repeat: 2, chain: [{conv: 16}]}, pool, {linear: 10},
        ]}
      - {row: b, macs: 3, unknown: nobody knows}
"""
CHAIN = GOOD[GOOD.index("{chain: [") : GOOD.rindex("]}") + 2]
PRODUCTS = 16 * 16 * (3 * 9 * 8 + 8 * 9 + 8 * 16 + 16 * 16) + 16 * 10
PARAMS = (3 * 9 * 8 + 16) + (8 * 9 + 16) + (8 * 16 + 32) + (16 * 16 + 32) + (16 * 10 + 10)


@pytest.fixture
def write(tmp_path):
    def write(*changes):
        text = GOOD
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "paper.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_a_chain_counts_as_it_is_written(write):
    file = write(("macs: 1.64", f"macs: {PRODUCTS // 10000 / 100}"))
    first, second, third = compare([load_tables(file)]).figures
    assert (first.count, first.verdict) == (PRODUCTS, "equal")
    assert (second.count, second.verdict) == (PARAMS, "equal")
    assert (third.verdict, third.reason, third.computed) == ("not determinable", "nobody knows", None)


def test_what_is_charged_besides_products():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(4 * 8 * 8))
    found = measure.measured(block, 8)
    assert found.macs == 3 * 4 * 64
    assert found.elements == {"batchnorm": 256, "layernorm": 256, "activation": 256, "bias": 256, "attention": 0}
    assert all(not module._forward_hooks for module in block.modules())


def test_the_difference_that_is_not_explained(write, call):
    file = write(("macs: 1.64", "macs: 9"))
    done = call("tables", file)
    assert done.status == 1
    assert "1 different without a reason" in done.out
    assert json.loads(call("tables", file, "--json").out)["ok"] is False
    explained = write(("macs: 1.64", "macs: {published: 9, differs: a slip}"))
    done = call("tables", explained)
    assert (done.status, "a: a slip" in done.out) == (0, True)
    stale = write(("macs: 1.64", f"macs: {{published: {PRODUCTS // 10000 / 100}, differs: a slip}}"))
    done = call("tables", stale)
    assert (done.status, "it is said to differ (a slip), but does not" in done.out) == (1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rounding: truncate", "rounding: up"), "rounding: got 'up', allowed: round, truncate"),
        (("title: A paper\n", ""), "the key 'title' is missing"),
        (("unknown: nobody knows", "unknow: nobody knows"), "unknown key: got 'unknow'"),
        ((", unknown: nobody knows", ""), "tables[0].rows[1]: give `network`, or `unknown`"),
        (("macs: 3, ", ""), "tables[0].rows[1]: no figure: give macs or params"),
        (("{unit: M, digits: 3}", "{digits: 3}"), "tables[0].rows[0].params: its 'unit' is given nowhere"),
        (("macs: 3,", "macs: [3],"), "macs: got a list, allowed: a number; a mapping with `published`"),
        (("{linear: 10}", "{lineal: 10}"), "did you mean 'linear'?"),
        (("{chain: [", "{timm: nosuchnet, chain: ["), "a: no such model of timm: got 'nosuchnet'"),
        (
            (CHAIN, "{spec: nosuch}"),
            "a: no such spec: got 'nosuch'",
        ),
        (
            (CHAIN, "{spec: resnet34, subnet: ds_z}"),
            "a: no such subnet",
        ),
        (("params: 0.001", "params: {published: 1, exclude: [head.*]}"), "exclude: no parameter matches 'head.*'"),
        (("input: 32", "input: 32\n        note: [1]"), "note: got a list, allowed: a string"),
        (("repeat: 2, chain: [{conv: 16}]", "depthwise: 3, stride: 0"), "got 0, allowed: at least 1"),
    ],
)
def test_bad_files_end_in_one_message(write, call, change, message):
    file = write(change)
    text = call.refuses("tables", file, names=(message,))
    assert str(file) in text
    assert ":" in text.partition(str(file))[2][:4]


def test_the_same_table_twice(write):
    twice = "  - {table: '1', title: again, rows: [{row: c, macs: 1, unknown: why}]}\n"
    with pytest.raises(InputError, match=r"tables\[1\].table: '1' is there already"):
        load_tables(write(("      - {row: b, macs: 3, unknown: nobody knows}\n",
                           "      - {row: b, macs: 3, unknown: nobody knows}\n" + twice)))  # fmt: skip


# --- the command ---


def test_the_command_shows_published_beside_computed(call):
    done = call("tables", "depthshrinker", "--table", "3")
    assert done.status == 0
    line = next(line for line in done.out.splitlines() if "MBV2-DS-A" in line).split()
    assert line[:7] == ["MBV2-DS-A", "macs", "287", "M", "287.10", "M", "224"]
    assert line[7:] == ["MAC", "+", "5", "BN,", "truncated", "equal"]
    assert "not determinable: AMC (220 M): widths not published" in done.out
    assert "5 equal, 1 not determinable" in done.out
    assert done.err == ""


def test_the_command_fits_into_a_hundred_columns(call, monkeypatch):
    monkeypatch.setattr(console.out, "_width", 100)
    lines = call("tables", "updp", "--table", "4").out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.rstrip().endswith(" equal") for line in lines) == 4


def test_the_command_s_json_holds_everything(call):
    data = json.loads(call("tables", "updp", "--table", "4", "--json").out)
    assert (data["ok"], data["counts"]["unexplained"]) == (True, 0)
    (paper,) = data["papers"]
    assert (paper["paper"], paper["arxiv"], paper["tables"][0]["table"]) == ("updp", "2401.06426", "4")
    row = next(row for row in paper["tables"][0]["rows"] if row["row"] == "Ours-P6")
    macs, params = row["figures"]
    assert row["network"] == {"spec": "deit_tiny_patch16_224", "subnet": "updp_p6"}
    assert (macs["published"], macs["unit"], macs["verdict"], macs["count"]) == (0.9, "G", "equal", 948_670_464)
    assert params["counted"]["exclude"] == ["head.*", "patch_embed.*"]
    assert params["measured"] == {"all": 4_162_216, "appended": 2304}
    missing = next(row for row in paper["tables"][0]["rows"] if row["row"] == "XPruner")
    assert missing["figures"][0]["computed"] is None
    assert missing["figures"][0]["reason"]


def test_wrong_papers_and_tables(call):
    call.refuses("tables", "updb", names=("no such tables", "did you mean 'updp'"))
    call.refuses("tables", "updp", "--table", "9", names=("no such table: got '9', allowed: 1, 2, 3, 4",))
    call.refuses("tables", "--table", "1", names=("--table: say of which paper",))
    call.refuses("tables", "nosuch.yaml", names=("nosuch.yaml: cannot read", "No such file"))


def test_nothing_is_computed_or_downloaded():
    row = load_tables("depthshrinker").tables[1].rows[2]
    model = measure.built(row.network, row.size)
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
